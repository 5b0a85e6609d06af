"""The caller's transaction: what becomes of it changes nothing about what was spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth import get_user_model
from django.db import connection, connections, transaction
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import Client
from django.urls import path

import ai_budget
from ai_budget.exceptions import BudgetExceeded, CallInsideTransaction, LedgerUnavailable
from ai_budget.ledger import connection as connecting
from ai_budget.models import CallLog, FeatureBudget, SpendWindow
from ai_budget.money import to_usd
from ai_budget.testing import AnthropicSimulator, override_budget
from tests.factories import UserFactory
from tests.guard.books import bill
from tests.whole.calls import (
    LONG,
    TOKENS,
    WAYS,
    ask,
    assert_books_agree,
    assert_nothing_happened,
    balance,
    last,
    most,
    spent,
)

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "ledger"]),
    pytest.mark.usefixtures("known_alias"),
    pytest.mark.urls(__name__),
]

ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


class Undone(Exception):
    """What a caller's own code fails with."""


# A small site ------------------------------------------------------------------------------------


def answer(request: HttpRequest) -> HttpResponse:
    return HttpResponse(ai_budget.ask("Hello", feature="chat").text)


def answer_and_fail(request: HttpRequest) -> HttpResponse:
    ai_budget.ask("Hello", feature="chat")
    raise Undone


def answer_and_undo(request: HttpRequest) -> HttpResponse:
    text = ai_budget.ask("Hello", feature="chat").text
    transaction.set_rollback(True)
    return HttpResponse(text)


def join(request: HttpRequest) -> HttpResponse:
    """A visitor becomes a user, and is greeted at their own expense; then something fails."""
    user = UserFactory.create(username="ada")
    ai_budget.ask("Hello", feature="chat", user=user)
    if "fail" in request.GET:
        raise Undone
    return HttpResponse()


def answer_afterwards(request: HttpRequest) -> HttpResponse:
    transaction.on_commit(ask)
    if "fail" in request.GET:
        raise Undone
    return HttpResponse()


def tell(request: HttpRequest) -> StreamingHttpResponse:
    def body() -> Iterator[str]:
        with ai_budget.stream("Hello", feature="chat") as story:
            yield from story

    return StreamingHttpResponse(body())


@transaction.non_atomic_requests
def answer_outside(request: HttpRequest) -> HttpResponse:
    return answer(request)


urlpatterns = [
    path("answer/", answer),
    path("answer-and-fail/", answer_and_fail),
    path("answer-and-undo/", answer_and_undo),
    path("answer-afterwards/", answer_afterwards),
    path("answer-outside/", answer_outside),
    path("join/", join),
    path("tell/", tell),
]


@pytest.fixture
def atomic_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's setting ATOMIC_REQUESTS."""
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)


@pytest.fixture
def visitor() -> Client:
    """A browser that is shown the page for an error of the server, as in production."""
    return Client(raise_request_exception=False)


@pytest.fixture(scope="module")
def known_alias() -> Iterator[None]:
    """A second connection to the same database, which is what the hint tells people to make.

    Django lets a test use only what was there before it.
    """
    default = connections.settings["default"]
    # As a mirror it is not emptied by itself.
    test = {**default["TEST"], "MIRROR": "default"}
    connections.settings["ledger"] = {**default, "ATOMIC_REQUESTS": False, "TEST": test}
    yield
    connections["ledger"].close()
    del connections["ledger"]
    del connections.settings["ledger"]


@pytest.fixture
def second_alias(api: AnthropicSimulator, settings: Any) -> None:
    """The ledger writes through the second connection."""
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has one writer a file")
    settings.AI_BUDGET = {**settings.AI_BUDGET, "LEDGER_DATABASE": "ledger"}


# The caller's transactions -----------------------------------------------------------------------


@contextmanager
def autocommit_off() -> Iterator[None]:
    transaction.set_autocommit(False)
    try:
        yield
    except BaseException:
        transaction.rollback()
        raise
    else:
        transaction.commit()
    finally:
        transaction.set_autocommit(True)


