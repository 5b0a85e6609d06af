"""Threads that do their work at the same moment, each over a connection of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from django.db import connection, connections

THREADS = 8
Result = TypeVar("Result")


def together(work: Sequence[Callable[[], Result]]) -> list[Result]:
    """Do everything at the same moment, each in a thread with a connection of its own."""
    start = threading.Barrier(len(work))

    def begin(one: Callable[[], Result]) -> Result:
        try:
            connection.ensure_connection()
            start.wait(timeout=30)
            return one()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=len(work)) as pool:
        return list(pool.map(begin, work, timeout=120))
