"""What a measurement stands on: one database for each process, and the local API beside it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any


def in_own_process(module: str, database: str, arguments: Sequence[str]) -> None:
    """Run a benchmark once more for one database: Django is configured once a process."""
    command = [sys.executable, "-m", module, "--database", database, *arguments]
    subprocess.run(command, check=True)


def configure(database: str) -> None:
    """Set Django up on the test suite's settings for that database."""
    os.environ["AI_BUDGET_TEST_DB"] = database
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    import django

    django.setup()


@contextmanager
def empty_database() -> Iterator[None]:
    """Create the database with its tables, and drop it in the end."""
    from django.test.utils import setup_databases, teardown_databases

    databases = setup_databases(verbosity=0, interactive=False)
    try:
        yield
    finally:
        teardown_databases(databases, verbosity=0)


class LocalApi:
    """The local API, served from a process of its own as a provider would."""

    def __init__(self, asks: IO[str], answers: IO[str]) -> None:
        self._asks, self._answers = asks, answers
        self.base_url: str = answers.readline().strip()

    def billed(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the model and the usage of every message it charges for, in order."""
        self._asks.write("\n")
        self._asks.flush()
        billed: list[tuple[str, dict[str, Any]]] = json.loads(self._answers.readline())
        return billed


_SERVE = """
import json, sys
from ai_budget.testing.simulator import AnthropicSimulator
api = AnthropicSimulator(history={history}).start()
print(api.base_url, flush=True)
for asked in sys.stdin:
    print(json.dumps([(bill.model, bill.usage) for bill in api.billed]), flush=True)
"""


@contextmanager
def local_api(*, history: int | None) -> Iterator[LocalApi]:
    """Serve the local API, which remembers so many requests and bills, or all of them."""
    command = [sys.executable, "-c", _SERVE.format(history=history)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield LocalApi(process.stdin, process.stdout)
        process.stdin.close()


def percentile(values: Sequence[float], percent: int) -> float:
    """Return what so many percent of the values do not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
