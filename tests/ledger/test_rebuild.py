"""Balances are a cache of the journal: what was lost or damaged is added up from it again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db.models import F

from ai_budget import periods
from ai_budget.exceptions import BudgetExceeded, LedgerUnavailable, LimitReached
from ai_budget.ledger import base as ledgers
from ai_budget.ledger import journal as journals
from ai_budget.models import CallLog, SpendWindow
from ai_budget.periods import Period
from ai_budget.policy.limits import balance_keys
from ai_budget.values import SITE, BalanceKey, Balances, Charge, Difference, Reservation
from tests.depth import some_of
from tests.ledger.conftest import Clock
from tests.ledger.given import (
    CHAT,
    NOON,
    RELEASED,
    estimated,
    limit,
    limits_of,
    reserve,
    row,
    settle,
    settled,
    spent_held_calls,
    sums_of_calls,
    sums_of_windows,
)
from tests.ledger.threads import THREADS, together

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("clock")]

TODAY = NOON.date()
MAY = date(2026, 5, 1)
ADA = Charge(
    feature="chat", user_id=get_user_model()._meta.pk.to_python("7".zfill(32)), subject="acme"
)


def call(charge: Charge = CHAT, nanousd: int = 100, **fields: Any) -> Reservation:
    """Reserve for a charge, in every balance it counts in."""
    at = fields.get("at", NOON)
    return reserve(limits_of(charge, at=at), nanousd, charge=charge, **fields)


def window(scope: str, period: Period = Period.DAY, first: date = TODAY) -> Any:
    return SpendWindow.objects.filter(pk=SpendWindow.key_for(scope, period, first))


def differences(since: date = MAY) -> list[Difference]:
    return ledgers.current().differences(since)


def rebuild(since: date = MAY) -> list[Difference]:
    return ledgers.current().rebuild(since)


# A row that is gone ------------------------------------------------------------------------------


class Life:
    """Two calls of the same caller, from their reservation to their end."""

    def __init__(self) -> None:
        self.calls: list[Reservation] = []

    def steps(self) -> list[Callable[[], Any]]:
        return [
            lambda: self.calls.append(call(ADA, 100)),
            lambda: self.calls.append(call(ADA, 50)),
            lambda: settle(self.calls[0], settled(60)),
            lambda: settle(self.calls[1], estimated(50)),
            lambda: settle(self.calls[1], settled(20)),
            lambda: self.calls.append(call(ADA, 10, calls=0)),
            lambda: settle(self.calls[2], RELEASED),
            lambda: call(ADA, 5),
        ]


@pytest.mark.parametrize("at", range(len(Life().steps())))
@pytest.mark.parametrize("gone", [None, SITE, "feature:chat", f"user:{ADA.user_id},feature:chat"])
def test_a_balance_whose_row_is_deleted_at_any_moment_is_what_the_journal_says(
    at: int, gone: str | None
) -> None:
    for number, step in enumerate(Life().steps()):
        if number == at:
            rows = SpendWindow.objects.all()
            (rows if gone is None else rows.filter(scope=gone)).delete()
        step()

    assert sums_of_windows() == sums_of_calls()
    assert differences() == []


def test_steps_share_one_life() -> None:
    """The test above would pass on calls that never happened."""
    life = Life()
    for step in life.steps():
        step()

    assert sorted(CallLog.objects.values_list("status", flat=True)) == [
        "released",
        "reserved",
        "settled",
        "settled",
    ]


def test_a_limit_holds_over_a_row_that_was_deleted() -> None:
    settle(call(nanousd=60), settled(60))
    SpendWindow.objects.all().delete()

    with pytest.raises(BudgetExceeded) as raised:
        reserve(limits_of(CHAT, daily=100), 41)

    assert raised.value.spent == 60


def test_a_limit_of_calls_holds_over_a_row_that_was_deleted() -> None:
    settle(call(ADA), settled(60))
    SpendWindow.objects.all().delete()

    with pytest.raises(LimitReached):
        reserve([limit(1, f"user:{ADA.user_id}", calls=True)], 0)


@pytest.mark.django_db(transaction=True)
def test_nobody_can_book_in_a_row_while_it_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there before the journal is read, in the same transaction, so others wait for it."""
    added_up = journals.balances_of
    seen: list[bool] = []

    def watched(connection: Any, keys: list[BalanceKey]) -> Any:
        rows = [SpendWindow.key_for(key.scope, key.period, key.first_day) for key in keys]
        there = SpendWindow.objects.filter(pk__in=rows).count() == len(rows)
        seen.append(connection.in_atomic_block and there)
        return added_up(connection, keys)

    monkeypatch.setattr(journals, "balances_of", watched)

    call()

    assert seen == [True]


