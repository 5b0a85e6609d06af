"""Processes that tests start. Each is forked off one that has imported everything already.

To import Django, the SDK and the tests' own modules takes seconds of a processor, and a test that
kills its workers starts dozens.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

PATIENCE = 60
"""Seconds that a process may take, on a machine that is busy."""


def start(
    work: Callable[..., None], *arguments: Any, daemon: bool = False
) -> tuple[BaseProcess, Connection]:
    """Start a process that is told, and tells, over a pipe: its last argument, and what returns.

    It inherits the environment of the tests' first such process.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.preloaded"])
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(*arguments, theirs), daemon=daemon)
    process.start()
    theirs.close()
    return process, ours
