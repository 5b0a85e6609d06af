"""``manage.py ai_budget_purge``: what it deletes, prints and answers with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import transaction

from ai_budget import periods
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.models import CallLog, TotalState
from ai_budget.review import purging
from ai_budget.review.spans import ever
from ai_budget.review.sums import reading
from tests.factories import CallLogFactory

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 10, 26, 9, 40, tzinfo=UTC)


@pytest.fixture(autouse=True)
def now() -> Iterator[None]:
    with periods.override_clock(lambda: NOW):
        yield


class Terminal(StringIO):
    """Takes what is written, as a terminal does."""

    def isatty(self) -> bool:
        return True


def purge(*args: str, stderr: StringIO | None = None, **options: Any) -> str:
    out, err = StringIO(), stderr or StringIO()
    call_command("ai_budget_purge", *args, stdout=out, stderr=err, **options)
    assert stderr is not None or err.getvalue() == ""
    return out.getvalue()


def refused(*args: str, **options: Any) -> tuple[str, str, int]:
    """What a purge that fails prints, says at last, and exits with."""
    out = StringIO()
    with pytest.raises(CommandError) as raised:
        call_command("ai_budget_purge", *args, stdout=out, **options)
    return out.getvalue(), str(raised.value), raised.value.returncode


def called(*days: str, **fields: Any) -> None:
    for day in days:
        at = datetime.fromisoformat(day).replace(hour=12, tzinfo=UTC)
        CallLogFactory.create(reserved_at=at, **fields)


# Deleting ----------------------------------------------------------------------------------------


def test_calls_of_days_before_a_date_are_deleted_and_their_sums_are_kept() -> None:
    called("2026-08-31", "2026-09-01", "2026-09-02", cost_nanousd=7)

    assert purge("--before=2026-09-02") == (
        "2 calls before 2026-09-02 deleted; what they add up to is kept.\n"
    )

    assert CallLog.objects.count() == 1
    with reading() as figures:
        assert figures.total(ever()).spend_nanousd == 21


def test_where_there_is_nothing_to_delete_it_says_so() -> None:
    called("2026-09-02")

    assert purge(before=date(2026, 9, 2)) == (
        "0 calls before 2026-09-02 deleted; what they add up to is kept.\n"
    )


def test_a_dry_run_counts_by_month_and_deletes_nothing() -> None:
    called("2026-07-01", "2026-08-31", "2026-08-31", "2026-09-01", "2026-09-02")

    printed = purge("--before=2026-09-02", "--dry-run")

    assert printed.splitlines() == [
        "2026-07                1",
        "2026-08                2",
        "2026-09                1",
        "4 calls before 2026-09-02 would be deleted.",
    ]
    assert CallLog.objects.count() == 5
    assert not TotalState.objects.filter(purged_day__isnull=False).exists()


def test_out_of_time_it_says_what_is_left_and_that_is_no_failure() -> None:
    called("2026-08-31", "2026-09-01")

    printed = purge("--before=2026-09-02", "--max-seconds=0")

    assert printed.splitlines() == [
        "0 calls before 2026-09-02 deleted; what they add up to is kept.",
        "The time is over: 2 calls are left. Run it again to go on.",
    ]


def test_out_of_time_with_nothing_left_is_the_end() -> None:
    assert purge("--before=2026-09-02", "--max-seconds=0") == (
        "0 calls before 2026-09-02 deleted; what they add up to is kept.\n"
    )


def test_a_call_in_flight_is_told_of_and_exits_with_1() -> None:
    called("2026-08-30", "2026-08-31")
    called("2026-08-31", status="reserved")
    in_the_way = "2026-08-31 and later days have to wait: 1 call is in flight"

    assert refused("--before=2026-09-02", "--dry-run") == (
        "2026-08                2\n2 calls before 2026-09-02 would be deleted.\n",
        in_the_way,
        1,
    )
    assert refused("--before=2026-09-02") == (
        "1 call before 2026-09-02 deleted; what they add up to is kept.\n",
        in_the_way,
        1,
    )


def test_progress_is_shown_on_a_terminal_alone() -> None:
    called("2026-08-31", "2026-08-31", "2026-08-31")
    terminal = Terminal()

    purge("--before=2026-09-02", "--batch-size=2", "--no-color", stderr=terminal)

    assert terminal.getvalue() == (f"\r2 of 3 calls deleted\r3 of 3 calls deleted\r{' ' * 20}\r")


# What makes no sense -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "the following arguments are required: --before"),
        (["--before=yesterday"], "--before must be a day such as 2026-10-01, not 'yesterday'"),
        (
            ["--before=2026-10-02"],
            "--before (2026-10-02) is after 2026-10-01: balances are added up from the calls since",
        ),
        (["--before=0001-01-01"], "--before (0001-01-01) is out of range"),
        (
            ["--before=2026-09-01", "--batch-size=0"],
            "--batch-size must be a whole number from 1 to 100000, not '0'",
        ),
        (
            ["--before=2026-09-01", "--batch-size=many"],
            "--batch-size must be a whole number from 1 to 100000, not 'many'",
        ),
        (
            ["--before=2026-09-01", "--max-seconds=nan"],
            "--max-seconds must be seconds, 0 or more, not 'nan'",
        ),
        (
            ["--before=2026-09-01", "--max-seconds=-1"],
            "--max-seconds must be seconds, 0 or more, not '-1'",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(args: list[str], said: str) -> None:
    called("2026-08-31")

    printed, message, code = refused(*args)

    assert (printed, code) == ("", 2)
    assert message.removeprefix("Error: ") == said
    assert CallLog.objects.count() == 1


def test_nothing_is_deleted_inside_a_transaction() -> None:
    called("2026-08-31")

    with transaction.atomic():
        printed, message, code = refused("--before=2026-09-01")

    assert (printed, code) == ("", 2)
    assert "inside a transaction" in message
    assert CallLog.objects.count() == 1


def test_a_database_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise LedgerUnavailable("it is away")

    monkeypatch.setattr(purging, "purge", fail)

    assert refused("--before=2026-09-01") == ("", "it is away", 2)


def test_a_script_sees_one_line_on_stderr_and_exit_code_2() -> None:
    command = [sys.executable, "-P", "-m", "django", "ai_budget_purge", "--before=soon"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: --before must be a day such as 2026-10-01, not 'soon'\n"
