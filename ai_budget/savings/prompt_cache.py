"""Marks requests for the API's prompt cache: always, or where what came again says that it pays.

"5m" and "1h" mark the end of the stable prefix. "auto" watches, by keyed digests in Django's
cache, what prefixes come again, marks those whose writes pay (``prompt_reuse``), and never risks
more than its account holds (``prompt_account``).

The promise of "auto": on no trace is a feature's bill more than 1 % above not caching at all. It
assumes that the API keeps an entry for its lifetime and bills as it says, that answers are booked
with their true usage, that the cache's ``incr`` is atomic, and nothing else: not that anything
comes again, nor that an answer is booked at all. A cache that fails means no marks and no error.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from django.core.cache import caches

from ai_budget.conf import conf
from ai_budget.exceptions import UnpricedModel
from ai_budget.pricing.rates import CACHE_LIFETIMES, ModelRates, minimum_prefix
from ai_budget.savings import prompt_reuse
from ai_budget.savings.prompt_account import ALLOWANCE_DIVISOR, Account
from ai_budget.savings.prompt_prefixes import (
    Prefixes,
    fixed_marks,
    is_marked,
    keyed_digest,
    place_marks,
    read_prefixes,
)
from ai_budget.savings.prompt_reuse import (
    HOUR,
    MINUTES,
    NO_PLAN,
    REMEMBERED_SECONDS,
    Entry,
    Mark,
    Plan,
    Position,
    Prices,
    Reuse,
    Sighting,
    Waiting,
)
from ai_budget.values import Usage

log = logging.getLogger("ai_budget")

MARGIN_SECONDS = 10
"""An entry counts as gone so long before it is: a request takes time to arrive."""

_SEEN, _ENTRY, _REUSE, _SIZE = (
    f"ai_budget:prompt:{name}:" for name in ("seen", "entry", "reuse", "size")
)


def mark(
    body: Mapping[str, Any],
    *,
    mode: str,
    rates: ModelRates,
    feature: str,
    at: datetime,
    where: str = "",
) -> Marking | None:
    """Return the body with cache_control at the end of its stable prefix, or None to leave it.

    ``where`` names the account and the address that it is sent to, each with a cache of its own.
    ``mode`` is "off", "5m", "1h" or "auto". A body in which the caller has set any mark is left
    as it is. In "auto" a marking may carry no marks: it is booked all the same, to learn what
    the feature spends.
    """
    if mode not in (MINUTES, HOUR, "auto"):
        return None
    theirs = is_marked(body)
    if mode != "auto":
        return None if theirs or body.get("thread") else _mark_always(body, mode, rates, feature)
    if theirs:
        return Marking(body=dict(body), note="", decision=_unmarked(feature))
    prefixes = read_prefixes(body, rates=rates, feature=feature, where=where)
    if prefixes is None or prefixes.hidden or not prefixes.positions:
        return Marking(body=dict(body), note="", decision=_unmarked(feature))
    try:
        decision = decide(
            prefixes.positions,
            prices=_prices(body, prefixes, rates),
            minimum=minimum_prefix(str(body["model"])),
            feature=feature,
            at=at.timestamp(),
        )
    except Exception as error:
        # A cache may be down, or hold what an older version wrote.
        log.warning("The prompt cache is left out: %s", type(error).__name__)
        return None
    marks = decision.plan.marks
    marked = place_marks(body, prefixes, marks) if marks else dict(body)
    return Marking(body=marked, note=_note(marks), decision=decision)


def mark_everywhere(body: Mapping[str, Any], *, rates: ModelRates, feature: str) -> Marking | None:
    """Return the body at the dearest that "auto" may make it: with more marks than may be sent."""
    prefixes = None if is_marked(body) else read_prefixes(body, rates=rates, feature=feature)
    if prefixes is None or prefixes.hidden:
        return None
    everywhere = [Mark(index=index, ttl=HOUR) for index in range(len(prefixes.positions))]
    return Marking(body=place_marks(body, prefixes, everywhere), note="")


@dataclass(slots=True, kw_only=True)
class Marking:
    """One request's marks, and what is to be booked for them when its answer has come."""

    body: dict[str, Any] = field(repr=False)
    note: str
    decision: Decision | None = None

    def book(self, usage: Usage | None, *, cost_nanousd: int, cost_plain_nanousd: int) -> None:
        """Book the answer as it was billed; the first of ``book`` and ``cancel`` counts.

        ``cost_plain_nanousd`` is what it would have cost without caching. Without a usage
        nothing is known: what was set aside stays spent.
        """
        if self.decision is not None:
            self.decision.book(
                usage, cost_nanousd=cost_nanousd, cost_plain_nanousd=cost_plain_nanousd
            )

    def cancel(self) -> None:
        """Give back what was set aside: nothing was billed."""
        if self.decision is not None:
            self.decision.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """A prefix that is marked, the lifetime it is believed to have already ("" for none).

    ``beyond`` are the most tokens between its mark and the last one.
    """

    name: str
    ttl: str
    known: str
    beyond: int


