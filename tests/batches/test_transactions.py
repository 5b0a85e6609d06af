"""Batches and transactions: the caller's, those of a second alias, and two at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.db import connection, connections, transaction

from ai_budget.exceptions import CallInsideTransaction
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallLog
from ai_budget.signals import batch_waiting
from ai_budget.testing import AnthropicSimulator
from ai_budget.testing.budgets import override_budget
from tests.batches.submitted import (
    FEATURE,
    HAIKU,
    assert_nothing_left,
    differences,
    submit,
    work_off,
)
from tests.guard.books import assert_balanced, ledger_of_the_run, rows, site

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "ledger"]),
    pytest.mark.usefixtures("emptied_row_by_row", "known_alias"),
]

PROMPT = "Why is the sky blue?"


@pytest.fixture(scope="module")
def known_alias() -> Iterator[None]:
    """A second connection to the same database, as a site with ATOMIC_REQUESTS has one.

    Django lets a test use only what was there before it.
    """
    default = connections.settings["default"]
    # As a mirror it is not emptied by itself.
    test = {**default["TEST"], "MIRROR": "default"}
    connections.settings["ledger"] = {**default, "TEST": test}
    yield
    connections["ledger"].close()
    del connections["ledger"]
    del connections.settings["ledger"]


@pytest.fixture
def second_alias(api: AnthropicSimulator, settings: Any) -> None:
    """The ledger writes through the second connection."""
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has one writer a file")
    settings.AI_BUDGET = {**settings.AI_BUDGET, "LEDGER_DATABASE": "ledger"}


@pytest.fixture
def waiting() -> Iterator[list[int]]:
    """The submissions that workers are told of, and whether the row was there for all."""
    told: list[int] = []

    def hear(submission_ids: list[int], **kwargs: object) -> None:
        told.extend(submission_ids)

    batch_waiting.connect(hear)
    yield told
    batch_waiting.disconnect(hear)


# The caller's ------------------------------------------------------------------------------------


def test_inside_a_transaction_nothing_is_read_and_nothing_written(
    api: AnthropicSimulator, waiting: list[int]
) -> None:
    def requests() -> Iterator[str]:
        raise AssertionError("was read")
        yield ""

    with transaction.atomic(), pytest.raises(CallInsideTransaction):
        submit(requests())

    assert waiting == []
    assert_nothing_left(api)


def test_requests_may_use_transactions_of_their_own(api: AnthropicSimulator) -> None:
    def requests() -> Iterator[str]:
        with transaction.atomic():
            yield_me = PROMPT
        yield yield_me

    assert work_off(submit(requests())).succeeded == 1


def test_workers_are_told_at_once_where_there_is_no_transaction(
    api: AnthropicSimulator, waiting: list[int]
) -> None:
    batch = submit([PROMPT])

    assert waiting == [batch.submissions.get().pk]


def test_with_a_second_alias_the_callers_transaction_undoes_nothing(
    api: AnthropicSimulator, second_alias: None, waiting: list[int]
) -> None:
    with transaction.atomic():
        batch = submit([PROMPT, PROMPT])
        # Its rows are committed on their own alias, so workers are told of them now.
        assert waiting == [BatchSubmission.objects.using("ledger").get().pk]
        transaction.set_rollback(True)

    assert Batch.objects.get() == batch
    assert site().held_nanousd == batch.held_nanousd > 0
    assert work_off(batch).succeeded == 2
    assert_balanced()


def test_with_a_second_alias_requests_may_come_out_of_the_callers_transaction(
    api: AnthropicSimulator, second_alias: None
) -> None:
    with transaction.atomic():
        CallLog.objects.exists()
        prompts = CallLog.objects.none().values_list("model", flat=True)
        batch = submit([*prompts, PROMPT])

    assert batch.total == 1


# Two at once -------------------------------------------------------------------------------------


def at_once(*submissions: Any) -> list[Any]:
    """Run them in threads; return what each returned or raised."""

    def run(step: Any) -> Any:
        try:
            return step()
        except Exception as error:
            return error
        finally:
            connections.close_all()

    with ThreadPoolExecutor(len(submissions)) as pool:
        return list(pool.map(run, submissions))


def meet_before(monkeypatch: pytest.MonkeyPatch, owner: Any, step: str) -> None:
    """Let two threads begin a step at the same moment."""
    together, done = threading.Barrier(2), getattr(owner, step)

    def wait_and_do(*args: Any, **kwargs: Any) -> Any:
        together.wait(10)
        return done(*args, **kwargs)

    monkeypatch.setattr(owner, step, wait_and_do)


def test_submitted_with_one_key_by_two_at_once_it_is_one_batch(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ai_budget.guard.batch.preparing import Preparation

    meet_before(monkeypatch, Preparation, "open")

    first, second = at_once(
        lambda: submit([PROMPT] * 2, idempotency_key="key"),
        lambda: submit([PROMPT] * 2, idempotency_key="key"),
    )

    assert first == second == Batch.objects.get()
    assert BatchItem.objects.count() == 2
    assert site().held_nanousd == first.held_nanousd
    assert site().calls == 2
    assert sorted(row.status for row in rows()) == ["released", "reserved"]
    assert work_off(first).succeeded == 2
    assert_balanced()


def test_submitted_with_one_key_for_two_payers_one_of_them_is_refused(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ai_budget.guard.batch.preparing import Preparation

    meet_before(monkeypatch, Preparation, "open")

    outcomes = at_once(
        lambda: submit([PROMPT], idempotency_key="key", subject="one"),
        lambda: submit([PROMPT], idempotency_key="key", subject="other"),
    )

    (error,) = [it for it in outcomes if not isinstance(it, Batch)]
    assert isinstance(error, ValueError)
    batch = Batch.objects.get()
    assert site().held_nanousd == batch.held_nanousd
    assert differences(batch) == []


def test_two_that_do_not_both_fit_never_pass_the_limit(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = submit([PROMPT] * 3, model=HAIKU)
    meet_before(monkeypatch, ledger_of_the_run(), "reserve")

    with override_budget(FEATURE, daily_limit_usd=one.reserved_usd * 2):
        outcomes = at_once(
            lambda: submit([PROMPT] * 3, model=HAIKU), lambda: submit([PROMPT] * 3, model=HAIKU)
        )

    (refused,) = [it for it in outcomes if not isinstance(it, Batch)]
    assert refused.items_fit == 0
    assert site().held_nanousd == one.held_nanousd * 2
    assert Batch.objects.count() == 2
