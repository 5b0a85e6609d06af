"""Which part of a prompt is worth writing to the API's cache: a pure decision from what came again.

A *position* is the end of a content block. Each time one is seen it is of a *kind*: how often it
was seen before and how long ago, where in the prompt it stands, how large the prompt is. What
matters is how much of a kind comes again within five minutes and within the hour, and that is
seen by fingerprint whether or not it was marked: nothing has to be tried out.

From those shares follow the prices of three states after this request, dead, alive for five
minutes or for an hour, each until the position is seen no more: a short chain with a price to
every step. A write pays where its premium is less than what it lowers those prices by.

The numbers here are shares and expectations and so floats; money is whole nano-dollars, and none
is counted here but the most that a plan can add to the bill.

The constants were chosen on the first 20 minutes of a trace of conversations and the kinds by a
look at its first 40; ``benchmarks.replay`` shows how they do on the rest of it and on traces of
other shapes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ai_budget import money
from ai_budget.pricing.rates import CACHE_LIFETIMES, Ratio, TokenRates

MINUTES, HOUR = "5m", "1h"
MOST_MARKS = 4
"""What a request may carry, says the same page."""

SETTLING_SECONDS = 2
"""An entry is there for others once its answer has begun; what comes sooner cannot read it."""

REMEMBERED_SECONDS = 2 * 3_600
"""How long a position that does not come again is remembered, and what was learned without use."""

HALF_LIFE_SECONDS = 2 * 3_600
"""After which what was seen counts half."""

_MOST_TIMES = 4
_RECENT_SECONDS = 60
_FORESIGHT = 0.75
"""How sure it is, each time a position is seen, that all goes on as it did."""
_TURNS = 12
_PRIOR_RUNS = 2.0
"""How many requests like this one the wider kind counts for beside the kind's own."""
_PRIORS = ((0.15, 0.2), (0.4, 0.5), (0.5, 0.6), (0.6, 0.7), (0.7, 0.8))
"""What comes again within five minutes and an hour where nothing was seen yet, by times seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a mark may stand: the end of a block, and the tokens since the position before.

    ``expected`` tokens decide what pays, ``most`` what it may cost. ``part`` is "s" in tools and
    system, "m" in messages, "e" at the end of the prompt.
    """

    fingerprint: str
    expected: int
    most: int
    part: str = "m"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """When a position was last seen (seconds), as what kind, and how often."""

    at: float
    times: int
    kind: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What is believed of a position's entry: alive until (seconds), or written and not answered.

    ``asked_at`` is when a request that writes it was sent, None once it was answered.
    """

    until: float
    ttl: str
    asked_at: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A mark at the end of ``positions[index]``."""

    index: int
    ttl: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Where to mark one prompt; ``read`` positions are expected to be read, ``written`` after.

    ``wished`` are the positions that should be alive after it, if all could be paid for.
    """

    marks: tuple[Mark, ...] = ()
    read: int = 0
    written: int = 0
    wished: int = field(default=0, compare=False)
    most_nanousd: int = 0

    @property
    def is_short(self) -> bool:
        """Whether more would pay than can be risked."""
        return self.wished > self.read + self.written


NO_PLAN = Plan()


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """What a prompt's tokens cost at their dearest, nano-dollars per million, and the geography."""

    rates: tuple[TokenRates, ...]
    geo: Ratio = (1, 1)

    @property
    def usual(self) -> TokenRates:
        return self.rates[0]

    def premium_nanousd(self, tokens: int, ttl: str) -> int:
        """Return the most that writing so many tokens costs above reading them plainly."""
        worst = max(_write(per, ttl) - per.input for per in self.rates)
        return max(0, money.ceil_div(tokens * worst * self.geo[0], 1_000_000 * self.geo[1]))


def _write(per: TokenRates, ttl: str) -> int:
    return per.cache_write_1h if ttl == HOUR else per.cache_write_5m


@dataclass(slots=True)
class Waiting:
    """What was seen since ``start`` and is too young to say that it does not come again.

    By kind: the tokens seen, and those of them that came again.
    """

    start: float
    kinds: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Horizon:
    """How long a sighting may take to come again, and when it counts as one that did not.

    Sightings wait together, those of ``step`` seconds at a time, until all are ``ripe``.
    """

    seconds: int
    step: int
    ripe: int


