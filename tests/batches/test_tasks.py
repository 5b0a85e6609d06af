"""The Celery tasks in a site's own process: what is sent, when, and what a bad broker costs."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

pytest.importorskip("celery")

from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.worker import state
from django.db import transaction
from kombu.exceptions import OperationalError

from ai_budget import batches, periods, tasks
from ai_budget.models import BatchSubmission, CallLog
from ai_budget.testing import AnthropicSimulator
from tests.batches.brokers import Broker, call, in_memory, of_rabbitmq, of_redis, used
from tests.batches.done import (
    assert_done_once,
    forget_handed,
    is_finished,
    make_due,
    status_of,
    submission_of,
    submit,
)
from tests.guard.books import wait_until
from tests.ledger.given import NOON, limit, reserve

ADVANCE = "ai_budget.advance"


@pytest.fixture(autouse=True)
def nothing_handed() -> Iterator[None]:
    forget_handed()
    yield
    forget_handed()


@pytest.fixture
def broker() -> Broker:
    return in_memory()


@pytest.fixture
def app(broker: Broker, api: AnthropicSimulator, settings: Any) -> Iterator[Celery]:
    """The app of a site whose batches go through Celery."""
    settings.AI_BUDGET = {**settings.AI_BUDGET, "QUEUE": "celery"}
    with used(broker.app()) as app:
        yield app


# Whose tasks they are ----------------------------------------------------------------------------


def test_a_site_finds_them_among_its_apps(broker: Broker) -> None:
    with used(broker.app()) as app:
        app.loader.import_default_modules()

        assert {ADVANCE, "ai_budget.tick"} <= set(app.tasks)


@pytest.mark.parametrize("name", [ADVANCE, "ai_budget.tick"])
def test_what_a_site_sets_for_its_own_tasks_is_not_for_them(broker: Broker, name: str) -> None:
    """A broker takes a message away from a worker that acknowledges it late, and works long."""
    with used(broker.app()) as app:
        task = app.tasks[name]

        assert app.conf.task_acks_late
        assert not task.acks_late
        assert task.ignore_result


# When they are sent ------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_a_task_is_sent_for_each_submission_with_its_id_alone(
    app: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ai_budget.guard.batch.preparing.MOST_BYTES", 1)

    submit()

    ids = list(BatchSubmission.objects.values_list("pk", flat=True))
    assert len(ids) == 5
    assert broker.waiting(app) == [(ADVANCE, [pk]) for pk in ids]


@pytest.mark.django_db(transaction=True)
def test_none_is_sent_where_the_tick_does_it(app: Celery, broker: Broker, settings: Any) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "QUEUE": "tick"}

    submit()

    assert broker.waiting(app) == []


@pytest.mark.django_db(transaction=True)
def test_a_task_is_sent_once_its_rows_are_committed(app: Celery, broker: Broker) -> None:
    batch = submit()
    broker.waiting(app)

    with transaction.atomic():
        batch.cancel()
        assert broker.waiting(app) == []

    assert broker.waiting(app) == [(ADVANCE, [submission_of(batch).pk])]


@pytest.mark.django_db(transaction=True)
def test_none_is_sent_for_what_was_rolled_back(app: Celery, broker: Broker) -> None:
    batch = submit()
    broker.waiting(app)

    with transaction.atomic():
        batch.cancel()
        transaction.set_rollback(True)

    assert broker.waiting(app) == []


# Who does them -----------------------------------------------------------------------------------


@contextmanager
def worker_beside(app: Celery) -> Iterator[None]:
    """Have a worker in a thread."""
    with start_worker(app, perform_ping_check=False):
        yield
        # It sees that it is to end once it has had another message, or after some seconds.
        ending: Any = state
        ending.should_terminate = 0
        call(tasks.tick, app)


@pytest.mark.django_db(transaction=True)
def test_a_worker_in_the_same_process_does_all_of_it(app: Celery, api: AnthropicSimulator) -> None:
    with worker_beside(app):
        batch = submit()
        wait_until(lambda: status_of(batch) == "sent")
        make_due()
        call(tasks.tick, app)
        wait_until(lambda: is_finished(batch))

    assert_done_once(batch, api)


@pytest.mark.django_db
def test_in_a_test_that_has_tasks_done_at_once_a_batch_is_sent_on_commit(
    app: Celery, api: AnthropicSimulator, django_capture_on_commit_callbacks: Any
) -> None:
    app.conf.task_always_eager = True

    with django_capture_on_commit_callbacks(execute=True):
        batch = submit()
        assert api.batches.ids == []

    assert status_of(batch) == "sent"
    make_due()
    call(tasks.tick, app)
    assert is_finished(batch)
    assert_done_once(batch, api)


@pytest.mark.django_db(transaction=True)
def test_a_tick_sends_a_task_for_all_that_is_due(app: Celery, broker: Broker) -> None:
    batches_due = [submit(), submit()]
    broker.waiting(app)

    tasks.tick()

    waiting = broker.waiting(app)
    assert waiting == [(ADVANCE, [submission_of(batch).pk]) for batch in batches_due]


@pytest.mark.django_db(transaction=True)
def test_a_task_that_comes_again_changes_nothing(app: Celery, api: AnthropicSimulator) -> None:
    batch = submit()
    pk = submission_of(batch).pk

    for _ in range(3):
        tasks.advance(pk)

    assert len(api.batches.ids) == 1
    assert status_of(batch) == "sent"


@pytest.mark.django_db(transaction=True)
def test_a_task_of_what_is_no_more_does_nothing(app: Celery) -> None:
    tasks.advance(2**31)


# A broker that does not answer -------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(params=["redis", "amqp"])
def away(
    request: pytest.FixtureRequest,
    api: AnthropicSimulator,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Have the site's broker be at a port where there is none."""
    monkeypatch.setattr(tasks, "PATIENCE", 0.3)
    settings.AI_BUDGET = {**settings.AI_BUDGET, "QUEUE": "celery"}
    return lambda port: used(Broker(url=f"{request.param}://127.0.0.1:{port}/").app())


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("answers", [False, True], ids=["closed", "silent"])
def test_a_broker_that_is_down_does_not_keep_a_request_waiting(
    away: Any, silent: int, answers: bool, api: AnthropicSimulator
) -> None:
    with away(silent if answers else 9):
        began = time.monotonic()
        batch = submit()
        took = time.monotonic() - began

    assert took < 3
    assert status_of(batch) == "waiting"
    batches.advance(submission_of(batch).pk)  # as the tick does
    assert status_of(batch) == "sent"


@pytest.mark.django_db(transaction=True)
def test_a_broker_that_is_down_does_not_keep_the_rest_of_a_tick_from_being_done(
    away: Any,
) -> None:
    # Its deadline passes once it is reserved, for a ledger that looks.
    reserve([limit(None)], deadline=periods.now() + timedelta(hours=1))
    CallLog.objects.update(deadline=NOON)
    overdue = CallLog.objects.get().pk

    with away(9):
        submit()
        with pytest.raises(OperationalError):
            tasks.tick()

    assert CallLog.objects.get(pk=overdue).status == "estimated"


@pytest.mark.parametrize("there", [of_redis, of_rabbitmq])
def test_where_the_first_of_two_brokers_is_down_the_second_has_it(
    there: Callable[[], Broker],
) -> None:
    second = there()
    scheme = second.url.partition(":")[0]
    both = replace(second, url=f"{scheme}://127.0.0.1:9/;{second.url}")
    try:
        with used(both.app()):
            tasks.send([7])

        with used(second.app()) as app:
            assert second.waiting(app) == [(ADVANCE, [7])]
    finally:
        second.forget()
