"""What travels to the scripts in Redis and back, and the scripts themselves."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from ai_budget.ledger.base import Breach, bucket_breach
from ai_budget.ledger.redis_hashes import Hash
from ai_budget.values import Amounts, Balances, Bucket, Limit, Measure

_LARGEST = 2**53
"""Up to which Lua's numbers are exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What an attempt asks of Redis, in the order of the keys."""

    periods: Sequence[Hash]
    buckets: Sequence[Bucket]
    checks: Sequence[Sequence[Limit]]
    json: str


def ask_for(limits: Sequence[Limit | Bucket], amounts: Amounts) -> Asked:
    """Return what the scripts need to know of an attempt, a hash for each day and month."""
    by_period: dict[Hash, list[Limit]] = {}
    buckets = [exact(limit) for limit in limits if isinstance(limit, Bucket)]
    for limit in limits:
        if isinstance(limit, Limit):
            key = limit.key
            by_period.setdefault(Hash(key.period, key.first_day), []).append(limit)
    windows = sorted(by_period)
    checks = [[it for it in by_period[window] if it.amount is not None] for window in windows]
    asked = {
        "amount": str(amounts.nanousd),
        "calls": str(amounts.calls),
        "windows": [
            {
                "scopes": list(dict.fromkeys(limit.scope for limit in by_period[window])),
                "checks": [_check_json(limit, amounts) for limit in limited],
            }
            for window, limited in zip(windows, checks, strict=True)
        ],
        "buckets": [bucket_json(bucket, bucket.takes(amounts)) for bucket in buckets],
    }
    return Asked(periods=windows, buckets=buckets, checks=checks, json=json.dumps(asked))


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What is booked of an open row: of all of it, or of a part.

    ``before`` is what the row holds until then by the journal, ``left`` what it holds afterwards,
    None where it is closed. ``back`` is how many calls are given back.
    """

    row: int
    before: Amounts
    left: Amounts | None = None
    cost: int
    back: int

    def arguments(self) -> list[str]:
        """Return what the scripts call ``book`` with."""
        left = self.left
        held = self.before.nanousd - (left.nanousd if left else 0)
        remains = (left.nanousd, left.calls) if left else ("", "")
        before = (self.before.nanousd, self.before.calls)
        given = (self.row, *before, *remains, self.cost, self.cost - held, self.back)
        return [str(each) for each in given]


def _check_json(limit: Limit, amounts: Amounts) -> list[Any]:
    amount = limit.amount or 0
    money = limit.measure is Measure.NANOUSD
    requested = amounts.nanousd if money else amounts.calls_needed
    # Where the attempt is counted in already, what it takes is in what is taken.
    most = amount if money else amount - amounts.calls_to_come
    field = f"{'t' if money else 'c'} {limit.scope}"
    return [field, str(amount - requested), str(most), int(limit.enforce)]


def bucket_json(bucket: Bucket, wanted: int) -> dict[str, int]:
    """Return a bucket, and what is wanted of it, in units times its milliseconds."""
    return {
        "wanted": wanted * bucket.milliseconds,
        "amount": bucket.amount,
        "full": bucket.amount * bucket.milliseconds,
        "enforced": int(bucket.enforce),
    }


def exact(bucket: Bucket) -> Bucket:
    """Return a bucket that Lua can count exactly: a larger one is as good as none."""
    most = _LARGEST // (2 * bucket.milliseconds)
    return bucket if bucket.amount <= most else replace(bucket, amount=most)


def breach_of(found: Sequence[Any], asked: Asked, amounts: Amounts) -> Breach | None:
    """Return the breach that the script found."""
    if found[0] == "b":
        bucket = asked.buckets[int(found[1]) - 1]
        return bucket_breach(bucket, bucket.takes(amounts), int(found[2]))
    limit = asked.checks[int(found[1]) - 1][int(found[2]) - 1]
    money = limit.measure is Measure.NANOUSD
    requested = amounts.nanousd if money else amounts.calls_needed
    taken, spent, mine = int(found[3]), int(found[4]), int(found[5])
    if mine:
        taken -= amounts.nanousd if money else amounts.calls
    return Breach(limit=limit, requested=requested, taken=taken, held=taken - spent if money else 0)


def balances_of(spent: str | None, taken: str | None, calls: str | None) -> Balances:
    """Return a balance from the fields of a hash."""
    booked = int(spent or 0)
    return Balances(
        spent_nanousd=booked, held_nanousd=int(taken or 0) - booked, calls=int(calls or 0)
    )


def texts(answer: Any) -> Any:
    """Return an answer with texts for bytes, as a client may or may not give them."""
    if isinstance(answer, (list, tuple)):
        return [texts(each) for each in answer]
    return text(answer) if isinstance(answer, bytes) else answer


def text(value: Any) -> str:
    """Return a text for bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


@functools.lru_cache(maxsize=16)
def source(name: str) -> str:
    """Return a script, with what all of them begin with."""
    folder = resources.files("ai_budget.ledger") / "lua"
    return "".join((folder / f"{part}.lua").read_text() for part in ("prelude", name))