@dataclass(slots=True, kw_only=True)
class Decision:
    """A plan whose most cost has been taken from the feature's account, until it is booked.

    ``unmeasured`` is a prefix that was too dear by what it may have at most, and whose prompt will
    be billed with more tokens than it has.
    """

    plan: Plan
    feature: str
    minimum: int = 0
    at: float = 0.0
    marked: tuple[Marked, ...] = ()
    unmeasured: str = ""
    ended: bool = False
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def book(self, usage: Usage | None, *, cost_nanousd: int, cost_plain_nanousd: int) -> None:
        """See ``Marking.book``."""
        if not self._end() or usage is None:
            return
        allowance = cost_plain_nanousd // ALLOWANCE_DIVISOR
        # What the caller's own marks cost or save is not this account's.
        added = cost_nanousd - cost_plain_nanousd if self.plan.marks else 0
        try:
            cache = caches[conf.CACHE_ALIAS]
            Account(cache, self.feature).give(self.plan.most_nanousd - added + allowance)
            kept = dict(self._entries(usage))
            for ttl in set(kept.values()):
                alive = _write_entry(
                    Entry(until=self.at + CACHE_LIFETIMES[ttl] - MARGIN_SECONDS, ttl=ttl)
                )
                names = [name for name, lives in kept.items() if lives == ttl]
                cache.set_many(dict.fromkeys(names, alive), CACHE_LIFETIMES[ttl])
            if self.unmeasured and usage.prompt_tokens and not usage.iterations:
                cache.set(_SIZE + self.unmeasured, usage.prompt_tokens, REMEMBERED_SECONDS)
        except Exception as error:
            log.warning("The prompt cache's account is not booked: %s", type(error).__name__)

    def cancel(self) -> None:
        """See ``Marking.cancel``."""
        if not self._end() or not self.plan.most_nanousd:
            return
        try:
            Account(caches[conf.CACHE_ALIAS], self.feature).give(self.plan.most_nanousd)
        except Exception as error:
            log.warning("The prompt cache's account is not booked: %s", type(error).__name__)

    def _entries(self, usage: Usage) -> Iterator[tuple[str, str]]:
        """Yield the prefixes that are in the API's cache now, and for how long at least."""
        cached = usage.prompt_tokens - usage.input_tokens
        hours = [marked for marked in self.marked if marked.ttl == HOUR and not marked.known]
        for marked in self.marked:
            if marked.known and usage.cache_read_tokens:
                yield _ENTRY + marked.name, marked.known
            elif not cached or (marked.beyond and cached - marked.beyond < self.minimum):
                continue  # too short a prefix is not cached, and nobody says so
            elif marked in hours[-1:] and usage.cache_write_1h_tokens:
                yield _ENTRY + marked.name, HOUR
            else:
                # Another may have written it meanwhile, and an entry keeps its first lifetime.
                yield _ENTRY + marked.name, MINUTES

    def _end(self) -> bool:
        with self.lock:
            first, self.ended = not self.ended, True
        return first


def decide(
    positions: Sequence[Position],
    *,
    prices: Prices,
    minimum: int,
    feature: str,
    at: float,
) -> Decision:
    """Return where to mark these positions now, the most it can cost set aside.

    ``at`` is in seconds since 1970. Raises what the cache raises.
    """
    cache = caches[conf.CACHE_ALIAS]
    account = Account(cache, feature)
    learned = _REUSE + keyed_digest("reuse", feature)
    names = [position.fingerprint for position in positions]
    keys = [_SEEN + name for name in names] + [_ENTRY + name for name in names]
    found = cache.get_many([*keys, learned, account.key])
    before = [_read_sighting(found.get(_SEEN + name)) for name in names]
    entries = [_read_entry(found.get(_ENTRY + name)) for name in names]
    reuse = _read_reuse(found.get(learned))
    left = account.balance(found.get(account.key))
    now = prompt_reuse.look(positions, before, reuse, at)
    plan_of = partial(
        prompt_reuse.plan,
        sightings=now,
        entries=entries,
        reuse=reuse,
        prices=prices,
        minimum=minimum,
        afford_nanousd=left,
        at=at,
    )
    # In debt the API did not keep what it says it keeps: nothing is read, for it may be written.
    plan, unmeasured = NO_PLAN if left < 0 else plan_of(positions), ""
    if plan.is_short:
        # A whole prompt that begins so was billed with no fewer tokens than its beginning has.
        wished = names[plan.wished - 1]
        size = cache.get(_SIZE + wished)
        if isinstance(size, int):
            plan = plan_of(prompt_reuse.at_most(positions, plan.wished, size))
        else:
            unmeasured = wished
    if plan.most_nanousd and not account.take(plan.most_nanousd):
        plan = NO_PLAN
    changed: dict[str, str] = {
        _SEEN + name: _write_sighting(sighting)
        for name, sighting, old in zip(names, now, before, strict=True)
        if sighting is not old
    }
    if changed:
        changed[learned] = _write_reuse(reuse)
    if plan.written:
        for mark in plan.marks:
            if mark.index >= plan.read:
                asked = Entry(until=at, ttl=mark.ttl, asked_at=at)
                changed[_ENTRY + names[mark.index]] = _write_entry(asked)
    if changed:
        cache.set_many(changed, REMEMBERED_SECONDS)
    return Decision(
        plan=plan,
        feature=feature,
        minimum=minimum,
        at=at,
        marked=tuple(_marked(positions, entries, plan)),
        unmeasured=unmeasured,
    )


