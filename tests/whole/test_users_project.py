"""The tests of a project that uses ai_budget: what they spend is gone when they are over."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest.mock import ANY

import pytest
from django.contrib.auth import get_user_model
from django.db import connection, connections, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.test import Client, TestCase, TransactionTestCase, override_settings
from django.urls import path
from pytest_django import DjangoDbBlocker

import ai_budget
from ai_budget.conf import conf
from ai_budget.exceptions import BudgetExceeded, QuotaExceeded
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.database import DatabaseLedger
from ai_budget.models import CallLog, FeatureBudget, SpendWindow, UserQuota
from ai_budget.testing import AnthropicSimulator, BudgetTestMixin, Reply, override_budget

pytestmark = pytest.mark.urls(__name__)

SIMULATED = {"API_KEY": "key", "BASE_URL": "http://127.0.0.1:9"}
ON_REDIS: dict[str, Any] = {
    **SIMULATED,
    "LEDGER": "ai_budget.ledger.redis.RedisLedger",
    "LEDGER_REDIS_URL": "redis://127.0.0.1:9/0",  # where nothing listens
}
SECOND_ALIAS: dict[str, Any] = {**SIMULATED, "LEDGER_DATABASE": "ledger"}


@pytest.fixture(scope="module", autouse=True)
def emptied_row_by_row() -> None:
    """Not here: a project's tests are emptied as Django does it."""


# The project -------------------------------------------------------------------------------------


def answer(request: HttpRequest) -> HttpResponse:
    found = ai_budget.ask("Hello", feature="chat")
    return JsonResponse({"text": found.text})


async def answer_async(request: HttpRequest) -> HttpResponse:
    found = await ai_budget.aask("Hello", feature="chat")
    return JsonResponse({"text": found.text})


def answer_later(request: HttpRequest) -> HttpResponse:
    transaction.on_commit(lambda: ai_budget.ask("Hello", feature="chat"))
    return HttpResponse()


urlpatterns = [
    path("answer/", answer),
    path("answer-async/", answer_async),
    path("answer-later/", answer_later),
]


def ask(**options: Any) -> ai_budget.Answer:
    return ai_budget.ask("Hello", feature="chat", **options)


class _Tests(BudgetTestMixin):
    """Each spends, and insists on a world in which nobody has: whatever their order."""

    def setUp(self) -> None:
        super().setUp()
        assert not CallLog.objects.exists()
        assert not SpendWindow.objects.exists()
        assert not FeatureBudget.objects.exists()
        assert self.anthropic_api.requests == []

    @override_budget("chat", daily_limit_usd=1)
    def test_a_call(self) -> None:
        answer = ask()

        assert [row.cost_usd for row in CallLog.objects.all()] == [answer.cost]

    def test_another_call(self) -> None:
        ask()

    def test_a_view(self) -> None:
        self.anthropic_api.enqueue(Reply(text="Four."))

        response = Client().get("/answer/")

        assert response.json() == {"text": "Four."}

    def test_a_view_whose_budget_is_used_up(self) -> None:
        with override_budget("chat", daily_limit_usd=0):
            response = Client().get("/answer/")

        assert response.status_code == 429
        assert self.anthropic_api.requests == []

    async def test_an_async_call(self) -> None:
        answer = await ai_budget.aask("Hello", feature="chat")

        row = await CallLog.objects.aget()
        assert row.cost_usd == answer.cost

    async def test_an_async_view(self) -> None:
        response: Any = await self.async_client.get("/answer-async/")

        assert response.status_code == 200
        assert await CallLog.objects.acount() == 1

    def test_an_async_view_asked_by_the_plain_client(self) -> None:
        assert Client().get("/answer-async/").status_code == 200
        assert CallLog.objects.count() == 1


class _WithData(BudgetTestMixin):
    """A class whose rows are there for all its tests."""

    user: ClassVar[Any]

    @classmethod
    def setUpTestData(cls) -> None:
        cls.user = get_user_model().objects.create_user("ada")
        UserQuota.objects.create(user=cls.user, daily_calls=1)

    def test_the_quota_of_the_class_is_in_force(self) -> None:
        ask(user=self.user)
        with pytest.raises(QuotaExceeded):
            ask(user=self.user)

    def test_and_not_used_up_by_the_test_before(self) -> None:
        self.test_the_quota_of_the_class_is_in_force()

    def test_a_view_charges_who_is_signed_in(self) -> None:
        self.client.force_login(self.user)

        statuses = [self.client.get("/answer/").status_code for _ in range(2)]

        assert statuses == [200, 429]
        assert CallLog.objects.get().user_id == self.user.pk