_HORIZONS = (
    _Horizon(seconds=CACHE_LIFETIMES[MINUTES], step=100, ripe=CACHE_LIFETIMES[MINUTES]),
    # A whole hour is long to wait: what comes later than this still counts, a little late.
    _Horizon(seconds=CACHE_LIFETIMES[HOUR], step=600, ripe=1_200),
)


@dataclass(slots=True)
class Reuse:
    """How much came again of each kind: for minutes and for an hour, tokens seen and seen again."""

    at: float = 0.0
    kinds: dict[str, list[int]] = field(default_factory=dict)
    waiting: tuple[list[Waiting], list[Waiting]] = field(default_factory=lambda: ([], []))

    def fade(self, at: float) -> None:
        """Let what was seen long ago count less, and what is ripe count."""
        passed = at - self.at
        if passed >= _RECENT_SECONDS:
            factor = 0.5 ** (passed / HALF_LIFE_SECONDS)
            self.kinds = {
                kind: [int(count * factor) for count in counts]
                for kind, counts in self.kinds.items()
                if (counts[0] + counts[2]) * factor >= 1
            }
            self.at = at
        for number, (horizon, waiting) in enumerate(zip(_HORIZONS, self.waiting, strict=True)):
            while waiting and waiting[0].start + horizon.step + horizon.ripe <= at:
                for kind, (seen, again) in waiting.pop(0).kinds.items():
                    for name in _lineage(kind):
                        counts = self.kinds.setdefault(name, [0, 0, 0, 0])
                        counts[2 * number] += seen
                        counts[2 * number + 1] += again
            if not waiting or waiting[-1].start + horizon.step <= at:
                waiting.append(Waiting(start=at))

    def seen(self, kind: str, tokens: int) -> None:
        """Count tokens of a kind that may come again."""
        for waiting in self.waiting:
            waiting[-1].kinds.setdefault(kind, [0, 0])[0] += tokens

    def seen_again(self, kind: str, tokens: int, *, since: float, after: float) -> None:
        """Count tokens that came again ``after`` seconds, seen as that kind at ``since``."""
        for number, (horizon, waiting) in enumerate(zip(_HORIZONS, self.waiting, strict=True)):
            if after > horizon.seconds:
                continue
            group = next((one for one in reversed(waiting) if one.start <= since), None)
            if group is not None:
                if kind in group.kinds:
                    group.kinds[kind][1] += tokens
                continue
            faded = int(tokens * 0.5 ** (after / HALF_LIFE_SECONDS))
            for name in _lineage(kind):
                if name in self.kinds:
                    self.kinds[name][2 * number + 1] += faded

    def shares(self, kind: str, run: int) -> tuple[float, float]:
        """Return the shares of a kind expected again within five minutes and within an hour.

        ``run`` are the tokens of that kind in this request: one request says little, however
        long it is.
        """
        soon, later = _PRIORS[int(kind[0])]
        weight = _PRIOR_RUNS * max(run, 1)
        for name in reversed(_lineage(kind)):
            counts = self.kinds.get(name)
            if counts is not None:
                soon = (counts[1] + weight * soon) / (counts[0] + weight)
                later = (counts[3] + weight * later) / (counts[2] + weight)
        later = min(max(soon, later), 1.0)
        return min(soon, later), later


def _lineage(kind: str) -> tuple[str, ...]:
    """Return a kind and the wider ones that it belongs to: "0m-3" is of "0m-" and "0m"."""
    return (kind, kind[:3], kind[:2])


def kind_of(position: Position, *, times: int, gap: float, size: int, share: str) -> str:
    """Return the kind of a position, seen ``times`` before and ``gap`` seconds ago.

    Its letters: times, part, how much of the prompt was seen before, and how long ago this was,
    or else the prompt's size.
    """
    if times == 0:
        return f"0{position.part}{share}{size}"
    part = "m" if position.part == "e" else position.part
    recent = "r" if gap <= _RECENT_SECONDS else "a" if gap <= CACHE_LIFETIMES[MINUTES] else "o"
    return f"{times}{part}{share}{recent}"