@contextmanager
def nested() -> Iterator[None]:
    with transaction.atomic(), transaction.atomic():
        yield


@contextmanager
def savepoint() -> Iterator[None]:
    """What fails in the inner block is undone; the outer one goes on and is committed."""
    with transaction.atomic():
        try:
            with transaction.atomic():
                yield
        except Undone:
            pass


Block = Callable[[], AbstractContextManager[Any]]
BLOCKS: dict[str, Block] = {
    "atomic": transaction.atomic,
    "durable": lambda: transaction.atomic(durable=True),
    "nested": nested,
    "savepoint": savepoint,
    "no savepoint": lambda: transaction.atomic(savepoint=False),
    "autocommit off": autocommit_off,
}
blocks = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


# Without a second connection ---------------------------------------------------------------------


@blocks
def test_inside_a_transaction_nothing_is_sent_and_nothing_is_reserved(
    api: AnthropicSimulator, block: Block
) -> None:
    with block(), pytest.raises(CallInsideTransaction):
        ask()

    assert api.requests == []
    assert_nothing_happened()
    assert not FeatureBudget.objects.exists()


@ways
def test_no_verb_calls_inside_a_transaction(
    api: AnthropicSimulator, way: Callable[..., None]
) -> None:
    with transaction.atomic(), pytest.raises(CallInsideTransaction):
        way()

    assert api.requests == []
    assert_nothing_happened()


def test_the_refusal_says_what_can_be_done(api: AnthropicSimulator) -> None:
    with transaction.atomic(), pytest.raises(CallInsideTransaction) as raised:
        ask()

    message = str(raised.value)
    assert "Make the call outside the transaction" in message
    assert ("LEDGER_DATABASE" in message) == (connection.vendor != "sqlite")
    assert raised.value.__cause__ is raised.value.__context__ is None


def test_a_caller_can_take_the_refusal_and_go_on(api: AnthropicSimulator) -> None:
    with transaction.atomic():
        with suppress(CallInsideTransaction):
            ask()
        UserFactory.create(username="ada")

    assert get_user_model().objects.filter(username="ada").exists()
    ask()
    assert_books_agree()


@pytest.mark.usefixtures("atomic_requests")
def test_a_view_under_atomic_requests_is_refused(api: AnthropicSimulator) -> None:
    with pytest.raises(CallInsideTransaction):
        Client().get("/answer/")

    assert api.requests == []
    assert_nothing_happened()


@pytest.mark.usefixtures("atomic_requests")
def test_a_view_may_be_taken_out_of_atomic_requests(
    api: AnthropicSimulator, visitor: Client
) -> None:
    assert visitor.get("/answer-outside/").status_code == 200

    assert [last().cost_nanousd] == bill(api)


@pytest.mark.usefixtures("atomic_requests")
def test_a_body_that_streams_begins_after_the_transaction_of_its_view(
    api: AnthropicSimulator, visitor: Client
) -> None:
    response: Any = visitor.get("/tell/")

    assert b"".join(response.streaming_content)
    assert [last().cost_nanousd] == bill(api)
    assert_books_agree()


@pytest.mark.usefixtures("atomic_requests")
def test_what_is_left_for_the_commit_is_called_after_it(
    api: AnthropicSimulator, visitor: Client
) -> None:
    assert visitor.get("/answer-afterwards/").status_code == 200

    assert [last().cost_nanousd] == bill(api)
    assert_books_agree()


@pytest.mark.usefixtures("atomic_requests")
def test_what_is_left_for_a_commit_that_never_comes_is_not_called(
    api: AnthropicSimulator, visitor: Client
) -> None:
    assert visitor.get("/answer-afterwards/?fail=1").status_code == 500

    assert api.requests == []
    assert_nothing_happened()


