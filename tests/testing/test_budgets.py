"""What a site's own tests are given: budgets for a test, a clock to set, a local API."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, ClassVar
from zoneinfo import ZoneInfo

import pytest
from django.conf import settings as django_settings
from django.db import IntegrityError, transaction
from django.test import TestCase, TransactionTestCase

import ai_budget
from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.exceptions import BudgetExceeded
from ai_budget.guard.rules import read_rules
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, DowngradeRung, FeatureBudget
from ai_budget.testing import BudgetTestMixin, freeze, override_budget
from ai_budget.testing.simulator import AnthropicSimulator
from ai_budget.values import SITE, Charge
from tests.factories import DowngradeRungFactory, FeatureBudgetFactory

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
DOLLAR = 1_000_000_000


def row(name: str = "chat") -> dict[str, Any]:
    return dict(FeatureBudget.objects.values().get(name=name))


def ladder(name: str = "chat") -> Sequence[tuple[int, str]]:
    return list(DowngradeRung.objects.filter(budget__name=name).values_list("at_percent", "model"))


# A budget for a test -----------------------------------------------------------------------------


@pytest.mark.django_db
def test_a_budget_is_in_force_inside_the_block() -> None:
    with override_budget("chat", daily_limit_usd="0.5") as budget:
        found = read_rules(Charge(feature="chat"), at=NOON)

    assert found.feature.daily_limit == DOLLAR // 2
    assert (budget.name, budget.enabled) == ("chat", True)


@pytest.mark.django_db
def test_what_was_there_before_comes_back() -> None:
    FeatureBudgetFactory.create(
        name="chat",
        parent=FeatureBudgetFactory.create(name="support"),
        daily_limit_usd="0.000000001",
        model="claude-opus-5-5",
        enforce=False,
    )
    before = row()

    with override_budget(
        "chat", daily_limit_usd=5, monthly_limit_usd=9, enforce=True, enabled=False, parent=None
    ):
        assert row() != before

    assert row() == before


@pytest.mark.django_db
def test_what_a_test_does_not_say_stays() -> None:
    FeatureBudgetFactory.create(name="chat", monthly_limit_usd=9)

    with override_budget("chat", daily_limit_usd=5):
        assert row()["monthly_limit_usd"] == Decimal(9)


@pytest.mark.django_db
def test_what_was_there_before_comes_back_after_an_error() -> None:
    FeatureBudgetFactory.create(name="chat", daily_limit_usd=1)
    before = row()

    with pytest.raises(ZeroDivisionError), override_budget("chat", daily_limit_usd=5):
        raise ZeroDivisionError

    assert row() == before


@pytest.mark.django_db
def test_what_a_test_changed_itself_is_undone_too() -> None:
    FeatureBudgetFactory.create(name="chat", daily_limit_usd=1)
    before = row()

    with override_budget("chat"):
        FeatureBudget.objects.update(daily_limit_usd=7, owner_email="ada@example.com")

    assert row() == before


@pytest.mark.django_db
def test_overrides_nest() -> None:
    with override_budget("chat", daily_limit_usd=5, rungs=[(50, "claude-haiku-5-5")]):
        with override_budget("chat", daily_limit_usd=1, rungs=[]):
            assert (row()["daily_limit_usd"], ladder()) == (Decimal(1), [])
        assert (row()["daily_limit_usd"], ladder()) == (Decimal(5), [(50, "claude-haiku-5-5")])


@pytest.mark.django_db
@override_budget("chat", daily_limit_usd=5)
def test_it_is_a_decorator() -> None:
    assert row()["daily_limit_usd"] == Decimal(5)


@pytest.mark.django_db
@pytest.mark.parametrize("_round", [1, 2])
@override_budget("chat", rungs=[(50, "claude-haiku-5-5")])
def test_it_is_a_decorator_that_can_be_used_again(_round: int) -> None:
    assert ladder() == [(50, "claude-haiku-5-5")]


@pytest.mark.django_db
def test_a_feature_that_was_unknown_stays_without_limits_of_its_own() -> None:
    """Calls may have been booked to it."""
    with override_budget("chat", daily_limit_usd=5, enabled=False, rungs=[(50, "haiku")]):
        pass

    blank = FeatureBudget(pk=row()["id"], name="chat")
    assert row() == {
        field.attname: getattr(blank, field.attname) for field in blank._meta.concrete_fields
    }
    assert ladder() == []


@pytest.mark.django_db
@pytest.mark.parametrize("known", [True, False])
def test_the_site_has_a_budget_too(known: bool) -> None:
    if known:
        FeatureBudgetFactory.create(name=SITE, daily_limit_usd=3)
    before = read_rules(Charge(feature="chat"), at=NOON).site

    with override_budget(SITE, daily_limit_usd=1):
        during = read_rules(Charge(feature="chat"), at=NOON).site

    assert during.daily_limit == DOLLAR
    assert read_rules(Charge(feature="chat"), at=NOON).site == before


# With a ladder -----------------------------------------------------------------------------------

OTHERS = [(60, "claude-sonnet-5-5"), (90, "claude-haiku-5-5")]


@pytest.mark.django_db
def test_rungs_take_the_place_of_those_that_were_there() -> None:
    budget = FeatureBudgetFactory.create(name="chat")
    for percent, model in OTHERS:
        DowngradeRungFactory.create(budget=budget, at_percent=percent, model=model)

    with override_budget("chat", rungs=iter([(50, "claude-haiku-5-5")])):
        assert ladder() == [(50, "claude-haiku-5-5")]

    assert ladder() == OTHERS


@pytest.mark.django_db
def test_rungs_that_a_test_does_not_mention_stay() -> None:
    budget = FeatureBudgetFactory.create(name="chat")
    for percent, model in OTHERS:
        DowngradeRungFactory.create(budget=budget, at_percent=percent, model=model)

    with override_budget("chat", daily_limit_usd=5):
        assert ladder() == OTHERS

    assert ladder() == OTHERS


@pytest.mark.django_db
def test_a_rung_that_is_refused_leaves_all_as_it_was() -> None:
    FeatureBudgetFactory.create(name="chat", daily_limit_usd=1)
    before = row()

    # PostgreSQL and MariaDB let nothing else happen in a transaction that failed.
    with pytest.raises(IntegrityError), _restored_after_failing():
        pytest.fail("the block was entered")

    assert (row(), ladder()) == (before, [])


def _restored_after_failing() -> Any:
    return override_budget("chat", daily_limit_usd=5, rungs=[(50, "haiku"), (100, "haiku")])


# The clock ---------------------------------------------------------------------------------------


def test_the_clock_stands_still() -> None:
    with freeze(NOON):
        assert periods.now() == periods.now() == NOON


def test_the_clock_goes_on_afterwards() -> None:
    with freeze(NOON):
        pass

    assert not periods.is_overridden()


def test_a_moment_of_any_zone_is_told_in_utc() -> None:
    with freeze(datetime(2026, 5, 4, 14, tzinfo=ZoneInfo("Europe/Berlin"))):
        now = periods.now()

    assert (now, now.tzinfo) == (NOON, UTC)


def test_a_moment_without_a_zone_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="aware"),
        freeze(datetime(2026, 5, 4, 12)),  # noqa: DTZ001 - what is refused here
    ):
        pytest.fail("the block was entered")


@pytest.mark.django_db
def test_the_ledger_goes_by_the_frozen_clock() -> None:
    with freeze(NOON):
        assert ledgers.current().now() == NOON


# The mixin ---------------------------------------------------------------------------------------


class _Spending(BudgetTestMixin):
    """Tests that both kinds of test case run; each begins with nothing spent."""

    def test_a_call_goes_to_the_local_api(self) -> None:
        answer = ai_budget.ask("How tall is an oak?", feature="chat")

        assert answer.text
        assert len(self.anthropic_api.requests) == 1
        assert [call.cost_usd for call in CallLog.objects.all()] == [answer.cost]

    def test_the_local_api_is_empty_at_the_start_of_each(self) -> None:
        assert not self.anthropic_api.requests
        assert not CallLog.objects.exists()

        ai_budget.ask("How tall is an oak?", feature="chat")

    @override_budget("chat", daily_limit_usd=0)
    def test_a_refusal_reaches_no_api(self) -> None:
        with pytest.raises(BudgetExceeded):
            ai_budget.ask("How tall is an oak?", feature="chat")

        assert not self.anthropic_api.requests

    def test_the_ledger_writes_where_the_test_can_see(self) -> None:
        assert conf.LEDGER_DATABASE == "default"


class InATestCaseTests(_Spending, TestCase):
    """Inside the transaction of a TestCase."""

    shared: ClassVar[FeatureBudget]

    @classmethod
    def setUpTestData(cls) -> None:
        cls.shared = FeatureBudget.objects.create(name="shared")

    def test_the_callers_own_transaction_is_refused_as_ever(self) -> None:
        with transaction.atomic(), pytest.raises(ai_budget.CallInsideTransaction):
            ai_budget.ask("How tall is an oak?", feature="shared")


class InATransactionTestCaseTests(_Spending, TransactionTestCase):
    """Without any transaction around it."""


@pytest.mark.django_db
def test_the_mixin_puts_the_settings_back() -> None:
    class Case(BudgetTestMixin, TestCase):
        pass

    before = dict(django_settings.AI_BUDGET)
    Case.setUpClass()
    try:
        during, expected = dict(django_settings.AI_BUDGET), Case.anthropic_api.base_url
    finally:
        Case.tearDownClass()
        Case.doClassCleanups()

    assert during["BASE_URL"] == expected
    assert dict(django_settings.AI_BUDGET) == before


# The fixture -------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_the_fixture_is_an_api_to_call(anthropic_api: AnthropicSimulator) -> None:
    ai_budget.ask("How tall is an oak?", feature="chat")

    assert len(anthropic_api.requests) == 1


@pytest.mark.django_db
def test_the_fixture_is_empty_at_the_start(anthropic_api: AnthropicSimulator) -> None:
    assert not anthropic_api.requests
    assert django_settings.AI_BUDGET["BASE_URL"] == anthropic_api.base_url
