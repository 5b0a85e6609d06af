"""The brokers that tests of Celery use, each for itself alone: nobody else's queue is touched."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import celery
import pytest
import redis
from celery import Celery, Task
from kombu import Connection

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
RABBITMQ_URL = os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672//")


def _unique() -> str:
    return f"ai-budget-test-{uuid.uuid4().hex}"


@dataclass(frozen=True, kw_only=True)
class Broker:
    """One queue of a broker; all that a test leaves there has its name."""

    url: str
    queue: str = field(default_factory=_unique)

    def app(self) -> Celery:
        """Return a site's Celery app, as its ``celery.py`` would make it."""
        app = Celery("tests", broker=self.url, set_as_current=False)
        options: dict[str, Any] = {}
        if self.url.startswith("redis"):
            options = {"global_keyprefix": f"{self.queue}:"}
        elif self.url.startswith("memory"):
            options = {"polling_interval": 0.01}
        app.conf.update(
            task_default_queue=self.queue,
            broker_transport_options=options,
            broker_connection_retry_on_startup=True,
            # No queues but this one.
            worker_enable_remote_control=False,
            worker_hijack_root_logger=False,
            # What a site may have set for its own tasks.
            task_acks_late=True,
            task_ignore_result=False,
        )
        app.autodiscover_tasks()
        return app

    def waiting(self, app: Celery) -> list[tuple[str, list[int]]]:
        """Take the messages out of the queue; return their tasks and arguments."""
        found = []
        with app.connection_for_read() as connection:
            queue = app.amqp.queues[self.queue](connection.default_channel)
            queue.declare()
            while (message := queue.get(no_ack=True)) is not None:
                found.append((message.headers["task"], list(message.payload[0])))
        return found

    def forget(self) -> None:
        """Leave nothing behind."""
        if self.url.startswith("redis"):
            with redis.Redis.from_url(self.url) as client:
                for key in client.scan_iter(match=f"{self.queue}:*", count=1000):
                    client.delete(key)
        elif self.url.startswith("amqp"):
            with self.app() as app, app.connection_for_write() as connection:
                channel: Any = connection.default_channel
                channel.queue_delete(self.queue)
                channel.exchange_delete(self.queue)


def call(task: Task[[], None], app: Celery) -> None:
    """Send a task over a connection that is closed again, unlike those that an app keeps."""
    with app.connection_for_write() as connection:
        task.apply_async(producer=app.amqp.Producer(connection))


@contextmanager
def used(app: Celery) -> Iterator[Celery]:
    """Have an app be the site's own inside the block, in every thread.

    A worker that is started in it sets the level of the root logger, and leaves it so.
    """
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    proxy: Any = celery.current_app
    before = proxy._get_current_object()
    app.set_current()
    app.set_default()
    try:
        yield app
    finally:
        before.set_current()
        before.set_default()
        app.close()
        root.setLevel(level)
        root.handlers[:] = handlers


def in_memory() -> Broker:
    return Broker(url="memory://")


def of_redis() -> Broker:
    """Redis, or a skipped test."""

    def ask() -> None:
        with redis.Redis.from_url(REDIS_URL, socket_connect_timeout=3) as client:
            client.ping()

    _ensure_there("Redis", ask)
    return Broker(url=REDIS_URL)


def of_rabbitmq() -> Broker:
    """RabbitMQ, or a skipped test."""

    def ask() -> None:
        with Connection(RABBITMQ_URL, connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=0)

    _ensure_there("RabbitMQ", ask)
    return Broker(url=RABBITMQ_URL)


def _ensure_there(name: str, ask: Callable[[], None]) -> None:
    try:
        ask()
    except Exception as error:
        reason = f"{name} does not answer: {type(error).__name__}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