def test_a_stream_that_is_closed_inside_a_transaction_is_left_to_the_tick(
    api: AnthropicSimulator, caplog: pytest.LogCaptureFixture
) -> None:
    streaming = ai_budget.stream("Hello", feature="chat", max_tokens=TOKENS)
    with streaming as answer, transaction.atomic():
        text = "".join(answer)
        answer.__exit__(None, None, None)

    assert text
    assert last().status == CallLog.Status.RESERVED
    assert "ai_budget_tick will book it" in caplog.text
    assert_books_agree()


def test_what_was_spent_before_a_transaction_stays_when_it_is_undone(
    api: AnthropicSimulator,
) -> None:
    ask()
    with suppress(Undone), transaction.atomic():
        raise Undone

    assert [last().cost_nanousd] == bill(api)
    assert_books_agree()


# With a second connection ------------------------------------------------------------------------


@pytest.mark.usefixtures("second_alias")
@blocks
def test_the_spend_outlives_the_callers_transaction(api: AnthropicSimulator, block: Block) -> None:
    with suppress(Undone), block():
        UserFactory.create(username="ada")
        ask()
        raise Undone

    assert not get_user_model().objects.exists()
    row = last()
    assert row.status == CallLog.Status.SETTLED
    assert [row.cost_nanousd] == bill(api)
    assert balance("feature:chat", row.day) == spent(row.cost_nanousd)
    assert_books_agree()


@pytest.mark.usefixtures("second_alias")
@ways
def test_by_every_verb_the_spend_outlives_the_callers_rollback(
    api: AnthropicSimulator, way: Callable[..., None]
) -> None:
    with suppress(Undone), transaction.atomic():
        way()
        raise Undone

    assert [last().cost_nanousd] == bill(api)
    assert_books_agree()


@pytest.mark.usefixtures("second_alias")
def test_what_was_spent_before_a_rollback_counts_against_the_limit(
    api: AnthropicSimulator,
) -> None:
    api.enqueue(LONG)
    with override_budget("chat", daily_limit_usd=to_usd(most())):
        with suppress(Undone), transaction.atomic():
            ask()
            raise Undone

        with pytest.raises(BudgetExceeded):
            ask()


@pytest.mark.usefixtures("second_alias")
def test_a_refusal_leaves_the_callers_transaction_usable(api: AnthropicSimulator) -> None:
    with override_budget("chat", daily_limit_usd=0), transaction.atomic():
        with pytest.raises(BudgetExceeded):
            ask()
        UserFactory.create(username="ada")

    assert get_user_model().objects.filter(username="ada").exists()


@pytest.mark.usefixtures("second_alias")
def test_a_stream_that_is_closed_inside_a_transaction_is_booked_at_once(
    api: AnthropicSimulator,
) -> None:
    with suppress(Undone), transaction.atomic():
        with ai_budget.stream("Hello", feature="chat") as answer:
            "".join(answer)
        raise Undone

    assert [last().cost_nanousd] == bill(api)
    assert_books_agree()


@pytest.mark.usefixtures("second_alias", "atomic_requests")
@pytest.mark.parametrize(
    ("page", "status"), [("answer", 200), ("answer-and-fail", 500), ("answer-and-undo", 200)]
)
def test_under_atomic_requests_the_spend_outlives_the_view(
    api: AnthropicSimulator, visitor: Client, page: str, status: int
) -> None:
    assert visitor.get(f"/{page}/").status_code == status

    assert [last().cost_nanousd] == bill(api)
    assert_books_agree()


@pytest.mark.usefixtures("second_alias", "atomic_requests")
@pytest.mark.parametrize(("query", "users"), [("", 1), ("?fail=1", 0)], ids=["commit", "rollback"])
def test_a_user_of_a_transaction_that_is_open_can_be_charged(
    api: AnthropicSimulator, visitor: Client, query: str, users: int
) -> None:
    visitor.get(f"/join/{query}")

    assert get_user_model().objects.count() == users
    row = last()
    assert row.user_id is not None
    assert balance(f"user:{row.user_id}", row.day) == spent(row.cost_nanousd)
    assert_books_agree()


