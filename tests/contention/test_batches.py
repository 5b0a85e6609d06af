"""Workers that are killed at every step of a batch's life, and others that go on with it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest

pytest.importorskip("celery")

from django.core.management import call_command

from ai_budget import periods, tasks
from ai_budget.guard.batch.rows import LEASE
from ai_budget.ledger import base as ledgers
from ai_budget.ledger import redis as redis_ledger
from ai_budget.models import Batch, CallLog, SpendWindow
from ai_budget.testing import AnthropicSimulator
from tests.batches.brokers import Broker, call, of_rabbitmq, used
from tests.batches.done import (
    PROMPTS,
    assert_done_once,
    assert_never_sent,
    forget_handed,
    is_finished,
    is_let_go,
    make_due,
    submission_of,
    submit,
)
from tests.contention import batch_work, points, work
from tests.contention.batch_work import Moment
from tests.contention.books import tick
from tests.contention.conftest import Store
from tests.contention.processes import Workers
from tests.contention.test_crashes import each_point_of
from tests.depth import some_of
from tests.guard.books import wait_until
from tests.processes import PATIENCE

pytestmark = [pytest.mark.contention, pytest.mark.django_db(transaction=True)]

MUCH_LATER = timedelta(hours=27)
"""When a batch that the API does not show was never there."""


@pytest.fixture(autouse=True)
def nothing_handed() -> Iterator[None]:
    forget_handed()
    yield
    forget_handed()


@pytest.fixture(autouse=True)
def ready(store: Store, workers: Workers, api: AnthropicSimulator, settings: Any) -> None:
    """Have processes that are forked begin at once, with connections to the API of their own."""
    store.settings["API_KEY"] = "batches"
    settings.AI_BUDGET = dict(store.settings)
    workers.one(batch_work.get_ready)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait only a moment for what a dead worker had in its hands."""
    monkeypatch.setattr(redis_ledger, "CLAIM_SECONDS", 0.2)


def go_on(batch: Batch) -> None:
    """Have another worker do the rest, once the dead one's lease is over."""
    for _ in range(batch_work.MOST_TICKS):
        make_due()
        call_command("ai_budget_tick", stdout=StringIO())
    assert is_finished(batch)


# At every point ----------------------------------------------------------------------------------


def test_a_worker_that_is_killed_at_any_point_of_a_batch_leaves_the_rest_to_others(
    store: Store, workers: Workers, api: AnthropicSimulator
) -> None:
    made: list[Batch] = []

    def begin() -> None:
        CallLog.objects.all().delete()
        Batch.objects.all().delete()
        SpendWindow.objects.all().delete()
        store.flush()
        forget_handed()
        api.reset()
        made.append(submit(PROMPTS[:3]))

    for _ended in each_point_of(
        workers, work.die_at, batch_work.go_through, 2, every=45, before=begin
    ):
        go_on(made[-1])
        assert_done_once(made[-1], api)


# Celery workers ----------------------------------------------------------------------------------

STEPS = "ai_budget.batches.steps"
API = "ai_budget.guard.batch.api"

SENDING = {
    "before it has the submission": Moment(function="ai_budget.batches.advance"),
    "before it is marked": Moment(function=f"{STEPS}._mark"),
    "before it is sent": Moment(function=f"{API}.create"),
    "after the API has taken it": Moment(function=f"{API}.create", after=True),
    "after that was recorded": Moment(function=f"{STEPS}._record", after=True),
}
COLLECTING = {
    "before the results are read": Moment(function=f"{API}.results_in_chunks"),
    "in the transaction that books some": Moment(
        function="ai_budget.guard.batch.results._note", after=True, time=2
    ),
    "after some were booked, before they are handed on": Moment(
        function=f"{STEPS}.hand_results", time=2
    ),
    "while the callback has a result": Moment(function="tests.batches.done.note", time=2),
    "after some were handed on, before that is noted": Moment(
        function="ai_budget.batches.handing._note_handed", time=2
    ),
    "between two chunks": Moment(function=f"{STEPS}.hand_results", after=True),
    "after all was booked, before it is finished": Moment(function=f"{STEPS}.finish_if_over"),
    "after it was finished, before that is told": Moment(
        function="ai_budget.batches.ending._tell_finished"
    ),
}


@pytest.fixture
def broker(store: Store) -> Iterator[Broker]:
    """RabbitMQ beside the ledger in the database, and Redis beside that in Redis."""
    broker = of_rabbitmq() if store.redis is None else Broker(url=store.redis_url)
    yield broker
    broker.forget()


@pytest.fixture
def survivor(broker: Broker, workers: Workers, api: AnthropicSimulator) -> Iterator[Broker]:
    """A Celery worker that goes on, with a queue of its own."""
    queue = Broker(url=broker.url)
    child = workers.one(work.start, batch_work.be_a_celery_worker, queue)
    yield queue
    workers.one(points.kill, child)
    queue.forget()


def kill_a_worker(workers: Workers, broker: Broker, deadly: Moment, batch: Batch) -> None:
    """Have a worker be killed at a moment of what it does with a batch."""
    child = workers.one(work.start, batch_work.be_a_celery_worker, broker, deadly)
    with used(broker.app()):
        tasks.send([submission_of(batch).pk])
    assert workers.one(batch_work.wait_for_death, child) == -signal.SIGKILL


def follow(batch: Batch, survivor: Broker, api: AnthropicSimulator) -> None:
    """Have the other worker do the rest, tick by tick, once the dead one's lease is over."""
    make_due()
    with used(survivor.app()) as app:

        def goes_on_until_it_is_over() -> bool:
            if is_let_go(batch):
                make_due()
            call(tasks.tick, app)
            time.sleep(0.1)
            return is_finished(batch) or is_lost(batch)

        wait_until(goes_on_until_it_is_over, PATIENCE)
    if is_finished(batch):
        tick()
        assert_done_once(batch, api)
        return
    tick(periods.now() + MUCH_LATER)
    assert is_finished(batch)
    assert_never_sent(batch, api)


def is_lost(batch: Batch) -> bool:
    """Whether nobody knows of it at the API, and it is only looked for now and then."""
    submission = submission_of(batch)
    if submission.status != "uncertain" or submission.next_look_at is None:
        return False
    return submission.next_look_at > ledgers.current().now() + LEASE * 2


@pytest.mark.parametrize("deadly", some_of(SENDING.values()), ids=some_of(SENDING))
def test_a_celery_worker_that_is_killed_while_it_sends_is_followed_by_another(
    broker: Broker, survivor: Broker, workers: Workers, api: AnthropicSimulator, deadly: Moment
) -> None:
    batch = submit()

    kill_a_worker(workers, broker, deadly, batch)

    follow(batch, survivor, api)


@pytest.mark.parametrize("deadly", some_of(COLLECTING.values()), ids=some_of(COLLECTING))
def test_a_celery_worker_that_is_killed_while_it_collects_is_followed_by_another(
    broker: Broker, survivor: Broker, workers: Workers, api: AnthropicSimulator, deadly: Moment
) -> None:
    batch = submit()
    with used(survivor.app()):
        tasks.send([submission_of(batch).pk])
    wait_until(lambda: is_let_go(batch), PATIENCE)
    make_due()

    kill_a_worker(workers, broker, deadly, batch)

    follow(batch, survivor, api)
