"""What a purge leaves of the journal: balances that can be filled, and others that stay."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
from io import StringIO

import pytest
from django.core.management import call_command
from django.db import connection
from django.test import override_settings

from ai_budget.ledger import base as ledgers
from ai_budget.ledger.base import Ledger
from ai_budget.ledger.kept import whole_since
from ai_budget.ledger.redis import RedisLedger
from ai_budget.models import CallLog, SpendWindow, TotalState
from ai_budget.periods import Period
from ai_budget.review.purging import purge
from ai_budget.values import BalanceKey
from tests.contention.redis_server import BINARY, RedisServer
from tests.ledger.conftest import Clock
from tests.ledger.given import CHAT, limits_of, reserve, settle, settled

pytestmark = pytest.mark.django_db

LEDGERS = {
    "database": "ai_budget.ledger.database.DatabaseLedger",
    "redis": "ai_budget.ledger.redis.RedisLedger",
}
APRIL, MAY = date(2026, 4, 1), date(2026, 5, 1)
LATE_APRIL, EARLY_MAY, MID_MAY = (
    datetime(2026, 4, 30, 12, tzinfo=UTC),
    datetime(2026, 5, 1, 12, tzinfo=UTC),
    datetime(2026, 5, 12, 12, tzinfo=UTC),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if BINARY is None:
        pytest.skip("there is no redis-server to start")
    one = RedisServer(tmp_path_factory.mktemp("redis"))
    one.start()
    yield one
    one.stop()


@pytest.fixture(params=LEDGERS)
def ledger(request: pytest.FixtureRequest, clock: Clock) -> Iterator[Ledger]:
    chosen = {"LEDGER": LEDGERS[request.param]}
    if request.param == "redis":
        server = request.getfixturevalue("server")
        server.make_ready()
        chosen["LEDGER_REDIS_URL"] = server.url
    with override_settings(AI_BUDGET=chosen):
        yield ledgers.current()


@pytest.fixture(autouse=True)
def calls_of_three_days(ledger: Ledger, clock: Clock) -> None:
    """One call of each price in April, on the first of May, and lately."""
    for at, nanousd in ((LATE_APRIL, 1), (EARLY_MAY, 10), (MID_MAY, 100)):
        clock.now = at
        settle(reserve(limits_of(CHAT, at=at), nanousd, at=at), settled(nanousd))
        ledger.tidy()  # which copies balances to the database
    purge(MAY)
    assert CallLog.objects.count() == 2


def spent(*keys: tuple[Period, date]) -> list[int]:
    wanted = [BalanceKey("feature:chat", period, first) for period, first in keys]
    found = ledgers.current().balances(wanted)
    return [found[key].spent_nanousd for key in wanted]


EVERY = (
    (Period.MONTH, APRIL),
    (Period.DAY, LATE_APRIL.date()),
    (Period.MONTH, MAY),
    (Period.DAY, EARLY_MAY.date()),
    (Period.DAY, MID_MAY.date()),
)


def test_balances_are_what_they_were(ledger: Ledger) -> None:
    assert spent(*EVERY) == [1, 1, 110, 10, 100]


def test_balances_that_were_lost_are_filled_as_they_were(ledger: Ledger) -> None:
    if isinstance(ledger, RedisLedger):
        ledger.client.flushall()
    else:
        SpendWindow.objects.filter(first_day__gte=MAY).delete()

    settle(reserve(limits_of(CHAT, at=MID_MAY), 1_000, at=MID_MAY), settled(1_000))

    assert spent((Period.MONTH, MAY), (Period.DAY, MID_MAY.date())) == [1_110, 1_100]


def test_what_was_purged_is_not_taken_for_wrong(ledger: Ledger) -> None:
    assert ledger.differences(date(2026, 1, 1)) == []
    assert ledger.rebuild(date(2026, 1, 1)) == []

    assert spent(*EVERY) == [1, 1, 110, 10, 100]


def test_the_command_says_from_when_on_it_looks(ledger: Ledger) -> None:
    out = StringIO()

    call_command("ai_budget_rebuild", "--since=2026-04-01", "--check", stdout=out)

    assert out.getvalue().splitlines()[:2] == [
        "Calls before 2026-05-01 were purged: those balances stay as they are.",
        "Every balance since 2026-05-01 is the sum of the call log.",
    ]


@pytest.mark.parametrize("ledger", ["database"], indirect=True)
def test_what_is_left_is_still_mended(ledger: Ledger) -> None:
    SpendWindow.objects.update(spent_nanousd=7)

    mended = {str(it.key.first_day) for it in ledger.rebuild(date(2026, 1, 1))}

    assert mended == {"2026-05-01", "2026-05-12"}
    assert spent(*EVERY) == [7, 7, 110, 10, 100]


@pytest.mark.parametrize("ledger", ["database"], indirect=True)
def test_a_purge_between_looking_and_mending_leaves_a_balance_alone(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    SpendWindow.objects.update(spent_nanousd=7)
    seeming = ledger.differences(MAY)
    monkeypatch.setattr(ledger, "differences", lambda since: seeming)
    TotalState.objects.update(purged_day=date(2026, 6, 1))

    assert ledger.rebuild(MAY) == []

    assert spent(*EVERY) == [7] * 5


@pytest.mark.parametrize("ledger", ["database"], indirect=True)
@pytest.mark.parametrize(
    ("purged", "whole"),
    [
        (None, None),
        (date(2026, 5, 1), date(2026, 5, 1)),
        (date(2026, 5, 2), date(2026, 6, 1)),
        (date(2026, 12, 31), date(2027, 1, 1)),
    ],
)
def test_a_month_of_which_a_day_was_purged_is_not_whole(
    ledger: Ledger, purged: date | None, whole: date | None
) -> None:
    TotalState.objects.update(purged_day=purged)

    assert whole_since(connection.alias) == whole
