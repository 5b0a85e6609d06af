"""Arrivals of many clients, from a file of their rates."""

from __future__ import annotations

import csv
import gzip
import itertools
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 2026


@dataclass(frozen=True, slots=True, order=True)
class Arrival:
    """One request: seconds after the beginning, and whose it is."""

    at: float
    client: int


@dataclass(frozen=True, slots=True)
class _Window:
    begins: float
    rate: float
    cv: float


def arrivals(path: Path, *, seconds: float, per_second: float) -> list[Arrival]:
    """Return the arrivals of all clients, in order, the whole file compressed to ``seconds``.

    The file has a row for each client and window with the columns ``client``,
    ``window_start_s``, ``rate_rps`` and ``cv`` (the coefficient of variation of the gaps).
    Rates keep their proportions, and come to ``per_second`` on average, all together. A client's
    gaps are drawn from the gamma distribution of its median cv, and pass as fast as its rate is.
    """
    clients = _read(path)
    starts = sorted({window.begins for windows in clients.values() for window in windows})
    length = min(later - one for one, later in itertools.pairwise(starts))
    whole = starts[-1] + length - starts[0]
    asked = sum(window.rate * length for windows in clients.values() for window in windows)
    scale = per_second * seconds / asked
    found = [
        Arrival((at - starts[0]) * seconds / whole, client)
        for client, windows in clients.items()
        for at in _draw(windows, length, scale, random.Random(f"{SEED} {client}"))
    ]
    return sorted(found)


def _read(path: Path) -> dict[int, list[_Window]]:
    opened = gzip.open if path.suffix == ".gz" else open
    clients = defaultdict(list)
    with opened(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            window = _Window(float(row["window_start_s"]), float(row["rate_rps"]), float(row["cv"]))
            clients[int(row["client"])].append(window)
    return {
        client: sorted(windows, key=lambda window: window.begins)
        for client, windows in clients.items()
    }


def _draw(
    windows: list[_Window], length: float, scale: float, chance: random.Random
) -> Iterator[float]:
    """Yield when a client asks."""
    shape = 1 / statistics.median(window.cv for window in windows) ** 2
    # The beginning falls into a gap, and rather into a long one.
    gap = chance.random() * chance.gammavariate(shape + 1, 1 / shape)
    for window in windows:
        expected = window.rate * length * scale
        passed = 0.0
        while passed + gap <= expected:
            passed += gap
            yield window.begins + length * passed / expected
            gap = chance.gammavariate(shape, 1 / shape)
        gap -= expected - passed