@pytest.mark.contention
@pytest.mark.django_db(transaction=True)
def test_rows_that_vanish_under_many_calls_lose_nothing() -> None:
    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(6):
            reservation = call(ADA, 10)
            settle(reservation, settled(chance.randint(0, 10)))

    def vandal() -> None:
        for scope in [SITE, "feature:chat", f"user:{ADA.user_id}"] * 3:
            window(scope).delete()

    together([*(lambda number=number: work(number) for number in range(6)), vandal])
    call(ADA, 0)

    assert sums_of_windows() == sums_of_calls()


# What is wrong is found, and mended --------------------------------------------------------------


def a_site_of_many() -> None:
    """Calls in every state, of two days and two months."""
    for at in (NOON - timedelta(days=30), NOON - timedelta(days=1), NOON):
        for charge in (CHAT, ADA, Charge(feature="mail", subject="acme")):
            settle(call(charge, 100, at=at), settled(60))
            settle(call(charge, 100, at=at), estimated(100))
            settle(call(charge, 100, at=at), RELEASED)
            call(charge, 100, at=at, calls=0)


def damaged(**changes: Any) -> Callable[[], None]:
    def damage() -> None:
        assert window("feature:chat").update(**changes) == 1

    return damage


DAMAGE: dict[str, Callable[[], Any]] = {
    "spent-too-much": damaged(spent_nanousd=F("spent_nanousd") + 1),
    "spent-too-little": damaged(spent_nanousd=F("spent_nanousd") - 1),
    "held-too-much": damaged(held_nanousd=F("held_nanousd") + 1),
    "held-too-little": damaged(held_nanousd=0),
    "calls-too-many": damaged(calls=F("calls") + 1),
    "calls-too-few": damaged(calls=0),
    "all": damaged(spent_nanousd=0, held_nanousd=0, calls=0),
    "row-deleted": lambda: window("feature:chat").delete(),
}


@pytest.mark.parametrize("damage", [pytest.param(do, id=name) for name, do in DAMAGE.items()])
def test_damage_is_found_and_mended(damage: Callable[[], None]) -> None:
    a_site_of_many()
    key = limit(None).key
    right = ledgers.current().balances([key])[key]
    damage()
    kept = ledgers.current().balances([key]).get(key, Balances())

    expected = [Difference(key=key, kept=kept, journal=right)]
    assert differences() == expected
    assert rebuild() == expected
    assert differences() == []
    assert ledgers.current().balances([key])[key] == right


@pytest.mark.parametrize(
    "scope",
    ["feature:ghost", "category:ghost", "subject:ghost", "user:8", "user:nobody", "?", "", "user:"],
)
def test_a_row_that_no_call_counts_in_is_emptied(scope: str) -> None:
    call()
    SpendWindow.objects.create(
        scope=scope, period="day", first_day=TODAY, spent_nanousd=5, calls=1, refused=3
    )

    (mended,) = rebuild()

    assert mended.key == BalanceKey(scope, Period.DAY, TODAY)
    assert (mended.kept, mended.journal) == (Balances(spent_nanousd=5, calls=1), Balances())
    assert sums_of_windows() == sums_of_calls()
    assert window(scope).get().refused == 3


def test_many_kinds_of_damage_are_mended_at_once() -> None:
    a_site_of_many()
    SpendWindow.objects.filter(scope=SITE).update(spent_nanousd=1)
    SpendWindow.objects.filter(period="month").update(calls=77)
    SpendWindow.objects.filter(scope__startswith="user:").delete()

    rebuild(since=date(2026, 4, 1))

    assert sums_of_windows() == sums_of_calls()


def test_looking_changes_nothing() -> None:
    a_site_of_many()
    window(SITE).update(spent_nanousd=1)
    window("feature:chat").delete()
    before = sorted(SpendWindow.objects.values_list())

    assert len(differences()) == 2
    assert sorted(SpendWindow.objects.values_list()) == before


def test_where_nothing_is_wrong_nothing_is_mended() -> None:
    a_site_of_many()

    assert differences(since=date(2026, 4, 1)) == rebuild(since=date(2026, 4, 1)) == []


