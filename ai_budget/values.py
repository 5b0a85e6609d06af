"""What travels between rooms: frozen values without behaviour that touches the world."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ai_budget import money
from ai_budget.periods import Period, Window
from ai_budget.scopes import SITE as SITE

if TYPE_CHECKING:
    from anthropic.types import Message


BYTES_A_TOKEN = 4
"""What text comes to on average, for what is expected, never for what is reserved."""


class Measure(StrEnum):
    """What a limit counts: money, calls, HTTP attempts, or their tokens."""

    NANOUSD = "nanousd"
    CALLS = "calls"
    REQUESTS = "requests"
    TOKENS = "tokens"


class Kind(StrEnum):
    """What a call was made for."""

    ASK = "ask"
    STREAM = "stream"
    BATCH = "batch"
    ROUTER = "router"
    SUMMARY = "summary"


class Status(StrEnum):
    """The life of a reservation: reserved, then settled, estimated or released; or cached."""

    RESERVED = "reserved"
    SETTLED = "settled"
    ESTIMATED = "estimated"
    RELEASED = "released"
    CACHED = "cached"


@dataclass(frozen=True, kw_only=True, slots=True)
class Charge:
    """Who pays: the feature, and the user and subject whose quotas count the call.

    ``user_id`` is a primary key of the user model. ``subject`` names a caller without an
    account: a tenant, an API client, an anonymous visitor.
    """

    feature: str
    user_id: Any = None
    subject: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """The tokens of one answer, each counted once and priced by its own rate.

    ``input_tokens`` excludes what was read from or written to the prompt cache;
    ``output_tokens`` includes ``thinking_tokens``. Where ``iterations`` is not empty the bill
    is their sum, and the counts here are only for show. ``unclassified`` names fields that
    nobody has given a price rule.
    """

    input_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    cache_read_tokens: int = 0
    output_tokens: int = 0
    thinking_tokens: int = 0
    web_searches: int = 0
    service_tier: str = ""
    speed: str = ""
    inference_geo: str = ""
    iterations: tuple[Iteration, ...] = ()
    unclassified: tuple[str, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """All tokens of the prompt, which select the long-context tier."""
        return (
            self.input_tokens
            + self.cache_write_5m_tokens
            + self.cache_write_1h_tokens
            + self.cache_read_tokens
        )

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    @property
    def metered_tokens(self) -> int:
        """The tokens that count against tokens per minute: all but those read from the cache.

        https://platform.claude.com/docs/en/api/rate-limits
        """
        parts = [each.usage for each in self.iterations] or [self]
        return sum(part.total_tokens - part.cache_read_tokens for part in parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Iteration:
    """One model's part in an answer; ``model`` is empty where it is the answer's own."""

    type: str
    usage: Usage
    model: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """The most that one attempt can use and cost.

    ``hidden`` says that the answer may use tokens that its stream does not show, so that only
    the final usage tells. ``reasons`` are what made the bound wide, for people.
    """

    nanousd: int
    input_tokens: int
    output_tokens: int
    web_searches: int = 0
    hidden: bool = False
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """One window that an attempt counts in, and the most it may hold (None: just count).

    ``scope`` is "*", "feature:NAME", "category:NAME", "user:ID", "subject:NAME", or one of the
    last two with ",feature:NAME" behind it.
    """

    scope: str
    window: Window
    measure: Measure = Measure.NANOUSD
    amount: int | None = None
    enforce: bool = True

    @property
    def key(self) -> BalanceKey:
        """The balance that it is counted in."""
        return BalanceKey(self.scope, self.window.period, self.window.first_day)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """A limit that refills: ``amount`` requests or tokens at once, and again every ``seconds``.

    It refills evenly, by the store's clock, and is full before its first use. ``scope`` is a
    limit's, or begins with "view:" for what ``limited`` counts.
    """

    scope: str
    measure: Measure
    amount: int
    seconds: int = 60
    enforce: bool = True

    @property
    def milliseconds(self) -> int:
        """How long it takes to refill."""
        return self.seconds * 1000

    def takes(self, amounts: Amounts) -> int:
        """Return what an attempt takes from it: itself, or all its tokens."""
        return amounts.tokens if self.measure is Measure.TOKENS else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """What Anthropic's headers said is left of an organisation's limit, some time ago."""

    measure: Measure
    remaining: int
    milliseconds_ago: int = 0


@dataclass(frozen=True, slots=True, order=True)
class BalanceKey:
    """Names one balance: a scope in a calendar day or month."""

    scope: str
    period: Period
    first_day: date


@dataclass(frozen=True, kw_only=True, slots=True)
class Balances:
    """What a scope has spent, what calls in flight hold, and how many calls it counts."""

    spent_nanousd: int = 0
    held_nanousd: int = 0
    calls: int = 0
    refused: int = 0

    @property
    def taken_nanousd(self) -> int:
        """What is not there for another call."""
        return self.spent_nanousd + self.held_nanousd


@dataclass(frozen=True, kw_only=True, slots=True)
class Amounts:
    """What an attempt takes from each of its limits; the tokens only from buckets.

    ``calls_to_come`` are not taken and have to fit all the same: what only helps a call, such as
    its router, is not paid for where the call itself would be refused.
    """

    nanousd: int
    calls: int = 1
    tokens: int = 0
    calls_to_come: int = 0

    @property
    def calls_needed(self) -> int:
        """How many calls a limit has to have left."""
        return self.calls + self.calls_to_come


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One HTTP request that may cost money, as the journal records it before it is sent."""

    call_id: uuid.UUID
    number: int
    charge: Charge
    category: str
    kind: Kind
    requested_model: str
    model: str
    provider: str
    max_tokens: int
    speed: str
    inference_geo: str
    decision: str
    rates: str
    reserved_at: datetime
    day: date
    deadline: datetime
    cache_checked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """Money taken for an attempt. ``balances`` are the keys it was taken from.

    ``buckets`` are those it took requests and tokens from. ``unchecked`` says that the balances
    could not be asked, and the settings let it pass.
    """

    id: int
    attempt: Attempt
    amounts: Amounts
    balances: tuple[BalanceKey, ...]
    buckets: tuple[Bucket, ...] = ()
    unchecked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Settlement:
    """How an attempt ended: what it cost in truth, or the most it can have cost.

    ``tokens`` are those that count per minute; None keeps all that were taken. ``levels`` are
    what the answer said of the organisation's limits. ``saved_nanousd`` is how much more it would
    have cost without the levers that ``saved_reason`` names; what did not pay off is negative.
    """

    status: Status
    cost_nanousd: int
    usage: Usage = field(default_factory=Usage)
    stop_reason: str = ""
    request_id: str = ""
    latency_ms: int | None = None
    first_token_ms: int | None = None
    error: str = ""
    keep_call: bool = True
    tokens: int | None = None
    levels: tuple[Level, ...] = ()
    saved_nanousd: int = 0
    saved_reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One item of a reservation that was made for many: what is held for it, and how it ended.

    One that was released leaves no row in the journal, and gives its call back, too.
    """

    attempt: Attempt
    held_nanousd: int
    settlement: Settlement


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A balance that is not the sum of the journal: what it was, and what it has to be."""

    key: BalanceKey
    kept: Balances
    journal: Balances


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What ``ask`` returns: the text, who wrote it, and what it cost."""

    text: str = field(repr=False)
    cost_nanousd: int
    model: str
    requested_model: str
    usage: Usage
    message: Message = field(repr=False)
    call_id: uuid.UUID
    cached: bool = False

    @property
    def cost(self) -> Decimal:
        """Exact dollars, all attempts of this call together."""
        return money.to_usd(self.cost_nanousd)

    @property
    def downgraded(self) -> bool:
        """Whether a cheaper model answered because the budget ran low."""
        return self.model != self.requested_model

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a call would cost, before it is made: what to expect, and at most."""

    expected_nanousd: int
    most_nanousd: int
    model: str

    @property
    def expected(self) -> Decimal:
        return money.to_usd(self.expected_nanousd)

    @property
    def most(self) -> Decimal:
        return money.to_usd(self.most_nanousd)
