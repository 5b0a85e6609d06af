"""Prompts by their prefixes, what the API's cache bills for them, and policies to compare with.

A prompt is a row of blocks; two prompts whose first blocks have the same ids share that prefix.
The API's cache is modelled as it is for whole traces: every block up to the last mark can be read
by itself, from the moment it is written; a read refreshes; a prefix below the minimum is not
cached. Prices are Sonnet 5's: 1 in, 5 out, writes 1.25 or 2, reads 0.1.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ai_budget.pricing.rates import Band, ModelRates, TokenRates

SEED = 2026
BLOCK_TOKENS = 512
MINIMUM_TOKENS = 1_024
MINUTES, HOUR = 300, 3_600
PER = TokenRates(
    input=2_000_000_000,
    output=10_000_000_000,
    cache_write_5m=2_500_000_000,
    cache_write_1h=4_000_000_000,
    cache_read=200_000_000,
)
RATES = ModelRates(
    model="claude-sonnet-5",
    provider="anthropic",
    source="benchmark",
    standard=(Band(above=0, rates=PER),),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request, so many seconds after the beginning: ids and tokens of its blocks."""

    at: float
    ids: tuple[str, ...]
    tokens: tuple[int, ...]
    output: int

    @property
    def plain_nanousd(self) -> int:
        """What it costs without caching."""
        return (sum(self.tokens) * PER.input + self.output * PER.output) // 1_000_000


@dataclass(frozen=True, slots=True)
class Billed:
    """How the input of one request was billed, in tokens."""

    read: int
    written_5m: int
    written_1h: int
    plain: int

    def nanousd(self, output: int) -> int:
        total = (
            self.read * PER.cache_read
            + self.written_5m * PER.cache_write_5m
            + self.written_1h * PER.cache_write_1h
            + self.plain * PER.input
            + output * PER.output
        )
        return total // 1_000_000


@dataclass(slots=True)
class ApiCache:
    """The API's prompt cache: until when each block can be read, and its lifetime."""

    alive: dict[str, tuple[float, int]] = field(default_factory=dict)

    def readable(self, prompt: Prompt) -> int:
        """Return how many blocks can be read now."""
        count = 0
        for name in prompt.ids:
            if self.alive.get(name, (-math.inf, 0))[0] < prompt.at:
                break
            count += 1
        return count if sum(prompt.tokens[:count]) >= MINIMUM_TOKENS else 0

    def bill(self, prompt: Prompt, *, hour: int, minutes: int) -> Billed:
        """Bill a prompt marked after ``hour`` blocks for an hour and after ``minutes`` for five."""
        last = max(hour, minutes)
        if sum(prompt.tokens[:last]) < MINIMUM_TOKENS:
            last = 0
        read = min(self.readable(prompt), last)
        hour = min(max(hour, read), last)
        for index, name in enumerate(prompt.ids[:last]):
            written = HOUR if read <= index < hour else MINUTES
            lifetime = self.alive[name][1] if index < read else written
            self.alive[name] = prompt.at + lifetime, lifetime
        return Billed(
            read=sum(prompt.tokens[:read]),
            written_1h=sum(prompt.tokens[read:hour]),
            written_5m=sum(prompt.tokens[hour:last]),
            plain=sum(prompt.tokens[last:]),
        )


# Policies to compare with: each says how many blocks to mark.

Policy = Callable[[int, Prompt, ApiCache], int]


def never(number: int, prompt: Prompt, api: ApiCache) -> int:
    return 0


def always(number: int, prompt: Prompt, api: ApiCache) -> int:
    return len(prompt.ids)


def second_touch(lifetime: int) -> Policy:
    """Mark what was seen within the lifetime, written or not."""
    seen: dict[str, float] = {}

    def policy(number: int, prompt: Prompt, api: ApiCache) -> int:
        count = api.readable(prompt)
        while count < len(prompt.ids) and (
            seen.get(prompt.ids[count], -math.inf) >= prompt.at - lifetime
        ):
            count += 1
        seen.update(dict.fromkeys(prompt.ids, prompt.at))
        return count

    return policy


def clairvoyant(prompts: Sequence[Prompt], lifetime: int) -> Policy:
    """Mark what will come again within the lifetime."""
    following: dict[str, float] = {}
    counts = []
    for prompt in reversed(prompts):
        again = [following.get(name, math.inf) <= prompt.at + lifetime for name in prompt.ids]
        counts.append(len(list(itertools.takewhile(bool, again))))
        following.update(dict.fromkeys(prompt.ids, prompt.at))
    counts.reverse()

    def policy(number: int, prompt: Prompt, api: ApiCache) -> int:
        count = api.readable(prompt)
        return max(count, counts[number])

    return policy


def bill(prompts: Iterable[Prompt], policy: Policy, lifetime: int) -> list[int]:
    """Return what each prompt costs under a policy."""
    api, bills = ApiCache(), []
    for number, prompt in enumerate(prompts):
        count = policy(number, prompt, api)
        marked = (
            {"hour": count, "minutes": 0} if lifetime == HOUR else {"hour": 0, "minutes": count}
        )
        bills.append(api.bill(prompt, **marked).nanousd(prompt.output))
    return bills


