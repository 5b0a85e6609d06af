"""The periodic work, as cron runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from io import StringIO

import pytest
from django.core.management import CommandError, call_command

import ai_budget
from ai_budget import batches, periods
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.database import DatabaseLedger
from ai_budget.models import Batch, BatchSubmission, CallLog, RateBucket
from ai_budget.testing import AnthropicSimulator
from tests.ledger.given import NOON, bucket, limit, reserve, settle, settled

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def an_hour_later() -> Iterator[None]:
    with periods.override_clock(lambda: NOON + timedelta(hours=1)):
        yield


def tick(verbosity: int = 1) -> str:
    out = StringIO()
    call_command("ai_budget_tick", stdout=out, verbosity=verbosity)
    return out.getvalue()


def failing(error: Exception) -> Callable[..., None]:
    def fail(self: DatabaseLedger, *given: object, **options: object) -> None:
        raise error

    return fail


def test_what_is_overdue_is_booked() -> None:
    reserve([limit(None)], 100)

    tick()

    assert CallLog.objects.get().status == "estimated"


def test_it_says_how_many() -> None:
    for _ in range(3):
        reserve([limit(None)])

    assert tick() == "3 overdue calls settled at their bound.\n"


def test_it_goes_on_until_nothing_is_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = DatabaseLedger.settle_overdue
    monkeypatch.setattr(
        DatabaseLedger, "settle_overdue", lambda self, **given: whole(self, most=2, **given)
    )
    for _ in range(5):
        reserve([limit(None)])

    assert tick() == "5 overdue calls settled at their bound.\n"


def test_where_there_is_nothing_to_do_it_is_silent() -> None:
    assert tick() == ""


def test_it_says_so_when_it_is_asked() -> None:
    assert tick(verbosity=2) == "0 overdue calls settled at their bound.\n"


def test_a_call_on_its_way_is_left_alone() -> None:
    reserve([limit(None)], deadline=NOON + timedelta(hours=2))

    tick()

    assert CallLog.objects.get().status == "reserved"


def test_buckets_that_have_long_been_full_are_dropped() -> None:
    ledgers.current().take([bucket(1)], at=NOON - timedelta(days=3))
    ledgers.current().take([bucket(2, "user:7")], at=NOON)

    assert tick() == ""
    assert [row.pk for row in RateBucket.objects.all()] == [
        RateBucket.key_for("user:7", "requests", 60)
    ]


def test_what_is_overdue_is_booked_before_anything_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DatabaseLedger, "tidy", failing(LedgerUnavailable("Away.")))
    reserve([limit(None)])

    with pytest.raises(CommandError, match=r"^Away\.$"):
        tick()

    assert CallLog.objects.get().status == "estimated"


@pytest.mark.parametrize(
    ("error", "told"),
    [(LedgerUnavailable("Away."), CommandError), (ValueError("a fault"), ValueError)],
)
def test_a_call_that_cannot_be_booked_keeps_nothing_else_from_being_done(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: type[Exception]
) -> None:
    monkeypatch.setattr(DatabaseLedger, "settle_overdue", failing(error))
    ledgers.current().take([bucket(1)], at=NOON - timedelta(days=3))

    with pytest.raises(told, match=str(error)):
        tick()

    assert not RateBucket.objects.exists()


def test_all_that_could_not_be_done_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DatabaseLedger, "settle_overdue", failing(LedgerUnavailable("Away.")))
    monkeypatch.setattr(DatabaseLedger, "tidy", failing(LedgerUnavailable("Still away.")))

    with pytest.raises(CommandError, match=r"^Away\. Still away\.$") as caught:
        tick()

    assert caught.value.returncode == 2


def test_the_calls_that_were_booked_are_told_though_one_could_not_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = iter([2])

    def booked(self: DatabaseLedger, **options: object) -> int:
        for result in results:
            return result
        raise LedgerUnavailable("Away.")

    monkeypatch.setattr(DatabaseLedger, "settle_overdue", booked)
    out = StringIO()

    with pytest.raises(CommandError):
        call_command("ai_budget_tick", stdout=out)

    assert out.getvalue() == "2 overdue calls settled at their bound.\n"


def test_a_second_run_changes_nothing() -> None:
    settle(reserve([limit(None)], 100), settled(60))
    reserve([limit(None)], 100)
    tick()
    before = list(CallLog.objects.values())

    assert tick() == ""
    assert list(CallLog.objects.values()) == before


# Batches ----------------------------------------------------------------------------------------


@pytest.fixture
def batch(anthropic_api: AnthropicSimulator) -> Batch:
    """One that waits."""
    submitted: Batch = ai_budget.submit_batch(["one", "two"], feature="nightly")
    return submitted


def due_now() -> None:
    BatchSubmission.objects.exclude(next_look_at=None).update(next_look_at=periods.now())


def test_batches_are_sent_read_and_finished(batch: Batch) -> None:
    assert tick() == ""
    assert batch.submissions.get().status == "sent"
    due_now()

    assert tick() == ""

    batch.refresh_from_db()
    assert (batch.status, batch.succeeded, batch.held_nanousd) == ("finished", 2, 0)
    assert batch.told_at is not None


def test_another_queue_may_have_them(batch: Batch) -> None:
    call_command("ai_budget_tick", leave_batches=True)

    assert batch.submissions.get().status == "waiting"


def test_what_was_never_sent_is_released_and_not_booked_for_being_late(batch: Batch) -> None:
    with periods.override_clock(lambda: NOON + timedelta(days=3)):
        assert tick() == ""

    assert CallLog.objects.get().status == "released"


def test_a_late_batch_is_given_up_though_another_queue_has_it(batch: Batch) -> None:
    with periods.override_clock(lambda: NOON + timedelta(days=3)):
        call_command("ai_budget_tick", leave_batches=True)

    batch.refresh_from_db()
    assert (batch.status, batch.expired) == ("finished", 2)


@pytest.mark.parametrize(
    ("error", "told"),
    [(LedgerUnavailable("Away."), CommandError), (ValueError("a fault"), ValueError)],
)
def test_a_batch_that_cannot_go_on_holds_nothing_else_up(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, error: Exception, told: type[Exception]
) -> None:
    other = ai_budget.submit_batch(["one"], feature="nightly")
    reserve([limit(None)], 100)
    ledgers.current().take([bucket(1)], at=NOON - timedelta(days=3))
    stuck, whole = batch.submissions.get().pk, batches.advance

    def advance(submission_id: int) -> None:
        if submission_id == stuck:
            raise error
        whole(submission_id)

    monkeypatch.setattr(batches, "advance", advance)
    with pytest.raises(told, match=str(error)):
        tick()

    assert other.submissions.get().status == "sent"
    assert CallLog.objects.filter(status="estimated").exists()
    assert not RateBucket.objects.exists()


def test_what_cannot_be_tidied_holds_no_overdue_call_up(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise LedgerUnavailable("Away.")

    reserve([limit(None)], 100)
    monkeypatch.setattr(batches, "tidy", fail)

    with pytest.raises(CommandError, match=r"^Away\.$"):
        tick()

    assert CallLog.objects.filter(status="estimated").exists()


def test_all_faults_are_logged_and_the_first_is_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise KeyError("the secret of Mrs. Miller")

    monkeypatch.setattr(batches, "tidy", fail)
    monkeypatch.setattr(DatabaseLedger, "settle_overdue", failing(ValueError("a fault")))

    with pytest.raises(KeyError):
        tick()

    assert [record.getMessage() for record in caplog.records] == [
        "A step of the periodic work failed: KeyError",
        "A step of the periodic work failed: ValueError",
    ]