def test_what_was_refused_is_known_to_the_balance_alone_and_stays() -> None:
    call()
    ledgers.current().count_refusal([limit(None).key])
    window("feature:chat").update(spent_nanousd=5)

    rebuild()

    assert window("feature:chat").get().refused == 1


def test_a_balance_that_only_counts_refusals_is_right() -> None:
    ledgers.current().count_refusal([limit(None).key])

    assert differences() == []


@pytest.mark.parametrize(
    ("since", "found"),
    [
        (date(2026, 4, 1), ["2026-04-01 month", "2026-04-03 day", "2026-05-01 month"]),
        (date(2026, 4, 4), ["2026-04-01 month", "2026-05-01 month"]),
        (date(2026, 5, 1), ["2026-05-01 month"]),
        (date(2026, 5, 3), ["2026-05-01 month"]),
        (date(2026, 6, 1), []),
    ],
)
def test_only_what_began_since_is_looked_at(since: date, found: list[str]) -> None:
    """And the month that the day is in, all of it."""
    call(at=NOON - timedelta(days=31))
    call(at=NOON)
    damaged_rows = SpendWindow.objects.filter(scope=SITE).exclude(period="day", first_day=TODAY)
    damaged_rows.update(spent_nanousd=5)

    days = {(f"{one.key.first_day} {one.key.period}") for one in rebuild(since)}

    assert sorted(days) == found


def test_a_month_is_mended_by_all_its_days() -> None:
    call(nanousd=3, at=NOON - timedelta(days=3))
    call(nanousd=4)
    window(SITE, Period.MONTH, MAY).update(held_nanousd=0)

    (mended,) = rebuild(since=TODAY)

    assert mended.journal.held_nanousd == 7


# Who is who --------------------------------------------------------------------------------------

NAMES = ["Tenant", "tenant", "tenant ", "ténant", "a,b", "a,,b", ",", "a,", ",feature:chat"]
NAMES += ["a,feature:chat", "a,,feature:chat", "'; --", "%", "日本", "🙂", "a\nb"]


@pytest.mark.parametrize("damage", [{"spent_nanousd": 9}, {"held_nanousd": 9}, {"calls": 9}])
def test_subjects_are_told_apart_by_their_letters(damage: dict[str, int]) -> None:
    """To a collation two of them may be one; to a budget they are not."""
    for number, name in enumerate(NAMES):
        charge = Charge(feature="chat", subject=name)
        settle(call(charge, 100 + number), settled(number))
        call(charge, 100 + number)
    whole = sorted(SpendWindow.objects.values_list())
    assert differences() == []

    SpendWindow.objects.update(**damage)
    rebuild()
    assert sorted(SpendWindow.objects.values_list()) == whole

    SpendWindow.objects.all().delete()
    rebuild()
    assert sorted(SpendWindow.objects.values_list()) == whole


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_any_name_heals_with_its_own_calls_alone(name: str) -> None:
    for other in NAMES:
        call(Charge(feature="chat", subject=other), 100)
    charge = Charge(feature="chat", subject=name)
    SpendWindow.objects.all().delete()

    call(charge, 1)

    for key in balance_keys(charge, "", TODAY):
        kept = ledgers.current().balances([key])[key]
        if key.scope.startswith("subject:"):
            assert (kept.held_nanousd, kept.calls) == (101, 2)


def test_a_user_is_known_by_the_key_of_the_projects_model() -> None:
    call(ADA)
    SpendWindow.objects.filter(scope=f"user:{ADA.user_id}").update(held_nanousd=0)

    assert [one.key.scope for one in rebuild()] == [f"user:{ADA.user_id}"] * 2
    assert sums_of_windows() == sums_of_calls()


def test_calls_of_a_category_count_in_it() -> None:
    limits = limits_of(CHAT, category="support")
    reserve(limits, 100, category="support")
    SpendWindow.objects.filter(scope="category:support").delete()

    assert len(rebuild()) == 2
    assert spent_held_calls(limit(None, "category:support")) == (0, 100, 1)


# The tick, the late worker, and the rebuild ------------------------------------------------------

