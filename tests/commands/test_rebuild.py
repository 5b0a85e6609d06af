"""``manage.py ai_budget_rebuild``: what it compares, prints and answers with."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import transaction
from pytest_django.fixtures import Settings

from ai_budget import periods
from ai_budget.ledger import base as ledgers
from ai_budget.models import DayTotal, SpendWindow, UserTotal
from ai_budget.review import rollups
from ai_budget.values import Charge, Difference
from tests.depth import some_of
from tests.factories import UserFactory
from tests.ledger.given import (
    CHAT,
    NOON,
    limits_of,
    reserve,
    settle,
    settled,
    sums_of_calls,
    sums_of_windows,
)

pytestmark = pytest.mark.django_db

RIGHT = "Every balance since 2026-04-01 is the sum of the call log.\n"


@pytest.fixture(autouse=True)
def clock() -> Iterator[None]:
    with periods.override_clock(lambda: NOON):
        yield


def rebuild(*args: str, **options: Any) -> str:
    out, err = StringIO(), StringIO()
    call_command("ai_budget_rebuild", *args, stdout=out, stderr=err, **options)
    assert err.getvalue() == ""
    return out.getvalue()


def check(*args: str, **options: Any) -> tuple[str, str, int]:
    """What a check that finds something prints, says at last, and exits with."""
    out = StringIO()
    with pytest.raises(CommandError) as raised:
        call_command("ai_budget_rebuild", "--check", *args, stdout=out, **options)
    return out.getvalue(), str(raised.value), raised.value.returncode


def manage(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own, against the test's database."""
    command = [sys.executable, "-P", "-m", "django", "ai_budget_rebuild", *args]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def spend(nanousd: int = 1_250_000_000, charge: Charge = CHAT, at: datetime = NOON) -> None:
    limits = limits_of(charge, at=at)
    settle(reserve(limits, nanousd, charge=charge, at=at), settled(nanousd))


def damage(scope: str = "feature:chat", period: str = "day", **changes: Any) -> None:
    assert SpendWindow.objects.filter(scope=scope, period=period).update(**changes)


# Checking ----------------------------------------------------------------------------------------


def test_where_nothing_is_wrong_a_check_says_so() -> None:
    spend()

    assert rebuild("--check") == RIGHT


def test_without_any_call_nothing_is_wrong() -> None:
    assert rebuild("--check") == rebuild() == RIGHT


def test_a_check_prints_what_is_wrong_in_dollars() -> None:
    spend()
    damage(spent_nanousd=1, held_nanousd=2_000_000_000, calls=1_234)

    lines, message, code = check()

    assert lines == (
        "feature:chat day 2026-05-04: spent $0.000000001, not $1.250000000; "
        "held $2.000000000, not $0.000000000; calls 1,234, not 1\n"
    )
    assert (message, code) == ("1 balance is wrong", 1)


def test_what_is_right_in_a_wrong_balance_is_left_out() -> None:
    spend()
    damage(calls=0)

    assert check()[0] == "feature:chat day 2026-05-04: calls 0, not 1\n"


def test_each_balance_has_its_line() -> None:
    spend()
    SpendWindow.objects.update(calls=0)

    lines, message, _ = check()

    assert lines.splitlines() == [
        "* day 2026-05-04: calls 0, not 1",
        "* month 2026-05: calls 0, not 1",
        "feature:chat day 2026-05-04: calls 0, not 1",
        "feature:chat month 2026-05: calls 0, not 1",
    ]
    assert message == "4 balances are wrong"


def test_a_check_changes_nothing() -> None:
    spend()
    damage(calls=0)
    before = list(SpendWindow.objects.order_by("pk").values())

    check()

    assert list(SpendWindow.objects.order_by("pk").values()) == before


def test_what_could_move_the_cursor_is_not_printed() -> None:
    spend(charge=Charge(feature="chat", subject="\x1b[2Ja\nb"))
    damage("subject:\x1b[2Ja\nb", calls=0)

    assert check()[0] == "subject:?[2Ja?b day 2026-05-04: calls 0, not 1\n"


def test_characters_that_the_terminal_lacks_are_replaced() -> None:
    spend(charge=Charge(feature="chat", subject="日本"))
    damage("subject:日本", calls=0)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")

    call_command("ai_budget_rebuild", stdout=out)

    out.seek(0)
    assert "subject:?? day" in out.read()


# Repairing ---------------------------------------------------------------------------------------


def test_what_was_wrong_is_right_again() -> None:
    spend()
    damage(spent_nanousd=5)
    SpendWindow.objects.filter(scope="*").delete()

    printed = rebuild()

    assert printed.splitlines() == [
        "* day 2026-05-04: spent $0.000000000, not $1.250000000; calls 0, not 1",
        "* month 2026-05: spent $0.000000000, not $1.250000000; calls 0, not 1",
        "feature:chat day 2026-05-04: spent $0.000000005, not $1.250000000",
        "3 balances are right again.",
    ]
    assert sums_of_windows() == sums_of_calls()


def test_a_second_run_finds_nothing() -> None:
    spend()
    damage(calls=0)
    assert "1 balance is right again.\n" in rebuild()

    assert rebuild() == rebuild("--check") == RIGHT


