"""``manage.py ai_budget_batches``: what it lists, shows, cancels and submits again."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import OperationalError

from ai_budget import batches, periods
from ai_budget.management.commands import ai_budget_batches
from ai_budget.models import Batch, BatchSubmission
from ai_budget.testing import AnthropicSimulator, Errored, override_budget
from tests.admin.batches import (
    BatchFactory,
    BatchSubmissionFactory,
    submit_and_end,
)
from tests.ledger.given import NOON

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def clock() -> Iterator[None]:
    with periods.override_clock(lambda: NOON):
        yield


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def run(*args: str, out: StringIO | None = None, **options: Any) -> str:
    out = out or StringIO()
    call_command("ai_budget_batches", *args, stdout=out, **options)
    return out.getvalue()


def refused(*args: str, code: int = 2) -> str:
    """What the one line of error says."""
    with pytest.raises(CommandError) as raised:
        run(*args)
    assert raised.value.returncode == code
    return str(raised.value)


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Have something happen at each pause between two looks; return how long they were."""

    def happen(*steps: Callable[[], object]) -> list[float]:
        waiting, pauses = iter(steps), []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            next(waiting)()

        monkeypatch.setattr(ai_budget_batches, "pause", pause)
        return pauses

    return happen


def change(batch: Batch, **values: Any) -> Callable[[], object]:
    return lambda: Batch.objects.filter(pk=batch.pk).update(**values)


# The list ----------------------------------------------------------------------------------------


def test_batches_are_listed_the_newest_first() -> None:
    first = BatchFactory.create(
        status="finished", total=1_000, succeeded=990, errored=10, spent_nanousd=812_345_678
    )
    second = BatchFactory.create(total=20_000, succeeded=5_000, held_nanousd=3_512_345_678)
    BatchSubmissionFactory.create(batch=second, status="uncertain")

    lines = [" ".join(line.split()) for line in run().splitlines()]

    assert lines == [
        "Batch Feature Status Items over Held Spent Created (UTC)",
        f"{second.pk} nightly open, 1 uncertain 5,000 of 20,000 $3.5123 $0.0000 2026-05-04 12:00",
        f"{first.pk} nightly finished 1,000 of 1,000 $0.0000 $0.8123 2026-05-04 12:00",
    ]


def test_columns_are_aligned() -> None:
    BatchFactory.create(total=1_000)
    BatchFactory.create(feature__name="a-feature-with-a-long-name")

    heading, *rows = run().splitlines()

    end = heading.index("Items over") + len("Items over")
    assert {row[end - 4 : end] for row in rows} == {"of 0", ",000"}


def test_open_batches_are_listed_however_old() -> None:
    old = BatchFactory.create()
    hidden = BatchFactory.create(status="finished")
    newest = BatchFactory.create_batch(2, status="finished")

    listed = [int(line.split()[0]) for line in run("--limit", "2").splitlines()[1:]]

    assert listed == [newest[1].pk, newest[0].pk, old.pk]
    assert hidden.pk not in listed


def test_without_batches_it_says_so() -> None:
    assert run() == "There are no batches.\n"
    assert json.loads(run("--format", "json")) == []


def test_programs_read_exact_amounts() -> None:
    batch = BatchFactory.create(
        status="finished",
        total=6,
        succeeded=1,
        errored=2,
        expired=3,
        subject="tenant-1",
        reserved_nanousd=2_000_000_001,
        spent_nanousd=5,
    )

    (data,) = json.loads(run("--format", "json"))

    assert data == {
        "id": batch.pk,
        "feature": "nightly",
        "user_id": None,
        "subject": "tenant-1",
        "status": "finished",
        "uncertain_submissions": 0,
        "items": 6,
        "open": 0,
        "succeeded": 1,
        "cached": 0,
        "errored": 2,
        "canceled": 0,
        "expired": 3,
        "refused": 0,
        "reserved_usd": "2.000000001",
        "held_usd": "0.000000000",
        "spent_usd": "0.000000005",
        "created_at": "2026-05-04T12:00:00+00:00",
        "finished_at": "2026-05-04T12:00:00+00:00",
    }


# Watching ----------------------------------------------------------------------------------------