def look(
    positions: Sequence[Position], sightings: Sequence[Sighting | None], reuse: Reuse, at: float
) -> list[Sighting]:
    """Return what is now known of each position, and count in ``reuse`` what came again."""
    sightings = [
        old if old is not None and at - old.at < REMEMBERED_SECONDS else None for old in sightings
    ]
    reuse.fade(at)
    whole = sum(position.expected for position in positions)
    size = _size(whole)
    known = sum(
        position.expected for position, old in zip(positions, sightings, strict=True) if old
    )
    # Most of it: the prompt goes on from an earlier one. Some: it only begins as another did.
    share = "m" if 4 * known >= 3 * whole else "s" if 4 * known >= whole else "l"
    now = []
    for position, old in zip(positions, sightings, strict=True):
        if old is not None and at - old.at < SETTLING_SECONDS:
            now.append(old)
            continue
        times, gap = 0, math.inf
        if old is not None:
            gap = at - old.at
            times = min(old.times + 1, _MOST_TIMES)
            reuse.seen_again(old.kind, position.expected, since=old.at, after=gap)
        kind = kind_of(position, times=times, gap=gap, size=size, share=share)
        reuse.seen(kind, position.expected)
        now.append(Sighting(at=at, times=times, kind=kind))
    return now


def _size(tokens: int) -> int:
    """Return which of a few sizes a prompt has: below 2,048 tokens, 4,096 and so on."""
    return min(max(tokens.bit_length() - 11, 0), 6)


def plan(
    positions: Sequence[Position],
    sightings: Sequence[Sighting],
    entries: Sequence[Entry | None],
    *,
    reuse: Reuse,
    prices: Prices,
    minimum: int,
    afford_nanousd: int,
    at: float,
) -> Plan:
    """Return where to mark: all that is alive, and as far beyond as a write pays.

    ``minimum`` is the tokens below which the model caches nothing, ``afford_nanousd`` the most
    that the plan may add to the bill.
    """
    ends = list(itertools.accumulate(position.expected for position in positions))
    alive = [
        index
        for index, entry in enumerate(entries)
        if entry is not None
        and entry.asked_at is None
        and entry.until > at
        and ends[index] >= minimum
    ]
    start = alive[-1] + 1 if alive else 0
    runs = _runs(positions, sightings, entries, start=start, ends=ends, minimum=minimum, at=at)
    wish = _furthest(runs, reuse=reuse, prices=prices)
    hour, minutes = _affordable(
        wish, positions, start=start, ends=ends, minimum=minimum, prices=prices, most=afford_nanousd
    )
    last = max(hour, minutes)
    wanted = [alive[-1]] if alive else []
    if last > start:
        wanted = [last - 1, *wanted, hour - 1] if hour > start else [last - 1, *wanted]
        wanted += [run.end for run in reversed(runs) if run.end < last]
    # Then what others share, and then the longest.
    wanted += [index for index in reversed(alive) if positions[index].part == "s"]
    wanted += alive[::-1]
    chosen = sorted(list(dict.fromkeys(wanted))[:MOST_MARKS])
    return Plan(
        # An hour's mark may not come after one of five minutes; what is alive keeps its lifetime.
        marks=tuple(Mark(index=index, ttl=HOUR if index < hour else MINUTES) for index in chosen),
        read=start,
        written=max(last - start, 0),
        wished=max(wish),
        most_nanousd=_most(positions, prices, start=start, hour=hour, minutes=minutes),
    )