@pytest.mark.usefixtures("second_alias")
def test_a_transaction_on_the_second_connection_itself_is_refused(
    api: AnthropicSimulator,
) -> None:
    with transaction.atomic(using="ledger"), pytest.raises(CallInsideTransaction, match="'ledger'"):
        ask()

    assert api.requests == []


@pytest.mark.usefixtures("second_alias")
def test_an_async_verb_in_a_transaction_books_through_the_second_connection(
    api: AnthropicSimulator,
) -> None:
    async def both() -> None:
        await ai_budget.aask("Hello", feature="chat")
        await ai_budget.aask("Hello", feature="chat")

    with suppress(Undone), transaction.atomic():
        async_to_sync(both)()
        raise Undone

    assert [row.cost_nanousd for row in CallLog.objects.order_by("id")] == bill(api)
    assert_books_agree()


# A caller who holds locks ------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> float:
    """Statements wait for locks a second at most, and are tried twice; the time for all."""
    monkeypatch.setattr(connecting, "LOCK_TIMEOUT_SECONDS", 1)
    monkeypatch.setattr(connecting, "TRIES", 2)
    return 2 * 1 + 3  # and what a busy machine takes


@contextmanager
def given_up_within(seconds: float) -> Iterator[None]:
    # The database's own time limit, so that a wait without one is a failure and no hanging suite.
    watch(seconds)
    started = time.monotonic()
    try:
        with pytest.raises(LedgerUnavailable):
            yield
        assert time.monotonic() - started < seconds
    finally:
        connections["ledger"].close()


def watch(seconds: float) -> None:
    """Have the ledger's connection give up by itself, if nobody told it to give up earlier.

    What is set here ends with the connection.
    """
    with connections["ledger"].cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SELECT set_config('statement_timeout', %s, false)", [f"{seconds}s"])
        else:
            cursor.execute("SET SESSION innodb_lock_wait_timeout = %s", [int(seconds)])


@pytest.mark.usefixtures("second_alias")
def test_a_caller_who_holds_the_balances_is_told_and_does_not_hang(
    api: AnthropicSimulator, ledger_settings: dict[str, Any], impatient: float
) -> None:
    if "LEDGER_REDIS_URL" in ledger_settings:
        pytest.skip("its balances are in Redis, where nobody can lock them")
    ask()
    before = len(api.requests)

    with transaction.atomic():
        list(SpendWindow.objects.select_for_update())
        with given_up_within(impatient):
            ask()

    assert len(api.requests) == before
    assert_books_agree()
    ask()


@pytest.mark.usefixtures("second_alias")
def test_a_caller_who_has_just_made_the_budget_is_told_and_does_not_hang(
    api: AnthropicSimulator, impatient: float
) -> None:
    """The ledger does not see it, tries to make it, and would wait for the caller's commit."""
    with transaction.atomic():
        FeatureBudget.objects.create(name="chat", daily_limit_usd=0)
        with given_up_within(impatient):
            ask()

    assert api.requests == []
    assert_nothing_happened()


@pytest.mark.usefixtures("second_alias")
def test_a_change_that_is_not_yet_committed_holds_nobody_up_and_is_not_yet_in_force(
    api: AnthropicSimulator,
) -> None:
    budget = FeatureBudget.objects.create(name="chat")

    with transaction.atomic():
        budget.daily_limit_usd = 0
        budget.save()
        ask()
    with pytest.raises(BudgetExceeded):
        ask()


@pytest.mark.usefixtures("second_alias")
def test_a_caller_who_reads_the_books_in_a_snapshot_does_not_decide_by_it(
    api: AnthropicSimulator,
) -> None:
    """What an open transaction sees may be old; the ledger looks through its own connection."""
    api.default = LONG
    FeatureBudget.objects.create(name="chat", daily_limit_usd=to_usd(most()))
    with transaction.atomic():
        with connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert not CallLog.objects.exists()  # a snapshot is taken here
        ask()
        with pytest.raises(BudgetExceeded):
            ask()
