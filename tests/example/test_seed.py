"""The seeded month keeps the promises of the real thing, to the nano-dollar."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, date, datetime
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db import connection
from django.test import TestCase
from django.test.utils import CaptureQueriesContext

import ai_budget
from ai_budget import money, periods
from ai_budget.conf import conf
from ai_budget.models import CallLog, FeatureBudget, SpendWindow, UserQuota
from ai_budget.periods import Period
from ai_budget.values import SITE, BalanceKey
from example_project.desk.seed import seed
from example_project.desk.seed.budgets import CHAT, READER_DAILY_USD
from example_project.desk.seed.people import Person
from example_project.desk.seed.traffic import simulate
from tests.depth import some_of

NOW = datetime(2026, 11, 22, 15, 30, tzinfo=UTC)


class SeededMonthTests(TestCase):
    """What is there once the month is seeded; nothing here changes it."""

    queries: int

    @classmethod
    def setUpTestData(cls) -> None:
        with CaptureQueriesContext(connection) as captured:
            assert seed(now=NOW) is True
        cls.queries = len(captured)

    def test_it_takes_few_queries(self) -> None:
        assert self.queries < 600

    def test_a_second_seed_changes_nothing(self) -> None:
        FeatureBudget.objects.filter(name="chat").update(daily_limit_usd="7")
        before = _everything()

        assert seed(now=NOW) is False

        assert _everything() == before

    def test_every_row_costs_exactly_the_price_of_its_tokens(self) -> None:
        rows = CallLog.objects.exclude(status=CallLog.Status.RESERVED)

        wrong = [
            row.pk
            for row in rows
            if row.cost_nanousd != ai_budget.price(row.model, _usage(row), at=row.reserved_at)
        ]
        assert wrong == []
        assert rows.count() > 3_000

    def test_every_balance_is_the_sum_of_its_rows(self) -> None:
        balances = {
            (window.scope, window.period, window.first_day): (
                window.spent_nanousd,
                window.held_nanousd,
                window.calls,
            )
            for window in SpendWindow.objects.all()
            # A refusal alone leaves a balance without rows.
            if window.calls or window.spent_nanousd or window.held_nanousd
        }

        assert balances == _sums_of_rows()

    def test_it_shows_everything_that_can_happen(self) -> None:
        statuses = Counter(CallLog.objects.values_list("status", flat=True))
        assert set(statuses) == set(CallLog.Status.values)
        assert statuses[CallLog.Status.SETTLED] > sum(statuses.values()) * 0.8
        assert statuses[CallLog.Status.RESERVED] == 1
        assert CallLog.objects.filter(attempt=1, counted=0).exists()
        assert any(row.downgraded for row in CallLog.objects.exclude(decision=""))
        assert SpendWindow.objects.filter(scope__startswith="feature:", refused__gt=0).exists()
        assert SpendWindow.objects.filter(scope__startswith="user:", refused__gt=0).exists()
        assert CallLog.objects.values("feature").distinct().count() == 3
        assert CallLog.objects.values("user").distinct().count() == 40
        assert CallLog.objects.values("model").distinct().count() >= 4

    def test_few_people_make_most_of_the_calls(self) -> None:
        counts = sorted(
            Counter(CallLog.objects.values_list("user", flat=True)).values(), reverse=True
        )

        assert sum(counts[:8]) > sum(counts[8:])

    def test_the_one_reservation_is_in_flight_not_forgotten(self) -> None:
        row = CallLog.objects.get(status=CallLog.Status.RESERVED)

        assert row.reserved_at < NOW < row.deadline
        assert row.reserved_nanousd > 0

    def test_nothing_is_in_the_future_and_every_budget_is_kept(self) -> None:
        assert not CallLog.objects.filter(reserved_at__gt=NOW).exists()
        for budget in FeatureBudget.objects.all():
            scope = SITE if budget.name == SITE else f"feature:{budget.name}"
            for limit, period in (
                (budget.daily_limit_usd, "day"),
                (budget.monthly_limit_usd, "month"),
            ):
                assert limit is not None or budget.children.exists()
                windows = SpendWindow.objects.filter(scope=scope, period=period)
                assert all(limit is None or window.spent_usd <= limit for window in windows)

    def test_only_the_accounts_of_the_demo_can_sign_in(self) -> None:
        able = [user for user in get_user_model().objects.all() if user.has_usable_password()]

        assert {user.get_username() for user in able} == {"admin", "ada", "grace"}
        assert all(user.check_password(user.get_username()) for user in able)
        assert [user.get_username() for user in able if user.is_superuser] == ["admin"]

    def test_limits_of_the_site_are_those_of_the_settings(self) -> None:
        site = FeatureBudget.objects.get(name=SITE)

        assert site.daily_limit_usd == money.to_usd(money.parse_usd(conf.DAILY_LIMIT_USD or 0))
        assert site.monthly_limit_usd == money.to_usd(money.parse_usd(conf.MONTHLY_LIMIT_USD or 0))
        assert UserQuota.objects.count() == 2


@pytest.mark.django_db
def test_the_same_moment_gives_the_same_month() -> None:
    one, other = simulate(_people(), now=NOW), simulate(_people(), now=NOW)

    assert [_row(call) for call in one.calls] == [_row(call) for call in other.calls]


@pytest.mark.django_db
@pytest.mark.parametrize(
    "now",
    some_of(
        [
            datetime(2026, 12, 1, 0, 0, 1, tzinfo=UTC),
            datetime(2026, 12, 1, 12, 0, tzinfo=UTC),
            datetime(2027, 1, 31, 23, 59, tzinfo=UTC),
            datetime(2027, 2, 28, 18, 0, tzinfo=UTC),
            datetime(2027, 3, 9, 11, 0, tzinfo=UTC),
            datetime(2028, 2, 29, 9, 0, tzinfo=UTC),
        ]
    ),
    ids=str,
)
def test_there_is_room_for_another_call_on_any_day(now: datetime) -> None:
    month = simulate(_people(), now=now)

    today = periods.day(now, conf.TIME_ZONE).first_day
    first = today.replace(day=1)

    def left(scope: str, period: Period, day: date, limit: str) -> int:
        return money.parse_usd(limit) - month.books.taken(BalanceKey(scope, period, day))

    enough = money.parse_usd("0.05")
    assert left("feature:chat", Period.DAY, today, CHAT.daily_usd) > enough
    assert left("feature:chat", Period.MONTH, first, CHAT.monthly_usd) > enough
    assert left(SITE, Period.DAY, today, "5") > enough
    assert left(SITE, Period.MONTH, first, "60") > enough
    # The third of the people is ada, whom the demo's call is booked to.
    assert left("user:3", Period.DAY, today, str(READER_DAILY_USD)) > enough


def _people() -> list[Person]:
    return [Person(user_id=rank, plan="free", weight=1 / (rank + 1.5)) for rank in range(1, 41)]


def _usage(row: CallLog) -> ai_budget.Usage:
    return ai_budget.Usage(
        input_tokens=row.input_tokens,
        cache_write_5m_tokens=row.cache_write_5m_tokens,
        cache_write_1h_tokens=row.cache_write_1h_tokens,
        cache_read_tokens=row.cache_read_tokens,
        output_tokens=row.output_tokens,
        web_searches=row.web_searches,
        service_tier=row.service_tier,
        speed=row.speed,
        inference_geo=row.inference_geo,
    )


def _sums_of_rows() -> dict[tuple[str, str, date], tuple[int, int, int]]:
    """Add up the rows by the definition of a balance, with no help of the package's."""
    sums: dict[tuple[str, str, date], list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in CallLog.objects.all():
        day = row.reserved_at.astimezone(conf.TIME_ZONE).date()
        assert row.day == day
        scopes = ["*", f"feature:{row.feature_id}"]
        scopes += [f"user:{row.user_id}", f"user:{row.user_id},feature:{row.feature_id}"]
        if row.category:
            scopes.append(f"category:{row.category}")
        for scope in scopes:
            for period, first in (("day", day), ("month", day.replace(day=1))):
                total = sums[scope, period, first]
                total[0] += row.cost_nanousd or 0
                total[1] += row.reserved_nanousd if row.status == "reserved" else 0
                total[2] += row.counted if row.status != "released" else 0
    return {key: (total[0], total[1], total[2]) for key, total in sums.items() if any(total)}


def _everything() -> list[Any]:
    models = (CallLog, SpendWindow, FeatureBudget, UserQuota, get_user_model())
    return [list(model.objects.order_by("pk").values()) for model in models]


def _row(call: CallLog) -> dict[str, Any]:
    return {field.attname: getattr(call, field.attname) for field in call._meta.concrete_fields}
