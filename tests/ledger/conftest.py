"""A clock that stands at noon until a test moves it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest

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
