"""The API's prompt cache at its strictest, for prompts that are rows of positions.

An entry is only where a mark was; it is readable once its answer began, and only a read of the
entry itself refreshes it. What is kept is kept exactly as long as promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ai_budget.pricing.rates import CACHE_LIFETIMES, Band, ModelRates, TokenRates
from ai_budget.savings.prompt_cache import Decision, decide
from ai_budget.savings.prompt_reuse import HOUR, Position, Prices
from ai_budget.values import Usage

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
    source="test",
    standard=(Band(above=0, rates=PER),),
)
MINIMUM = 1_024
LOOKBACK = 20


@dataclass(slots=True)
class Sent:
    """One request that was sent, and how it was billed."""

    decision: Decision | None
    usage: Usage
    plain_nanousd: int
    cost_nanousd: int

    def book(self) -> None:
        if self.decision is not None:
            self.decision.book(
                self.usage,
                cost_nanousd=self.cost_nanousd,
                cost_plain_nanousd=self.plain_nanousd,
            )


@dataclass(slots=True)
class Api:
    """Bills prompts; ``begins`` is how many seconds an answer takes to begin."""

    entries: dict[str, list[tuple[float, float, str]]] = field(default_factory=dict)
    cost_nanousd: int = 0
    plain_nanousd: int = 0
    worst: float = 0.0

    def send(
        self,
        positions: Sequence[Position],
        *,
        at: float,
        tokens: Sequence[int] | None = None,
        output: int = 0,
        begins: float = 1.0,
        feature: str = "chat",
    ) -> Sent:
        """Decide and bill one prompt; ``tokens`` are what its positions truly have."""
        decision = decide(
            positions,
            prices=Prices(rates=(PER,)),
            minimum=MINIMUM,
            feature=feature,
            at=at,
        )
        true = [position.expected for position in positions] if tokens is None else list(tokens)
        usage = self._bill(positions, true, decision, at=at, begins=begins, output=output)
        plain = (sum(true) * PER.input + output * PER.output) // 1_000_000
        cost = (
            usage.input_tokens * PER.input
            + usage.cache_read_tokens * PER.cache_read
            + usage.cache_write_5m_tokens * PER.cache_write_5m
            + usage.cache_write_1h_tokens * PER.cache_write_1h
            + output * PER.output
        ) // 1_000_000
        self.cost_nanousd += cost
        self.plain_nanousd += plain
        if self.plain_nanousd:
            self.worst = max(self.worst, self.cost_nanousd / self.plain_nanousd)
        return Sent(decision=decision, usage=usage, plain_nanousd=plain, cost_nanousd=cost)

    def _bill(
        self,
        positions: Sequence[Position],
        tokens: list[int],
        decision: Decision | None,
        *,
        at: float,
        begins: float,
        output: int,
    ) -> Usage:
        marks = () if decision is None else decision.plan.marks
        marks = tuple(mark for mark in marks if sum(tokens[: mark.index + 1]) >= MINIMUM)
        if not marks:
            return Usage(input_tokens=sum(tokens), output_tokens=output)
        last = marks[-1].index
        hit = next(
            (
                index
                for index in range(last, -1, -1)
                if any(0 <= mark.index - index < LOOKBACK for mark in marks)
                and self._lifetime(positions[index].fingerprint, at)
            ),
            -1,
        )
        hour = max((mark.index for mark in marks if mark.ttl == HOUR), default=-1)
        hour = max(hour, hit)
        for index in {hit, *(mark.index for mark in marks if mark.index > hit)} - {-1}:
            name = positions[index].fingerprint
            ttl = self._lifetime(name, at) or next(m.ttl for m in marks if m.index == index)
            self.entries.setdefault(name, []).append((at + begins, at + CACHE_LIFETIMES[ttl], ttl))
        return Usage(
            cache_read_tokens=sum(tokens[: hit + 1]),
            cache_write_1h_tokens=sum(tokens[hit + 1 : hour + 1]),
            cache_write_5m_tokens=sum(tokens[hour + 1 : last + 1]),
            input_tokens=sum(tokens[last + 1 :]),
            output_tokens=output,
        )

    def _lifetime(self, name: str, at: float) -> str:
        """Return the lifetime of an entry that can be read now, "" where there is none."""
        alive = [ttl for since, until, ttl in self.entries.get(name, ()) if since <= at < until]
        return alive[0] if alive else ""
