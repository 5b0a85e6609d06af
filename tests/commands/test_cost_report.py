from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from io import StringIO
from typing import Any

import django
import pytest
from django.core.mail import EmailMessage
from django.core.mail.backends.base import BaseEmailBackend
from django.core.management import CommandError, call_command
from pytest_django.fixtures import Settings

from ai_budget import periods
from ai_budget.management.plain import PlainCommand
from tests.depth import some_of
from tests.factories import CallLogFactory, FeatureBudgetFactory, UserFactory

NOW = datetime(2026, 10, 15, 12, tzinfo=UTC)

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def clock() -> Iterator[None]:
    with periods.override_clock(lambda: NOW):
        yield


def report(*args: str, **options: Any) -> str:
    out, err = StringIO(), StringIO()
    call_command("cost_report", *args, stdout=out, stderr=err, **options)
    assert err.getvalue() == ""
    return out.getvalue()


def total(*args: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(report("--format=json", *args))["total"]
    return data


def manage(*args: str) -> tuple[list[str], dict[str, Any]]:
    """Return a command line, and what a process needs to run it against the test's database."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return [sys.executable, "-P", "-m", "django", "cost_report", *args], {"env": environment}


# What is reported -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), "0.000000020"),
        (("--month", "this"), "0.000000020"),
        (("--month", "last"), "0.000000010"),
        (("--month", "2026-09"), "0.000000010"),
        (("--since", "2026-09-10"), "0.000000030"),
        (("--since", "2026-09-10", "--until", "2026-10-14"), "0.000000010"),
        (("--since", "2026-09-11"), "0.000000020"),
        (("--feature", "search"), "0.000000000"),
        (("--feature", "*"), "0.000000020"),
    ],
)
def test_the_range_and_the_feature_choose_the_calls(args: tuple[str, ...], expected: str) -> None:
    CallLogFactory.create(reserved_at=datetime(2026, 9, 10, tzinfo=UTC), cost_nanousd=10)
    CallLogFactory.create(reserved_at=datetime(2026, 10, 14, tzinfo=UTC), cost_nanousd=20)
    FeatureBudgetFactory.create(name="search")

    assert total(*args)["spend_usd"] == expected


def test_months_are_those_of_the_configured_zone(settings: Settings) -> None:
    settings.AI_BUDGET = {"TIME_ZONE": "America/New_York"}
    CallLogFactory.create(reserved_at=datetime(2026, 10, 1, 3, 59, tzinfo=UTC), cost_nanousd=1)
    CallLogFactory.create(reserved_at=datetime(2026, 10, 1, 4, tzinfo=UTC), cost_nanousd=2)

    assert Decimal(total("--month=2026-10")["spend_usd"]) == Decimal("0.000000002")


def test_top_limits_the_users() -> None:
    for cost in (1, 2, 3):
        CallLogFactory.create(user=UserFactory.create(), cost_nanousd=cost)

    users = json.loads(report("--format=json", "--top=2"))["users"]

    assert [user["spend_usd"] for user in users] == ["0.000000003", "0.000000002"]


def test_the_table_is_the_default() -> None:
    CallLogFactory.create(user=UserFactory.create(username="anna"))

    text = report()

    assert text.startswith("AI spend in 2026-10 (UTC)\n")
    assert "anna" in text


def test_options_can_be_given_as_values() -> None:
    assert "from 2026-10-01 to 2026-10-04" in report(
        since=date(2026, 10, 1), until="2026-10-05", format="table", top=3
    )


def test_an_empty_month_says_so_in_every_format() -> None:
    assert report("--month=2020-02") == "There were no calls in 2020-02 (UTC).\n"
    assert total("--month=2020-02")["calls"] == 0
    assert "total,,calls,0\n" in report("--month=2020-02", "--format=csv")


def test_characters_that_the_terminal_lacks_are_replaced() -> None:
    CallLogFactory.create(subject="日本")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")

    call_command("cost_report", stdout=out)

    out.seek(0)
    assert "??" in out.read()


# Wrong arguments --------------------------------------------------------------------------------

WRONG = [
    (["--month=2026-13"], "--month must be such as"),
    (["--month=2026-1"], "--month must be such as"),
    (["--month=0000-01"], "--month must be such as"),
    (["--month=9999-12"], "out of range"),
    (["--month=next"], "--month must be such as"),
    (["--month="], "--month must be such as"),
    (["--since=2026-10-32"], "--since must be a day"),
    (["--since=yesterday"], "--since must be a day"),
    (["--since=2026-10-02", "--until=2026-10-01"], "must be before"),
    (["--since=2026-10-01", "--until=2026-10-01"], "must be before"),
    (["--since=2026-10-16"], "is after today"),
    (["--until=2026-10-01"], "--until needs --since"),
    (["--month=this", "--since=2026-10-01"], "either --month or --since"),
    (["--feature=unheard-of"], "no feature 'unheard-of'"),
    (["--top=0"], "--top must be"),
    (["--top=many"], "--top must be"),
    (["--format=xml"], "--format must be table, json, csv, markdown, html or focus"),
    (["--unheard-of"], "unrecognized arguments"),
    (["--month"], "expected one argument"),
]


@pytest.mark.parametrize(("args", "message"), WRONG)
def test_wrong_arguments_are_errors_of_one_line_with_code_2(args: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message) as caught:
        call_command("cost_report", *args)

    assert caught.value.returncode == 2
    assert "\n" not in str(caught.value)


def test_days_beyond_the_calendar_are_an_error(settings: Settings) -> None:
    settings.AI_BUDGET = {"TIME_ZONE": "Asia/Tokyo"}

    with pytest.raises(CommandError, match="out of range"):
        call_command("cost_report", "--since=0001-01-01")


def test_wrong_options_given_as_values_are_the_same_errors() -> None:
    with pytest.raises(CommandError, match="--top must be") as caught:
        call_command("cost_report", top=0)

    assert caught.value.returncode == 2


@pytest.mark.parametrize(
    "args", some_of([["--month=2026-13"], ["--unheard-of"], ["--feature=nobody"]])
)
def test_on_the_command_line_too(args: list[str]) -> None:
    command, options = manage(*args)

    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


# Pipes ------------------------------------------------------------------------------------------


def test_the_command_line_prints_data_alone() -> None:
    command, options = manage("--month=2020-02", "--format=json")

    done = subprocess.run(command, capture_output=True, text=True, check=True, **options)

    assert json.loads(done.stdout)["total"]["calls"] == 0
    assert done.stderr == ""


def test_a_reader_who_leaves_early_causes_no_noise() -> None:
    command, options = manage("--month=2020-02", "--format=csv")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        noise = process.stderr.read()

    assert (noise, process.returncode) == (b"", 0)


# Formats ----------------------------------------------------------------------------------------


def test_every_format_is_there() -> None:
    CallLogFactory.create()

    assert report("--format=markdown").startswith("# AI spend in 2026-10 (UTC)\n")
    assert report("--format=html").startswith("<!DOCTYPE html>\n")
    assert report("--format=focus").startswith("BilledCost,")
    assert report("--format=csv").startswith("section,name,metric,value\n")


def test_focus_says_what_the_report_says() -> None:
    for number in range(3):
        at = NOW.replace(day=1 + number)
        CallLogFactory.create(reserved_at=at, cost_nanousd=1_234_567_891)
    CallLogFactory.create(feature__name="search", cost_nanousd=5)

    rows = list(csv.DictReader(StringIO(report("--format=focus", "--feature=chat"))))

    billed = sum(Decimal(row["BilledCost"]) for row in rows)
    assert str(billed) == total("--feature=chat")["spend_usd"] == "3.703703673"


def test_a_long_csv_is_never_in_memory_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(400):
        CallLogFactory.create(subject=f"tenant-{number}", cost_nanousd=number)
    monkeypatch.setattr("ai_budget.management.commands.cost_report._PIECE", 1_000)
    written: list[str] = []
    monkeypatch.setattr(PlainCommand, "write", lambda _self, text: written.append(text))

    call_command("cost_report", format="csv", top=1000)

    assert len(written) > 20
    assert max(map(len, written)) < 1_500
    assert "".join(written).count("\nsubjects,") == 800


# E-mail -----------------------------------------------------------------------------------------


LOCMEM = "django.core.mail.backends.locmem.EmailBackend"


@pytest.fixture
def mailers(settings: Settings) -> None:
    """Configure mail as Django does from 6.1 on; versions before do not know the setting."""
    settings.MAILERS = {"default": {"BACKEND": LOCMEM}}


@pytest.mark.usefixtures("mailers")
def test_a_report_is_sent_instead_of_printed(mailoutbox: list[EmailMessage]) -> None:
    CallLogFactory.create(user=UserFactory.create(username="<b>anna</b>"))

    out = report("--month=2026-10", "--email=anna@example.com", "--email=ben@example.com")

    assert out == "Sent to anna@example.com, ben@example.com.\n"
    (message,) = mailoutbox
    assert message.to == ["anna@example.com", "ben@example.com"]
    assert message.subject == "AI spend in 2026-10 (UTC)"
    assert message.body.startswith("AI spend in 2026-10 (UTC)\n")
    assert "<b>anna</b>" in message.body
    ((name, page, kind),) = message.attachments
    assert (name, kind) == ("ai-spend-2026-10-01.html", "text/html")
    assert isinstance(page, str)
    assert "<svg" in page
    assert "&lt;b&gt;anna" in page


@pytest.mark.usefixtures("mailers")
def test_an_address_is_given_once_and_quietly(mailoutbox: list[EmailMessage]) -> None:
    assert report(email=["anna@example.com"] * 2, verbosity=0) == ""

    assert mailoutbox[0].to == ["anna@example.com"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--email=anna"], "--email 'anna' is no address"),
        (["--email=anna@example.com\nBcc: x@example.com"], "is no address"),
        (["--email="], "is no address"),
        (["--email=a@example.com", "--format=html"], "leave out --format"),
        (["--email=a@example.com", "--month=2026-13"], "--month must be such as"),
    ],
)
def test_nothing_is_sent_for_wrong_arguments(
    args: list[str], message: str, mailoutbox: list[EmailMessage]
) -> None:
    with pytest.raises(CommandError, match=message) as caught:
        call_command("cost_report", *args)

    assert caught.value.returncode == 2
    assert mailoutbox == []


class BrokenBackend(BaseEmailBackend):
    """A mail server that does not answer, or a library that fails in its own way."""

    error: Exception = ConnectionRefusedError(111, "Connection\nrefused")

    def send_messages(self, messages: Any) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenBackend.error, "ConnectionRefusedError [Errno 111] Connection refused"),
        (ValueError("key=s3cret"), "ValueError"),
    ],
)
def test_a_mail_that_is_not_taken_is_one_line_and_code_1(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    backend = f"{__name__}.BrokenBackend"
    if django.VERSION < (6, 1):
        settings.EMAIL_BACKEND = backend
    settings.MAILERS = {"default": {"BACKEND": backend}}
    monkeypatch.setattr(BrokenBackend, "error", error)

    with pytest.raises(CommandError) as caught:
        call_command("cost_report", email=["anna@example.com"])

    assert str(caught.value) == f"the report could not be sent: {said}"
    assert caught.value.returncode == 1