def test_a_watch_prints_a_line_whenever_something_changed(
    meanwhile: Callable[..., list[float]],
) -> None:
    batch = BatchFactory.create(total=4, held_nanousd=2_000_000_000)
    pauses = meanwhile(
        lambda: None,
        change(batch, succeeded=2, held_nanousd=1_000_000_000, spent_nanousd=10**9),
        change(batch, succeeded=3, errored=1, held_nanousd=0, status="finished"),
    )

    lines = run("--watch", str(batch.pk), "--interval", "0.5").splitlines()

    name = f"Batch {batch.pk} nightly"
    assert lines == [
        f"{name}: 0 %, 0 of 4 items over, $2.0000 held, $0.0000 spent, open",
        f"{name}: 50 %, 2 of 4 items over, $1.0000 held, $1.0000 spent, open",
        f"{name}: 100 %, 4 of 4 items over, $0.0000 held, $1.0000 spent, finished",
        f"Batch {batch.pk} is finished: 3 succeeded, 1 errored; $1.0000 spent.",
    ]
    assert pauses == [0.5, 0.5, 0.5]


def test_a_terminal_shows_a_bar_that_is_drawn_over(
    meanwhile: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    first, second = BatchFactory.create(total=2), BatchFactory.create(total=3, succeeded=1)
    BatchSubmissionFactory.create(batch=first, status="uncertain")
    meanwhile(change(first, succeeded=2, status="finished"), change(second, status="finished"))

    text = run("--watch", out=Terminal())

    frames = text.split("\x1b[2A")
    assert len(frames) == 3
    cut = f"{first.pk} nightly [{'-' * 20}]   0 %  0 of 2, 1 uncertain, $0.00 held, $0.00 spent"
    assert frames[0].split("\n")[0] == f"\r\x1b[2K{cut[:59]}"
    assert f"{second.pk} nightly [######{'-' * 14}]  33 %" in frames[0]
    assert f"{first.pk} nightly [{'#' * 20}] 100 %" in frames[1]
    assert frames[2].splitlines()[-2:] == [
        f"Batch {first.pk} is finished: 2 succeeded; $0.0000 spent.",
        f"Batch {second.pk} is finished: 1 succeeded; $0.0000 spent.",
    ]


def test_a_terminal_that_can_draw_nothing_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    batch = BatchFactory.create(status="finished", total=1, canceled=1)

    text = run("--watch", str(batch.pk), out=Terminal())

    assert "\x1b" not in text
    assert text.endswith("is finished: 1 canceled; $0.0000 spent.\n")


def test_without_a_number_all_that_are_open_are_watched(
    meanwhile: Callable[..., list[float]],
) -> None:
    finished = BatchFactory.create(status="finished")
    batch = BatchFactory.create()
    assert meanwhile(change(batch, status="finished")) == []

    text = run("--watch")

    assert f"Batch {batch.pk} is finished: no items" in text
    assert f"Batch {finished.pk} " not in text


def test_nothing_to_watch_is_no_error() -> None:
    BatchFactory.create(status="finished")

    assert run("--watch") == "No batch is open.\n"


def test_a_batch_that_is_given_up_while_it_is_watched_ends_the_watch(
    meanwhile: Callable[..., list[float]],
) -> None:
    batch = BatchFactory.create(status="preparing")
    meanwhile(Batch.objects.filter(pk=batch.pk).delete)

    (line,) = run("--watch").splitlines()

    assert line.startswith(f"Batch {batch.pk} nightly: 0 %")


def test_ctrl_c_ends_a_watch_with_an_exit_code_of_its_own(
    meanwhile: Callable[..., list[float]],
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    batch = BatchFactory.create()
    meanwhile(interrupt)

    assert refused("--watch", code=130) == "stopped watching; the batches go on"
    assert not BatchSubmission.objects.filter(batch=batch, cancel_requested=True).exists()


def test_a_database_that_is_gone_is_one_line(
    meanwhile: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OperationalError("gone")

    BatchFactory.create()
    meanwhile(lambda: monkeypatch.setattr("django.db.models.query.QuerySet._fetch_all", fail))

    assert "OperationalError" in refused("--watch")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_process_is_interrupted_cleanly(on_terminal: bool) -> None:
    batch = BatchFactory.create(total=2)
    command = [sys.executable, "-P", "-m", "django", "ai_budget_batches", "--watch"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
    ours, theirs = pty.openpty() if on_terminal else os.pipe()
    with subprocess.Popen(
        command, env=environment, stdout=theirs, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(theirs)
        shown = os.read(ours, 4096).decode()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    os.close(ours)

    assert process.returncode == 130
    assert error == "error: stopped watching; the batches go on\n"
    assert ("\x1b[2K" in shown) is on_terminal
    assert f"{batch.pk} nightly" in shown


# Decisions ---------------------------------------------------------------------------------------


def test_a_batch_is_canceled(anthropic_api: AnthropicSimulator) -> None:
    batch = batches.submit_batch(["one", "two"], feature="nightly", max_tokens=50)

    said = run("--cancel", str(batch.pk))

    assert said == f"Batch {batch.pk} is being canceled; open items: 2.\n"
    assert BatchSubmission.objects.get().cancel_requested


def test_what_was_not_answered_is_submitted_again(anthropic_api: AnthropicSimulator) -> None:
    anthropic_api.batches.enqueue(Errored())
    batch = submit_and_end("one", "two")

    said = run("--resubmit", str(batch.pk))

    again = Batch.objects.get(resubmits=batch)
    assert said == (
        f"Batch {batch.pk} is submitted again as batch {again.pk}; items: 1, held: <$0.0001.\n"
    )
    assert again.total == 1


def test_it_is_submitted_again_once(anthropic_api: AnthropicSimulator) -> None:
    anthropic_api.batches.enqueue(Errored())
    batch = submit_and_end("one", "two")
    run("--resubmit", str(batch.pk))
    again = Batch.objects.get(resubmits=batch)

    said = refused("--resubmit", str(batch.pk))

    assert said == f"batch {batch.pk} was submitted again as batch {again.pk} already"
    assert Batch.objects.count() == 2


def test_the_budget_says_why_it_refuses(anthropic_api: AnthropicSimulator) -> None:
    anthropic_api.batches.enqueue(Errored())
    batch = submit_and_end("one", "two")

    with override_budget("nightly", daily_limit_usd="0.000001"):
        said = refused("--resubmit", str(batch.pk))

    assert said.startswith("The daily limit of feature:nightly is ")
    assert Batch.objects.count() == 1


def test_what_is_not_over_cannot_be_submitted_again() -> None:
    batch = BatchFactory.create(total=1)

    assert "resubmit it once it is finished" in refused("--resubmit", str(batch.pk))


def test_what_is_finished_cannot_be_canceled() -> None:
    batch = BatchFactory.create(status="finished")

    assert refused("--cancel", str(batch.pk)) == f"batch {batch.pk} is finished"


# Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--watch", "7"], "there is no batch 7"),
        (["--cancel", "7"], "there is no batch 7"),
        (["--resubmit", "9" * 30], f"there is no batch {'9' * 30}"),
        (["--watch", "nightly"], "--watch takes the number of a batch, not 'nightly'"),
        (["--cancel", ""], "--cancel takes the number of a batch, not ''"),
        (["--cancel", "7", "--watch"], "give either --watch or --cancel, not both"),
        (["--limit", "0"], "--limit must be a whole number from 1 on, not '0'"),
        (["--watch", "--interval", "0"], "--interval must be seconds, more than 0"),
        (["--watch", "--interval", "nan"], "--interval must be seconds, more than 0"),
        (["--watch", "--interval", "soon"], "--interval must be seconds, more than 0"),
        (["--format", "csv"], "--format must be table or json, not 'csv'"),
        (["--format", "json", "--watch"], "--format json is for the list alone"),
        (["--everything"], "unrecognized arguments: --everything"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line(arguments: list[str], message: str) -> None:
    assert refused(*arguments).startswith(message)


def test_numbers_may_be_given_as_numbers(anthropic_api: AnthropicSimulator) -> None:
    batch = batches.submit_batch(["one"], feature="nightly", max_tokens=50)

    assert "is being canceled" in run(cancel=batch.pk)