# Traces


def read_blocks(path: Path) -> list[Prompt]:
    """Read JSON lines: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``.

    Each id is a block of 512 tokens, the last of a prompt is what is left.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    prompts = []
    with opened(path, "rt") as file:
        for line in file:
            row = json.loads(line)
            ids = tuple(str(one) for one in row["hash_ids"])
            rest = row["input_length"] - BLOCK_TOKENS * (len(ids) - 1)
            tokens = (*[BLOCK_TOKENS] * (len(ids) - 1), rest)
            prompts.append(Prompt(row["timestamp"] / 1000, ids, tokens, row["output_length"]))
    return prompts


def repeated(prompts: Sequence[Prompt], times: int, *, anew: bool) -> list[Prompt]:
    """Return a trace several times over; ``anew`` with other prompts of the same shape."""
    length = prompts[-1].at + 1
    return [
        Prompt(
            prompt.at + length * number,
            tuple(f"{number} {name}" for name in prompt.ids) if anew else prompt.ids,
            prompt.tokens,
            prompt.output,
        )
        for number in range(times)
        for prompt in prompts
    ]


def shapes() -> Iterator[tuple[str, list[Prompt]]]:
    """Yield traces of other shapes, by name."""
    chance = random.Random(SEED)
    yield "all unique", _every(chance, 10, 4_000, lambda number: _own(chance, number, 8_000))
    yield (
        "one system prompt, every 3 s",
        _every(chance, 3, 8_000, lambda number: _shared(chance, number, 4_000, 600)),
    )
    yield (
        "one system prompt, every 10 min",
        _every(chance, 600, 16_000, lambda number: _shared(chance, number, 8_000, 600)),
    )
    yield "bursts", _bursts(chance)
    yield "growing conversations", _conversations(chance)
    yield "lengths of a chat service", _every(chance, 0.2, 8_000, lambda n: _chat(chance, n))
    mixed = [
        *_every(chance, 20, 4_000, lambda number: _own(chance, number, 8_000)),
        *_conversations(chance),
        *_every(chance, 20, 4_000, lambda number: _shared(chance, number, 4_000, 600)),
    ]
    yield "a mixture", sorted(mixed, key=lambda prompt: prompt.at)


_Made = tuple[tuple[str, ...], tuple[int, ...], int]


def _every(
    chance: random.Random, seconds: float, count: int, make: Callable[[int], _Made]
) -> list[Prompt]:
    times = itertools.accumulate(chance.uniform(0.8, 1.2) * seconds for _ in range(count))
    return [Prompt(at, *make(number)) for number, at in enumerate(times)]


def _cut(name: str, tokens: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    sizes = [min(BLOCK_TOKENS, tokens - start) for start in range(0, tokens, BLOCK_TOKENS)]
    return tuple(f"{name}/{index}" for index in range(len(sizes))), tuple(sizes)


def _own(chance: random.Random, number: int, tokens: int) -> _Made:
    ids, sizes = _cut(f"own {number}", chance.randint(tokens // 4, tokens * 2))
    return ids, sizes, chance.randint(50, 600)


def _shared(chance: random.Random, number: int, shared: int, own: int) -> _Made:
    ids, sizes = _cut("system", shared)
    more, rest = _cut(f"asked {number}", chance.randint(own // 4, own))
    return ids + more, sizes + rest, chance.randint(50, 600)


def _chat(chance: random.Random, number: int) -> _Made:
    """Lengths as a public chat service has them: a median of 900 tokens in and 130 out."""
    ids, sizes = _cut(f"chat {number}", min(max(int(chance.lognormvariate(6.8, 0.9)), 4), 14_000))
    return ids, sizes, min(max(int(chance.lognormvariate(4.9, 0.9)), 4), 1_500)


def _bursts(chance: random.Random) -> list[Prompt]:
    """A document is asked about a dozen times within half a minute, and never again."""
    prompts = []
    for number in range(800):
        ids, sizes = _cut(f"document {number}", chance.randint(2_000, 20_000))
        at = number * 60.0
        for question in range(12):
            at += chance.uniform(0.5, 5)
            more, rest = _cut(f"question {number} {question}", chance.randint(20, 300))
            prompts.append(Prompt(at, ids + more, sizes + rest, chance.randint(50, 600)))
    return prompts


def _conversations(chance: random.Random) -> list[Prompt]:
    """Conversations of a few turns, each turn with all that was said before it."""
    prompts = []
    system, system_sizes = _cut("system", 1_500)
    for number in range(1_200):
        at, ids, sizes = number * 40.0, system, system_sizes
        for turn in range(min(1 + int(chance.expovariate(1 / 5)), 30)):
            at += chance.expovariate(1 / 90) + 5
            more, rest = _cut(f"said {number} {turn}", chance.randint(200, 1_500))
            ids, sizes = ids + more, sizes + rest
            prompts.append(Prompt(at, ids, sizes, chance.randint(50, 600)))
    return sorted(prompts, key=lambda prompt: prompt.at)