def _marked(
    positions: Sequence[Position], entries: Sequence[Entry | None], plan: Plan
) -> Iterator[Marked]:
    """Yield the marks that will surely be read or written: the read one and those behind it."""
    for mark in plan.marks:
        # Nothing says that what is shorter than the prefix that is read is refreshed with it.
        if mark.index < plan.read - 1:
            continue
        entry = entries[mark.index]
        yield Marked(
            name=positions[mark.index].fingerprint,
            ttl=mark.ttl,
            known=entry.ttl if entry is not None and mark.index < plan.read else "",
            beyond=sum(one.most for one in positions[mark.index + 1 : plan.marks[-1].index + 1]),
        )


def _mark_always(
    body: Mapping[str, Any], ttl: str, rates: ModelRates, feature: str
) -> Marking | None:
    prefixes = read_prefixes(body, rates=rates, feature=feature)
    if prefixes is None:
        return None
    marks = fixed_marks(prefixes, ttl=ttl, minimum=minimum_prefix(str(body["model"])))
    if not marks:
        return None
    return Marking(body=place_marks(body, prefixes, marks), note=_note(marks))


def _unmarked(feature: str) -> Decision:
    return Decision(plan=NO_PLAN, feature=feature)


def _prices(body: Mapping[str, Any], prefixes: Prefixes, rates: ModelRates) -> Prices:
    speed = str(body.get("speed") or "")
    expected = sum(position.expected for position in prefixes.positions)
    # Fast is no promise: either speed may be what is billed.
    bands = [
        band
        for band in (*rates.standard, *(rates.fast if speed == "fast" else ()))
        if band.above < prefixes.most or not band.above
    ]
    geo = body.get("inference_geo") or conf.INFERENCE_GEO
    try:
        usual = rates.at(expected, speed)
    except UnpricedModel:
        usual = rates.at(expected, "")
    return Prices(
        rates=(usual, *(band.rates for band in bands)),
        geo=(1, 1) if geo == "global" else rates.us_geo,
    )


def _note(marks: Sequence[prompt_reuse.Mark]) -> str:
    said = [
        f"{ttl} at {','.join(str(mark.index + 1) for mark in marks if mark.ttl == ttl)}"
        for ttl in (HOUR, MINUTES)
        if any(mark.ttl == ttl for mark in marks)
    ]
    return f"prompt cache {' and '.join(said)}" if said else ""


# What is kept in the cache: plain text, short


def _write_sighting(sighting: Sighting) -> str:
    return f"{sighting.at:.1f} {sighting.times} {sighting.kind}"


def _read_sighting(text: Any) -> Sighting | None:
    if text is None:
        return None
    at, times, kind = text.split()
    return Sighting(at=float(at), times=int(times), kind=kind)


def _write_entry(entry: Entry) -> str:
    asked = "" if entry.asked_at is None else f" {entry.asked_at:.1f}"
    return f"{entry.until:.1f} {entry.ttl}{asked}"


def _read_entry(text: Any) -> Entry | None:
    if text is None:
        return None
    until, ttl, *asked = text.split()
    return Entry(until=float(until), ttl=ttl, asked_at=float(asked[0]) if asked else None)


def _write_reuse(reuse: Reuse) -> str:
    waiting = [[[group.start, group.kinds] for group in groups] for groups in reuse.waiting]
    return json.dumps([reuse.at, reuse.kinds, waiting])


def _read_reuse(text: Any) -> Reuse:
    if text is None:
        return Reuse()
    at, kinds, (soon, later) = json.loads(text)
    return Reuse(
        at=at,
        kinds=kinds,
        waiting=(
            [Waiting(start=start, kinds=kinds) for start, kinds in soon],
            [Waiting(start=start, kinds=kinds) for start, kinds in later],
        ),
    )
