"""BudgetMiddleware: who pays for a request's calls, and what its reader sees of a refusal."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.http import (
    FileResponse,
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    StreamingHttpResponse,
)
from django.template.response import TemplateResponse
from django.test import AsyncClient, Client, RequestFactory
from django.urls import path
from django.utils import translation

import ai_budget
from ai_budget import periods
from ai_budget.exceptions import BudgetExceeded, QuotaExceeded, RateLimited, Refusal
from ai_budget.guard.charge import Payer, current_payer
from ai_budget.middleware import BudgetMiddleware, refused
from ai_budget.models import UserQuota
from ai_budget.testing import AnthropicSimulator, Reply, override_budget
from tests.guard.books import assert_balanced, in_db, only_row, rows

pytestmark = pytest.mark.django_db(transaction=True)

STORY = "Once upon a time there was a budget that held. " * 20
CHROME = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,"
    "*/*;q=0.8,application/signed-exchange;v=b3;q=0.7"
)
FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
BROWSERS = [CHROME, FIREFOX, "text/html"]
PROGRAMS = ["*/*", "application/json", "application/json, text/plain, */*", "", "text/csv"]


# Views


def ask(request: HttpRequest) -> HttpResponse:
    return HttpResponse(ai_budget.ask("Hello", feature="chat").text)


async def aask(request: HttpRequest) -> HttpResponse:
    return HttpResponse((await ai_budget.aask("Hello", feature="chat")).text)


def tell(request: HttpRequest) -> StreamingHttpResponse:
    def body() -> Iterator[str]:
        with ai_budget.stream("A story", feature="chat", max_tokens=4_000) as answer:
            yield from answer

    return StreamingHttpResponse(body())


async def atell(request: HttpRequest) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[str]:
        async with ai_budget.astream("A story", feature="chat", max_tokens=4_000) as answer:
            async for piece in answer:
                yield piece

    return StreamingHttpResponse(body())


async def atell_in_parts(request: HttpRequest) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[str]:
        with ai_budget.charge(feature="tales", tags={"part": "body"}):
            for _ in range(3):
                yield (await ai_budget.aask("A part")).text

    return StreamingHttpResponse(body())


def late(request: HttpRequest) -> TemplateResponse:
    class Answer:
        def __str__(self) -> str:
            return ai_budget.ask("Hello", feature="chat").text

    return TemplateResponse(request, "ai_budget/refused.html", {"message": Answer()})


def broken(request: HttpRequest) -> HttpResponse:
    raise LookupError("the view's own")


urlpatterns = [
    path("ask/", ask),
    path("aask/", aask),
    path("tell/", tell),
    path("atell/", atell),
    path("atell-in-parts/", atell_in_parts),
    path("late/", late),
    path("broken/", broken),
]


@pytest.fixture(autouse=True)
def urls(settings: Any) -> None:
    settings.ROOT_URLCONF = __name__


@pytest.fixture
def api(anthropic_api: AnthropicSimulator) -> AnthropicSimulator:
    return anthropic_api


@pytest.fixture
def user(db: None) -> Any:
    return get_user_model().objects.create_user("ada")


# Who pays


@pytest.mark.parametrize("path", ["/ask/", "/aask/", "/late/"])
def test_the_user_of_a_request_is_charged(
    api: AnthropicSimulator, client: Client, user: Any, path: str
) -> None:
    client.force_login(user)

    assert client.get(path).status_code == 200

    assert only_row().user_id == user.pk
    assert current_payer() == Payer()


@pytest.mark.parametrize("path", ["/ask/", "/aask/", "/late/"])
async def test_the_user_of_an_async_request_is_charged(
    api: AnthropicSimulator, async_client: AsyncClient, user: Any, path: str
) -> None:
    await async_client.aforce_login(user)

    assert (await async_client.get(path)).status_code == 200

    assert (await in_db(only_row)).user_id == user.pk
    assert current_payer() == Payer()


def test_a_visitor_is_nobody(api: AnthropicSimulator, client: Client) -> None:
    assert client.get("/ask/").status_code == 200

    assert only_row().user_id is None


def test_a_request_without_users_is_charged_to_nobody(api: AnthropicSimulator) -> None:
    BudgetMiddleware(ask)(RequestFactory().get("/"))

    assert only_row().user_id is None


@pytest.mark.parametrize("streamed", [False, True])
def test_a_user_whom_the_view_recognises_is_charged(
    api: AnthropicSimulator, user: Any, streamed: bool
) -> None:
    def view(request: HttpRequest) -> HttpResponseBase:
        request.user = user  # as an API that takes tokens does
        return tell(request) if streamed else ask(request)

    response: Any = BudgetMiddleware(view)(RequestFactory().get("/"))
    b"".join(response)

    assert only_row().user_id == user.pk


def test_one_request_is_not_charged_to_the_user_of_the_last(
    api: AnthropicSimulator, client: Client, user: Any
) -> None:
    client.force_login(user)
    client.get("/ask/")
    Client().get("/ask/")

    assert [row.user_id for row in rows()] == [user.pk, None]


def test_a_streamed_body_is_charged_to_its_request(
    api: AnthropicSimulator, client: Client, user: Any
) -> None:
    api.enqueue(Reply(text=STORY))
    client.force_login(user)

    response: Any = client.get("/tell/")
    assert rows() == []  # nothing yet: the body runs as it is read
    assert b"".join(response).decode() == STORY

    row = only_row()
    assert (row.user_id, row.status) == (user.pk, "settled")
    assert_balanced()


async def test_an_async_streamed_body_is_charged_to_its_request(
    api: AnthropicSimulator, async_client: AsyncClient, user: Any
) -> None:
    api.enqueue(Reply(text=STORY))
    await async_client.aforce_login(user)

    response: Any = await async_client.get("/atell/")
    body = b"".join([piece async for piece in response])

    assert body.decode() == STORY
    row = await in_db(only_row)
    assert (row.user_id, row.status) == (user.pk, "settled")
    await in_db(assert_balanced)


async def test_a_sync_body_under_an_async_server_is_charged_too(
    api: AnthropicSimulator, async_client: AsyncClient, user: Any
) -> None:
    api.enqueue(Reply(text=STORY))
    await async_client.aforce_login(user)

    response: Any = await async_client.get("/tell/")
    body = b"".join(await in_db(list, response))

    assert body.decode() == STORY
    assert (await in_db(only_row)).user_id == user.pk


async def test_a_charge_in_an_async_body_lasts_from_piece_to_piece(
    api: AnthropicSimulator, async_client: AsyncClient, user: Any
) -> None:
    await async_client.aforce_login(user)

    response: Any = await async_client.get("/atell-in-parts/")
    async for _ in response:
        assert current_payer() == Payer()

    journal = await in_db(rows)
    assert [(row.feature_id, row.user_id) for row in journal] == [("tales", user.pk)] * 3
    assert [row.tags for row in journal] == [{"part": "body"}] * 3


def test_a_reader_who_leaves_closes_the_stream(
    api: AnthropicSimulator, client: Client, user: Any
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))
    client.force_login(user)

    response: Any = client.get("/tell/")
    assert next(iter(response.streaming_content))
    assert current_payer() == Payer()
    response.close()

    api.wait_until_idle()
    row = only_row()
    assert (row.user_id, row.status, row.error) == (user.pk, "estimated", "closed early")
    assert_balanced()


async def test_an_async_reader_who_leaves_closes_the_stream(
    api: AnthropicSimulator, async_client: AsyncClient, user: Any
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))
    await async_client.aforce_login(user)

    response: Any = await async_client.get("/atell/")
    body = response._iterator
    assert await anext(body)
    assert current_payer() == Payer()
    await body.aclose()

    for _ in range(1_000):
        if (await in_db(only_row)).status != "reserved":
            break
        await in_db(rows)
    assert (await in_db(only_row)).status == "estimated"


def test_a_body_that_is_never_read_makes_no_calls(api: AnthropicSimulator, client: Client) -> None:
    response = client.get("/tell/")
    response.close()

    assert rows() == []


def test_what_a_body_leaves_behind_stays_with_it() -> None:
    def body() -> Generator[str | None, None, None]:
        with ai_budget.charge(feature="tales"):
            yield current_payer().feature
            yield current_payer().feature

    def view(request: HttpRequest) -> HttpResponseBase:
        return StreamingHttpResponse(body())

    response: Any = BudgetMiddleware(view)(RequestFactory().get("/"))
    seen = []
    for piece in response:
        seen.append(piece)
        assert current_payer() == Payer()

    assert seen == [b"tales", b"tales"]


async def test_an_async_body_that_fails_leaves_nothing_behind() -> None:
    async def body() -> AsyncGenerator[str, None]:
        with ai_budget.charge(feature="tales"):
            yield "one"
            raise LookupError

    async def view(request: HttpRequest) -> HttpResponseBase:
        return StreamingHttpResponse(body())

    answer: Any = BudgetMiddleware(view)(RequestFactory().get("/"))
    response = await answer
    read = aiter(response)
    assert await anext(read) == b"one"
    with pytest.raises(LookupError):
        await anext(read)
    assert current_payer() == Payer()


def test_a_file_is_left_for_the_server_to_send() -> None:
    with tempfile.TemporaryFile() as file:

        def view(request: HttpRequest) -> HttpResponseBase:
            return FileResponse(file)

        response: Any = BudgetMiddleware(view)(RequestFactory().get("/"))

        assert response.file_to_stream is file


# What a reader sees


def request_from(accept: str) -> HttpRequest:
    headers = {"accept": accept} if accept else {}
    return RequestFactory().get("/", headers=headers)


def refusal(**changes: Any) -> Refusal:
    facts: dict[str, Any] = {
        "scope": "feature:chat",
        "period": "day",
        "measure": "nanousd",
        "limit": 7_654_321_000_000,
        "spent": 6_543_210_000_000,
        "held": 98_765_000_000,
        "requested": 1_234_567_000_000,
        "exhausted": True,
        # Whole minutes: digits of a second are no figure of the site.
        "resets_at": (periods.now() + timedelta(hours=5)).replace(second=0, microsecond=0),
        "retry_after": 18_000,
    }
    return Refusal(**(facts | changes))


SITE_FIGURES = ("7654", "7,654", "6543", "6,543", "98.7", "1234", "1,234", "feature:chat")


@pytest.mark.parametrize("accept", PROGRAMS)
def test_a_program_gets_json(accept: str) -> None:
    response = refused(request_from(accept), BudgetExceeded(refusal()))

    assert response is not None
    assert response.status_code == 429
    assert response["Content-Type"] == "application/json"
    assert response["Retry-After"] == "18000"
    error = json.loads(response.content)["error"]
    assert error["type"] == "budget_exceeded"
    assert (error["exhausted"], error["retry_after"]) == (True, 18_000)
    assert error["message"]
    assert error["resets_at"].startswith("20")


@pytest.mark.parametrize("accept", BROWSERS)
def test_a_browser_gets_a_page(accept: str) -> None:
    response = refused(request_from(accept), BudgetExceeded(refusal()))

    assert response is not None
    assert response.status_code == 429
    assert response["Content-Type"].startswith("text/html")
    assert response["Retry-After"] == "18000"
    page = response.content.decode()
    assert "This feature has reached its limit for now." in page
    assert "It opens again on" in page


@pytest.mark.parametrize("accept", ["*/*", CHROME])
def test_a_refusal_is_kept_by_no_cache(accept: str) -> None:
    response = refused(request_from(accept), BudgetExceeded(refusal()))

    assert response is not None
    assert response["Cache-Control"] == "no-store"
    assert "Accept" in response["Vary"]


@pytest.mark.parametrize("accept", ["*/*", CHROME])
@pytest.mark.parametrize("exhausted", [True, False])
def test_what_the_site_spends_is_not_for_visitors(accept: str, exhausted: bool) -> None:
    response = refused(request_from(accept), BudgetExceeded(refusal(exhausted=exhausted)))

    assert response is not None
    shown = response.content.decode()
    assert not [figure for figure in SITE_FIGURES if figure in shown]


def test_a_user_sees_the_own_quota() -> None:
    error = QuotaExceeded(refusal(scope="user:7", measure="calls", limit=20, spent=20, held=0))

    page = refused(request_from(CHROME), error)
    data = refused(request_from("*/*"), error)

    assert page is not None
    assert "You have made 20 of 20 requests." in page.content.decode()
    assert data is not None
    details = json.loads(data.content)["error"]
    assert (details["type"], details["measure"]) == ("quota_exceeded", "calls")
    assert (details["limit"], details["spent"], details["held"]) == (20, 20, 0)


def test_a_limit_that_is_only_held_asks_for_patience() -> None:
    response = refused(
        request_from(CHROME), BudgetExceeded(refusal(exhausted=False, retry_after=2))
    )

    assert response is not None
    assert response["Retry-After"] == "2"
    assert "try again shortly" in response.content.decode()
    assert "It opens again on" not in response.content.decode()


def rate(scope: str, *, seconds: int = 3, never: bool = False) -> RateLimited:
    return RateLimited(
        refusal(
            scope=scope,
            period="minute",
            measure="requests",
            limit=123_456,
            spent=123_455,
            held=0,
            retry_after=seconds,
            delay=None if never else seconds - 0.5,
        )
    )


@pytest.mark.parametrize(("seconds", "wait"), [(1, "in 1 second."), (3, "in 3 seconds.")])
@pytest.mark.parametrize("accept", ["*/*", CHROME])
def test_who_is_too_fast_reads_how_long_to_wait(seconds: int, wait: str, accept: str) -> None:
    response = refused(request_from(accept), rate("feature:chat", seconds=seconds))

    assert response is not None
    assert response.status_code == 429
    assert response["Retry-After"] == str(seconds)
    shown = response.content.decode()
    assert f"Too many requests. Please try again {wait}" in shown
    assert "It opens again on" not in shown


def test_a_rate_that_never_lets_a_call_pass_names_no_time() -> None:
    response = refused(request_from("*/*"), rate("feature:chat", never=True))

    assert response is not None
    assert "try again" not in json.loads(response.content)["error"]["message"]


@pytest.mark.parametrize("scope", ["user:7", "subject:acme,feature:chat", "view:chat:20:user:7"])
def test_a_caller_sees_the_numbers_of_the_own_rate(scope: str) -> None:
    response = refused(request_from("*/*"), rate(scope))

    assert response is not None
    details = json.loads(response.content)["error"]
    assert (details["type"], details["measure"]) == ("rate_limited", "requests")
    assert (details["limit"], details["spent"]) == (123_456, 123_455)
    assert scope not in response.content.decode()


@pytest.mark.parametrize("scope", ["*", "feature:chat", "category:assistants"])
@pytest.mark.parametrize("accept", ["*/*", CHROME])
def test_how_much_others_ask_is_not_for_visitors(scope: str, accept: str) -> None:
    response = refused(request_from(accept), rate(scope))

    assert response is not None
    shown = response.content.decode()
    assert not [figure for figure in ("123456", "123,456", "123455") if figure in shown]


def test_the_page_has_no_inline_script_or_style() -> None:
    error = QuotaExceeded(refusal(scope="user:7", measure="calls", limit=20, spent=20))
    response = refused(request_from(CHROME), error)

    assert response is not None
    page = response.content.decode().lower()
    assert "<script" not in page
    assert "<style" not in page
    assert "style=" not in page
    assert " on" not in page.partition("<body>")[2].replace(" on ", " ")
    assert '<link rel="stylesheet" href="/static/ai_budget/refused.css">' in page


def test_the_page_speaks_the_readers_language_as_far_as_it_is_known() -> None:
    with translation.override("de"):
        response = refused(request_from(CHROME), BudgetExceeded(refusal()))

    assert response is not None
    assert '<html lang="de">' in response.content.decode()


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (RateLimited(refusal(retry_after=3)), 429, "rate_limited", "3"),
        (ai_budget.FeatureDisabled("paused"), 503, "feature_disabled", None),
        (ai_budget.LedgerUnavailable("away"), 503, "unavailable", "30"),
    ],
)
def test_each_refusal_has_its_status(
    error: ai_budget.AIBudgetError, status: int, kind: str, retry_after: str | None
) -> None:
    response = refused(request_from("*/*"), error)

    assert response is not None
    assert response.status_code == status
    assert response.get("Retry-After") == retry_after
    assert json.loads(response.content)["error"]["type"] == kind
    page = refused(request_from(CHROME), error)
    assert page is not None
    assert page.status_code == status


def test_a_refusal_of_the_projects_own_is_what_it_derives_from() -> None:
    class TrialIsOver(QuotaExceeded):
        pass

    response = refused(request_from("*/*"), TrialIsOver(refusal(scope="user:7")))

    assert response is not None
    assert json.loads(response.content)["error"]["type"] == "quota_exceeded"


@pytest.mark.parametrize(
    "error",
    [
        ai_budget.UnpricedModel("model"),
        ai_budget.UnboundedCall("call"),
        ai_budget.UnpricedEndpoint("endpoint"),
        ai_budget.CallInsideTransaction("transaction"),
    ],
)
def test_mistakes_of_the_code_are_no_refusals(error: ai_budget.AIBudgetError) -> None:
    assert refused(request_from("*/*"), error) is None


# Through a whole request


@pytest.mark.parametrize("path", ["/ask/", "/aask/", "/late/"])
@pytest.mark.parametrize(("accept", "kind"), [("*/*", "application/json"), (CHROME, "text/html")])
def test_a_refused_view_answers_429(
    api: AnthropicSimulator, client: Client, path: str, accept: str, kind: str
) -> None:
    with override_budget("chat", daily_limit_usd=Decimal(0)):
        response = client.get(path, headers={"accept": accept})

    assert response.status_code == 429
    assert response["Content-Type"].startswith(kind)
    assert 0 < int(response["Retry-After"]) <= 25 * 3600
    assert api.requests == []


@pytest.mark.parametrize("path", ["/ask/", "/aask/"])
async def test_a_refused_async_view_answers_429(
    api: AnthropicSimulator, async_client: AsyncClient, user: Any, path: str
) -> None:
    await UserQuota.objects.acreate(daily_calls=0)
    await async_client.aforce_login(user)

    response = await async_client.get(path, headers={"accept": "application/json"})

    assert response.status_code == 429
    assert response.json()["error"]["type"] == "quota_exceeded"


def test_a_paused_feature_answers_503(api: AnthropicSimulator, client: Client) -> None:
    with override_budget("chat", enabled=False):
        response = client.get("/ask/")

    assert response.status_code == 503
    assert response.json()["error"]["type"] == "feature_disabled"


@pytest.mark.parametrize("path", ["/broken/"])
def test_other_errors_are_left_alone(client: Client, path: str) -> None:
    with pytest.raises(LookupError, match="the view's own"):
        client.get(path)


def test_a_refusal_that_a_view_answers_itself_is_its_own(
    api: AnthropicSimulator, client: Client
) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        try:
            return ask(request)
        except ai_budget.BudgetExceeded:
            return HttpResponse("closed", status=200)

    with override_budget("chat", daily_limit_usd=0):
        response: Any = BudgetMiddleware(view)(RequestFactory().get("/"))

    assert response.content == b"closed"