def at_most(positions: Sequence[Position], end: int, tokens: int) -> list[Position]:
    """Return the positions, where the first ``end`` of them have so many tokens at most."""
    return [
        replace(position, most=min(position.most, tokens)) if index < end else position
        for index, position in enumerate(positions)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """Positions in a row that are of one kind; ``end`` is the last."""

    end: int
    kind: str
    expected: int


def _runs(
    positions: Sequence[Position],
    sightings: Sequence[Sighting],
    entries: Sequence[Entry | None],
    *,
    start: int,
    ends: Sequence[int],
    minimum: int,
    at: float,
) -> list[_Run]:
    """Return what could be written, in runs whose ends could be marked."""
    runs: list[_Run] = []
    expected = 0
    for index in range(start, len(positions)):
        entry = entries[index]
        if (
            entry is not None
            and entry.asked_at is not None
            and at - entry.asked_at < SETTLING_SECONDS
        ):
            # Somebody is writing this: twice is dearer, and it cannot be read yet.
            return []
        kind = sightings[index].kind
        expected += positions[index].expected
        following = sightings[index + 1].kind if index + 1 < len(positions) else ""
        if kind != following and ends[index] >= minimum:
            runs.append(_Run(end=index, kind=kind, expected=expected))
            expected = 0
    return runs


def _furthest(runs: Sequence[_Run], *, reuse: Reuse, prices: Prices) -> tuple[int, int]:
    """Return how many positions to have alive for an hour, and how many for minutes."""
    chains = {part: _chain(part, reuse, prices.usual) for part in {run.kind[1] for run in runs}}
    gains = [_gains(run, reuse, prices.usual, chains) for run in runs]
    best, found = 0.0, (0, 0)
    hour_gain = 0.0
    for hour in range(len(runs) + 1):
        if hour:
            hour_gain += gains[hour - 1][1]
        gain = hour_gain
        for minutes in range(hour, len(runs) + 1):
            if minutes > hour:
                gain += gains[minutes - 1][0]
            if gain > best:
                best = gain
                found = runs[hour - 1].end + 1 if hour else 0, runs[minutes - 1].end + 1
    return found


def _affordable(
    wish: tuple[int, int],
    positions: Sequence[Position],
    *,
    start: int,
    ends: Sequence[int],
    minimum: int,
    prices: Prices,
    most: int,
) -> tuple[int, int]:
    """Return as much of a wish as can be paid for: its savings pay for the rest later."""
    hour, minutes = wish
    while minutes > start:
        if _most(positions, prices, start=start, hour=hour, minutes=minutes) <= most:
            return hour, minutes
        minutes -= 1
        hour = min(hour, minutes)
        if minutes == start or ends[minutes - 1] < minimum:
            break
    return 0, 0


def _most(
    positions: Sequence[Position], prices: Prices, *, start: int, hour: int, minutes: int
) -> int:
    """Return the most that writing so far adds to the bill."""
    hour = max(hour, start)
    long = sum(position.most for position in positions[start:hour])
    short = sum(position.most for position in positions[hour:minutes])
    return prices.premium_nanousd(long, HOUR) + prices.premium_nanousd(short, MINUTES)


_Chain = list[tuple[float, float, float]]
"""By times seen: the price of what is to come if the entry is dead, lives minutes, or an hour."""


def _chain(part: str, reuse: Reuse, per: TokenRates) -> _Chain:
    shares = [
        reuse.shares(f"{times}{'m' if part == 'e' else part}", 1_024)
        for times in range(1, _MOST_TIMES + 1)
    ]
    state = (0.0, 0.0, 0.0)
    for _ in range(_TURNS):
        state = _step(shares[-1], state, per)
    chain = [state]
    for share in reversed(shares[:-1]):
        chain.append(_step(share, chain[-1], per))
    return chain[::-1]


def _step(
    share: tuple[float, float], later: tuple[float, float, float], per: TokenRates
) -> tuple[float, float, float]:
    """Return the prices of the three states one sighting earlier."""
    soon, within = share[0] * _FORESIGHT, share[1] * _FORESIGHT
    missed = min(per.input + later[0], per.cache_write_5m + later[1], per.cache_write_1h + later[2])
    return (
        within * missed,
        soon * (per.cache_read + later[1]) + (within - soon) * missed,
        within * (per.cache_read + later[2]),
    )


def _gains(
    run: _Run, reuse: Reuse, per: TokenRates, chains: dict[str, _Chain]
) -> tuple[float, float]:
    """Return what writing a run is expected to save, for minutes and for an hour."""
    times = int(run.kind[0])
    later = chains[run.kind[1]][min(times, _MOST_TIMES - 1)]
    dead, minutes, hour = _step(reuse.shares(run.kind, run.expected), later, per)
    return (
        (dead - minutes - (per.cache_write_5m - per.input)) * run.expected,
        (dead - hour - (per.cache_write_1h - per.input)) * run.expected,
    )