def test_any_ledger_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, date]] = []

    def ask(verb: str, since: date, **options: Any) -> list[Difference]:
        asked.append((verb, since))
        return []

    for verb in ("rebuild", "differences"):
        monkeypatch.setattr(ledgers.current(), verb, functools.partial(ask, verb))

    rebuild()
    rebuild("--check")

    assert asked == [("rebuild", date(2026, 4, 1)), ("differences", date(2026, 4, 1))]


# Since when --------------------------------------------------------------------------------------


def wrong_days(*args: str, **options: Any) -> list[str]:
    lines, _, _ = check(*args, **options)
    return [line.removeprefix("* ").split(":")[0] for line in lines.splitlines()]


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ((), ["day 2026-04-01", "month 2026-04", "month 2026-05"]),
        (("--since=2026-04-02",), ["month 2026-04", "month 2026-05"]),
        (("--since=2026-05-04",), ["month 2026-05"]),
        (
            ("--since", "2026-03-31"),
            ["day 2026-03-31", "day 2026-04-01", "month 2026-03", "month 2026-04", "month 2026-05"],
        ),
    ],
)
def test_a_day_says_how_far_to_look_back(args: tuple[str, ...], found: list[str]) -> None:
    for at in (datetime(2026, 3, 31, tzinfo=UTC), datetime(2026, 4, 1, tzinfo=UTC), NOON):
        spend(at=at)
    rows = SpendWindow.objects.filter(scope="*").exclude(period="day", first_day=NOON.date())
    rows.update(calls=9)

    assert wrong_days(*args) == found


def test_last_month_is_that_of_the_configured_zone(settings: Settings) -> None:
    settings.AI_BUDGET = {"TIME_ZONE": "America/New_York"}
    with periods.override_clock(lambda: datetime(2026, 5, 1, 3, 59, tzinfo=UTC)):
        assert "since 2026-03-01 " in rebuild()
    with periods.override_clock(lambda: datetime(2026, 5, 1, 4, tzinfo=UTC)):
        assert "since 2026-04-01 " in rebuild()


@pytest.mark.parametrize(
    "since", [date(2026, 5, 2), datetime(2026, 5, 2, 7, tzinfo=UTC), "2026-05-02"]
)
def test_a_day_can_be_given_as_a_value(since: Any) -> None:
    assert "since 2026-05-02 " in rebuild(since=since)


# What cannot be followed -------------------------------------------------------------------------

WRONG = [
    (["--since", "yesterday"], "--since must be a day such as 2026-10-01, not 'yesterday'"),
    (["--since", "2026-02-30"], "--since must be a day such as 2026-10-01, not '2026-02-30'"),
    (["--since", "20260504"], "--since must be a day such as 2026-10-01, not '20260504'"),
    (["--since", "2026-05-05"], "--since (2026-05-05) is after today (2026-05-04)"),
    (["--since", "0001-01-01"], "--since (0001-01-01) is out of range"),
    (["--since", ""], "--since must be a day such as 2026-10-01, not ''"),
]


@pytest.mark.parametrize(("args", "message"), WRONG)
def test_arguments_that_make_no_sense_are_refused(args: list[str], message: str) -> None:
    with pytest.raises(CommandError) as raised:
        rebuild(*args)

    assert (str(raised.value), raised.value.returncode) == (message, 2)


def test_an_argument_that_is_unknown_is_refused() -> None:
    with pytest.raises(CommandError) as raised:
        rebuild("--nonsense")

    assert raised.value.returncode == 2


def test_inside_a_transaction_nothing_is_compared() -> None:
    with transaction.atomic(), pytest.raises(CommandError) as raised:
        rebuild()

    assert raised.value.returncode == 2
    assert "inside a transaction" in str(raised.value)


# As a process ------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_a_script_can_rely_on_the_exit_code() -> None:
    with periods.override_clock(lambda: datetime.now(UTC) - timedelta(minutes=1)):
        spend(at=periods.now())
    assert manage("--check").returncode == 0
    damage(calls=7)

    checked, repaired = manage("--check"), manage()

    assert (checked.returncode, checked.stderr) == (1, "error: 1 balance is wrong\n")
    assert "calls 7, not 1" in checked.stdout
    assert (repaired.returncode, repaired.stderr) == (0, "")
    assert repaired.stdout.endswith("\n1 balance is right again.\n")
    assert manage("--check").returncode == 0


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("args", some_of([["--since", "yesterday"], ["--nonsense"], ["--since"]]))
def test_a_wrong_command_line_is_one_line_and_exit_code_2(args: list[str]) -> None:
    ended = manage(*args)

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1


# Totals ------------------------------------------------------------------------------------------


def test_totals_that_are_wrong_are_recreated_from_the_calls() -> None:
    spend(charge=Charge(feature="chat", user_id=UserFactory.create().pk))
    rollups.add_up()
    DayTotal.objects.update(cost_nanousd=1)
    UserTotal.objects.filter(period="month").delete()

    printed, message, code = check()
    mended = rebuild()

    assert f"totals {NOON.date()}: not the sum of the calls\n" in printed
    assert (message, code) == ("the totals of 2 days are wrong", 1)
    assert "The totals of 2 days are right again.\n" in mended
    assert DayTotal.objects.get().cost_nanousd == 1_250_000_000
    assert UserTotal.objects.get(period="month").cost_nanousd == 1_250_000_000
    assert rebuild() == RIGHT