LATE: dict[str, Callable[[Reservation], Any]] = {
    "tick": lambda reservation: ledgers.current().settle_overdue(),
    "truth": lambda reservation: settle(reservation, settled(60)),
    "estimate": lambda reservation: settle(reservation, estimated(80)),
    "release": lambda reservation: settle(reservation, RELEASED),
    "rows vanish": lambda reservation: SpendWindow.objects.all().delete(),
    "rebuild": lambda reservation: rebuild(),
}


@pytest.mark.parametrize("order", some_of(itertools.permutations(LATE, 3), count=20), ids=", ".join)
def test_in_whatever_order_a_call_ends_the_balances_are_right(
    clock: Clock, order: tuple[str, ...]
) -> None:
    reservation = call(ADA)
    clock.pass_by(timedelta(hours=1))

    for name in order:
        LATE[name](reservation)
        if name != "rows vanish":
            assert {found.kept for found in differences()} <= {Balances()}

    rebuild()
    assert sums_of_windows() == sums_of_calls()
    assert differences() == []


def test_a_call_that_a_damaged_balance_does_not_cover_is_settled_after_a_rebuild() -> None:
    reservation = call()
    window(SITE).update(held_nanousd=0)
    with pytest.raises(LedgerUnavailable):
        settle(reservation, settled(60))

    rebuild()
    settle(reservation, settled(60))

    assert row(reservation).status == "settled"
    assert sums_of_windows() == sums_of_calls()


# While calls go on -------------------------------------------------------------------------------


def work(number: int) -> None:
    """Calls of several callers, some of them at the same time."""
    chance = random.Random(number)
    charge = [CHAT, ADA, Charge(feature="mail", subject="acme")][number % 3]
    for _ in range(8):
        open_calls = [call(charge, 20) for _ in range(chance.randint(1, 2))]
        for reservation in open_calls:
            settle(reservation, chance.choice([settled(7), estimated(20), RELEASED]))


def workers() -> list[Callable[[], None]]:
    return [lambda number=number: work(number) for number in range(THREADS - 2)]  # type: ignore[misc]


def mend() -> None:
    rebuild(since=date(2026, 4, 1))


@pytest.fixture
def threads(transactional_db: None) -> Iterator[None]:
    """Balances that are there, so that threads meet in them at once."""
    a_site_of_many()
    yield
    assert sums_of_windows() == sums_of_calls()


@pytest.mark.contention
@pytest.mark.usefixtures("threads")
def test_calls_on_their_way_are_no_difference() -> None:
    found: list[Difference] = []

    def look() -> None:
        for _ in range(15):
            found.extend(differences())

    together([*workers(), look, look])

    assert found == []


@pytest.mark.contention
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(
            lambda: SpendWindow.objects.update(
                spent_nanousd=F("spent_nanousd") + 5, held_nanousd=F("held_nanousd") + 5, calls=99
            ),
            id="too-much",
        ),
        pytest.param(lambda: SpendWindow.objects.update(spent_nanousd=0), id="too-little"),
        pytest.param(lambda: SpendWindow.objects.all().delete(), id="rows-deleted"),
    ],
)
def test_damage_is_mended_while_calls_go_on(damage: Callable[[], Any]) -> None:
    """By two at once, of which none undoes what the other did, or what calls book meanwhile."""
    damage()

    together([*workers(), mend, mend])


# Other levels of isolation -----------------------------------------------------------------------


@pytest.mark.contention
@pytest.mark.usefixtures("isolated", "threads")
def test_at_any_level_of_isolation_damage_is_mended_while_calls_go_on() -> None:
    window("feature:chat").update(spent_nanousd=0)
    window(SITE).delete()

    together([*workers(), mend, mend])

    assert differences() == []


@pytest.mark.contention
@pytest.mark.usefixtures("isolated", "threads")
def test_at_any_level_of_isolation_calls_on_their_way_are_no_difference() -> None:
    found: list[Difference] = []
    together([*workers(), lambda: found.extend(differences())])

    assert found == []


@pytest.mark.contention
@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("isolated")
def test_at_any_level_of_isolation_exactly_as_many_as_fit_are_admitted() -> None:
    def tries() -> int:
        taken = 0
        for _ in range(4):
            try:
                reserve(limits_of(CHAT, daily=70), 10)
                taken += 1
            except LimitReached:
                pass
        return taken

    assert sum(together([tries] * THREADS)) == 7


def test_the_tests_clock_is_the_ledgers() -> None:
    """Days above are told by it."""
    assert periods.now() == NOON == ledgers.current().now()
