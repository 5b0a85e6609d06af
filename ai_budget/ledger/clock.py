"""The clock of a store, which all workers share, whatever their own says."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from ai_budget import periods

CLOCK_SECONDS = 30.0
"""How long the store's clock is carried on by the worker's monotonic one."""

_LONG_AGO = datetime.min.replace(tzinfo=UTC)


class StoreClock:
    """A store's clock, read now and then and carried on by a clock that cannot be set.

    ``read`` asks the store, and returns None where it has no clock: then the worker's counts.
    """

    def __init__(self, read: Callable[[], datetime | None]) -> None:
        self._read = read
        # When it was read, by the monotonic clock, the store's and the worker's: one value, for
        # a thread must not carry on one reading from the moment of another.
        self._reading = (float("-inf"), _LONG_AGO, _LONG_AGO)

    def now(self) -> datetime:
        """Return the present in UTC."""
        worker = periods.now()
        read_at, store_at, worker_at = self._reading
        elapsed = periods.monotonic() - read_at
        # A machine that slept moved its clock but not its monotonic one.
        slept = abs((worker - worker_at).total_seconds() - elapsed) > 1
        if elapsed <= CLOCK_SECONDS and not slept:
            return store_at + timedelta(seconds=elapsed)
        read = self._read()
        if read is None:
            return worker
        self._reading = (periods.monotonic(), read, periods.now())
        return read
