"""Real Celery workers, on Redis and on RabbitMQ: processes that a site would start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("celery")

from celery import beat, current_app

from ai_budget import tasks
from ai_budget.guard.batch import preparing
from ai_budget.models import BatchSubmission
from ai_budget.testing import AnthropicSimulator
from tests.batches.brokers import Broker, of_rabbitmq, of_redis, used
from tests.batches.done import (
    assert_done_once,
    forget_handed,
    handed,
    is_finished,
    is_let_go,
    make_due,
    submit,
)
from tests.guard.books import wait_until
from tests.run import ROOT
from tests.settings import AI_BUDGET as GIVEN

pytestmark = pytest.mark.django_db(transaction=True)

PATIENCE = 60
"""Seconds that a worker may take to start and to do its work, on a machine that is busy."""

BEAT_SCHEDULE = {"ai_budget": {"task": "ai_budget.tick", "schedule": timedelta(minutes=1)}}


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A worker process, with two that work at a time."""

    broker: Broker
    process: subprocess.Popen[bytes]
    log: Path

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for what the worker is to do; raise ``RuntimeError`` where it has ended."""

        def so() -> object:
            if self.process.poll() is not None:
                raise RuntimeError(f"the worker ended:\n{self.log.read_text()}")
            return condition()

        wait_until(so, PATIENCE)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start_worker(broker: Broker, pool: str, api: AnthropicSimulator, log: Path) -> Worker:
    given = {**GIVEN, "API_KEY": "local", "BASE_URL": api.base_url, "QUEUE": "celery"}
    environment = {
        **os.environ,
        "AI_BUDGET_TEST_SETTINGS": json.dumps(given),
        "AI_BUDGET_TEST_BROKER": broker.url,
        "AI_BUDGET_TEST_QUEUE": broker.queue,
    }
    command = [sys.executable, "-m", "celery", "-A", "tests.batches.celery_app", "worker"]
    options = ["--pool", pool, "--concurrency", "2", "--loglevel", "INFO"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *options, *quiet],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Worker(broker=broker, process=process, log=log)


WORKERS = {"redis": (of_redis, "prefork"), "rabbitmq": (of_rabbitmq, "threads")}
"""The brokers, and whether what works at a time is processes or threads."""


@pytest.fixture(scope="module")
def running(
    django_db_setup: None,
    anthropic_api_server: AnthropicSimulator,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Mapping[str, Worker]]:
    """A worker for each broker that is there; they start side by side, and stay."""
    logs = tmp_path_factory.mktemp("celery")
    found = {}
    for name, (broker, pool) in WORKERS.items():
        with suppress(pytest.skip.Exception):
            found[name] = start_worker(broker(), pool, anthropic_api_server, logs / name)
    yield found
    for worker in found.values():
        worker.stop()
        worker.broker.forget()


@pytest.fixture(params=list(WORKERS))
def worker(
    request: pytest.FixtureRequest,
    running: Mapping[str, Worker],
    api: AnthropicSimulator,
    settings: Any,
) -> Iterator[Worker]:
    """A worker, and a site that sends it tasks."""
    name = request.param
    if name not in running:
        WORKERS[name][0]()  # says why
    settings.AI_BUDGET = {**settings.AI_BUDGET, "QUEUE": "celery"}
    forget_handed()
    with used(running[name].broker.app()):
        yield running[name]
    forget_handed()


def tick_by_beat() -> None:
    """Have Celery beat send what a site has in its schedule, a minute later."""
    scheduler = beat.Scheduler(app=current_app, schedule={}, lazy=True)
    scheduler.update_from_dict(BEAT_SCHEDULE)
    (entry,) = scheduler.schedule.values()
    assert entry.last_run_at is not None
    entry.last_run_at -= timedelta(minutes=1)
    scheduler.tick()
    scheduler.connection.close()


def test_a_batch_is_sent_at_once_and_collected_by_the_ticks_of_beat(
    worker: Worker, api: AnthropicSimulator
) -> None:
    batch = submit()

    worker.wait_until(lambda: is_let_go(batch))
    assert len(api.batches.ids) == 1
    make_due()
    tick_by_beat()

    worker.wait_until(lambda: is_finished(batch))
    assert_done_once(batch, api)
    assert set(handed().values()) == {1}


def test_tasks_that_come_many_times_and_at_once_do_it_once(
    worker: Worker, api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "MOST_BYTES", 1)  # each item is a submission
    batch = submit()
    ids = list(BatchSubmission.objects.values_list("pk", flat=True))
    assert len(ids) == batch.total

    tasks.send(ids * 4)
    worker.wait_until(lambda: is_let_go(batch))
    make_due()
    tasks.send(ids * 4)

    worker.wait_until(lambda: is_finished(batch))
    assert_done_once(batch, api)
    assert set(handed().values()) == {1}
