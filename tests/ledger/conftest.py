"""A clock that stands at noon until a test moves it, and connections of a stricter level."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.db import connection, connections

from ai_budget import periods
from tests.ledger.given import NOON


class Clock:
    """The time, which passes only when told to."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now

    def pass_by(self, time: timedelta) -> None:
        self.now += time


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    with periods.override_clock(clock):
        yield clock


LEVELS: dict[str, list[str]] = {
    "postgresql": ["repeatable read", "serializable"],
    "mysql": ["repeatable read", "serializable"],
}


@pytest.fixture(params=LEVELS.get(connection.vendor, []))
def isolated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that are made from now on, in threads, are of a stricter level."""
    level: Any = request.param
    if connection.vendor == "postgresql":
        from django.db.backends.postgresql.psycopg_any import IsolationLevel

        level = IsolationLevel[level.upper().replace(" ", "_")]
    options = {**connections.settings["default"].get("OPTIONS", {}), "isolation_level": level}
    monkeypatch.setitem(connections.settings["default"], "OPTIONS", options)