class _WithCallsOfTheClass(BudgetTestMixin):
    """A class that spends before its first test."""

    @classmethod
    def setUpTestData(cls) -> None:
        FeatureBudget.objects.create(name="chat", daily_limit_usd=1)
        ask()

    def test_each_test_finds_what_the_class_spent(self) -> None:
        assert CallLog.objects.count() == 1
        ask()

    def test_and_only_that(self) -> None:
        self.test_each_test_finds_what_the_class_spent()


class _WithCommits(BudgetTestMixin):
    """A TestCase commits nothing, and runs what waits for a commit when it is told to."""

    def test_what_is_left_for_the_commit_is_called(self) -> None:
        with TestCase.captureOnCommitCallbacks(execute=True):
            self.client.get("/answer-later/")

        assert CallLog.objects.count() == 1

    def test_a_call_in_a_transaction_is_refused_as_in_production(self) -> None:
        with transaction.atomic(), pytest.raises(ai_budget.CallInsideTransaction):
            ask()


def case(*bases: type, **attributes: Any) -> type[unittest.TestCase]:
    """Make a class of tests that pytest does not find by itself."""
    return type("Case", bases, attributes)


Run = Callable[[type[unittest.TestCase]], int]


@pytest.fixture
def run(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> Run:
    """Run a class as Django's own runner does, and insist that it leaves nothing behind."""

    def run(tests: type[unittest.TestCase]) -> int:
        result = unittest.TestResult()
        with django_db_blocker.unblock():
            unittest.defaultTestLoader.loadTestsFromTestCase(tests).run(result)
            left = [CallLog.objects.count(), SpendWindow.objects.count()]
            left += [FeatureBudget.objects.count(), get_user_model().objects.count()]
        trouble = [text for _, text in [*result.failures, *result.errors]]
        assert not trouble, "\n".join(trouble)
        assert left == [0, 0, 0, 0]
        return result.testsRun

    return run


kinds = pytest.mark.parametrize("kind", [TestCase, TransactionTestCase])


# With the mixin ----------------------------------------------------------------------------------


@kinds
def test_tests_do_not_see_what_each_other_spent(run: Run, kind: type) -> None:
    assert run(case(_Tests, kind)) == 7


def test_rows_of_the_class_are_there_for_each_test(run: Run) -> None:
    assert run(case(_WithData, TestCase)) == 3


def test_calls_of_the_class_go_to_the_local_api(run: Run) -> None:
    assert run(case(_WithCallsOfTheClass, TestCase)) == 2


def test_what_waits_for_the_commit_can_be_run(run: Run) -> None:
    assert run(case(_WithCommits, TestCase)) == 2


@kinds
def test_a_project_on_redis_is_tested_without_one(run: Run, kind: type) -> None:
    with override_settings(AI_BUDGET=ON_REDIS):
        assert run(case(_Tests, kind)) == 7


@kinds
def test_settings_of_one_class_keep_its_calls_local(run: Run, kind: type) -> None:
    class Frugal(BudgetTestMixin):
        def test_its_own_settings_are_in_force(self) -> None:
            assert conf.DEFAULT_MAX_TOKENS == 7
            assert ask().message.usage.output_tokens <= 7

    frugal = override_settings(AI_BUDGET={**SIMULATED, "DEFAULT_MAX_TOKENS": 7})

    assert run(frugal(case(Frugal, kind))) == 1


class _SomeKeys(BudgetTestMixin):
    @override_settings(AI_BUDGET={"API_KEY": "key", "DEFAULT_MAX_TOKENS": 7})
    def test_a_call(self) -> None:
        ask()
        assert [request.body for request in self.anthropic_api.requests if request.body] == [
            {"model": conf.DEFAULT_MODEL, "max_tokens": 7, "messages": ANY}
        ]


@kinds
def test_a_test_that_sets_a_few_keys_does_not_call_out(run: Run, kind: type) -> None:
    assert run(case(_SomeKeys, kind)) == 1


@pytest.mark.django_db
def test_a_test_that_sets_a_few_keys_does_not_call_out_with_the_fixture(
    anthropic_api: AnthropicSimulator, settings: Any
) -> None:
    settings.AI_BUDGET = {"API_KEY": "key"}

    ask()

    assert len(anthropic_api.requests) == 1


def test_outside_of_tests_the_address_has_no_other_default() -> None:
    with override_settings(AI_BUDGET={}):
        assert conf.BASE_URL is None


# A project whose requests are transactions -------------------------------------------------------


@pytest.fixture
def atomic_requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ATOMIC_REQUESTS, with the second alias that it needs."""
    default = connections.settings["default"]
    mirror = {**default["TEST"], "MIRROR": "default"}
    connections.settings["ledger"] = {**default, "TEST": mirror}
    monkeypatch.setitem(default, "ATOMIC_REQUESTS", True)
    yield
    connections["ledger"].close()
    del connections["ledger"]
    del connections.settings["ledger"]


class _AtomicViews(BudgetTestMixin):
    """What works in production has to work in the project's tests."""

    def test_a_view(self) -> None:
        assert Client().get("/answer/").status_code == 200
        assert CallLog.objects.count() == 1

    def test_another_view(self) -> None:
        self.test_a_view()


@pytest.mark.usefixtures("atomic_requests")
@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has no second alias")
@kinds
def test_views_of_a_project_with_atomic_requests_can_be_tested(run: Run, kind: type) -> None:
    with override_settings(AI_BUDGET=SECOND_ALIAS):
        assert run(case(_AtomicViews, kind)) == 2


@pytest.mark.usefixtures("atomic_requests")
def test_without_its_alias_the_tests_of_such_a_project_tell(run: Run) -> None:
    class Views(BudgetTestMixin):
        def test_a_view(self) -> None:
            with pytest.raises(ai_budget.CallInsideTransaction):
                Client().get("/answer/")

    assert run(case(Views, TestCase)) == 1


# With pytest -------------------------------------------------------------------------------------


@pytest.fixture
def project_on_redis(settings: Any) -> None:
    settings.AI_BUDGET = ON_REDIS


@pytest.mark.django_db
@pytest.mark.parametrize("time", [1, 2])
def test_the_fixture_gives_each_test_a_world_without_calls(
    anthropic_api: AnthropicSimulator, time: int
) -> None:
    assert not CallLog.objects.exists()

    with override_budget("chat", daily_limit_usd=1):
        assert Client().get("/answer/").status_code == 200

    assert len(anthropic_api.requests) == CallLog.objects.count() == 1


@pytest.mark.django_db
@pytest.mark.parametrize("time", [1, 2])
def test_what_one_test_spent_does_not_refuse_the_next(
    anthropic_api: AnthropicSimulator, time: int
) -> None:
    anthropic_api.default = Reply(output_tokens=100)
    most = ai_budget.estimate("Hello", feature="chat", max_tokens=100).most
    with override_budget("chat", daily_limit_usd=most):
        ask(max_tokens=100)
        with pytest.raises(BudgetExceeded):
            ask(max_tokens=100)


@pytest.mark.django_db
def test_a_project_on_redis_is_tested_with_the_fixture_without_one(
    project_on_redis: None, anthropic_api: AnthropicSimulator
) -> None:
    ask()

    assert isinstance(ledgers.current(), DatabaseLedger)
    assert CallLog.objects.count() == 1


@pytest.fixture
def project_with_second_alias(atomic_requests: None, settings: Any) -> None:
    settings.AI_BUDGET = SECOND_ALIAS


@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has no second alias")
@pytest.mark.django_db
@pytest.mark.parametrize("time", [1, 2])
def test_a_view_under_atomic_requests_can_be_tested_with_the_fixture(
    project_with_second_alias: None, anthropic_api: AnthropicSimulator, time: int
) -> None:
    assert Client().get("/answer/").status_code == 200
    assert CallLog.objects.count() == 1


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("time", [1, 2])
async def test_an_async_test_with_the_fixture(anthropic_api: AnthropicSimulator, time: int) -> None:
    assert not await CallLog.objects.aexists()

    await ai_budget.aask("Hello", feature="chat")

    assert await CallLog.objects.acount() == 1
