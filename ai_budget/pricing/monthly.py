"""What a feature would cost a month, before it is built, and what each lever would save.

Exact until the end: fractions of nano-dollars, each figure rounded up once. Two things cannot be
known in advance, and are assumed. The calls come at random over all 24 hours, which is the worst
for a prompt cache: calls that come in a crowd find more of it. And they share one prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Context, Decimal, InvalidOperation
from fractions import Fraction

from ai_budget import money
from ai_budget.conf import conf
from ai_budget.exceptions import UnpricedModel
from ai_budget.pricing.rates import (
    BATCH,
    CACHE_LIFETIMES,
    ModelRates,
    TokenRates,
    minimum_prefix,
    resolve,
)

RECONSIDER_NANOUSD = 10_000 * money.NANO_PER_USD
"""A month that is dearer should be thought over before it is spent."""

BATCH_READS = Fraction(30, 100)
"""Of the calls of a batch, those that find the prefix. They run at once and in any order; 30 to
98 % are told of in https://platform.claude.com/docs/en/build-with-claude/batch-processing."""

ASSUMED_HITS = Fraction(20, 100)
"""The response cache of those who name no hit rate: the least that is worth having one."""

ASSUMED_PREFIX = Fraction(1, 2)
"""The part of a prompt that repeats, for those who name none."""

ASSUMED_OUTPUT = Fraction(3, 4)
"""What shorter answers keep of their length."""

MOST_CALLS = 1_000_000_000
MOST_DAYS = 31

_MILLION = 1_000_000
_SECONDS_A_DAY = 86_400
_ENOUGH = Context(prec=40)
_TINY = Decimal("1e-12")
_MOST_DECIMALS = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Lever:
    """One way to a lower bill: what the month costs with it, and what it saves.

    Against the same usage without it, in nano-dollars. One that is ``used`` is in the bill
    already; it can save less than nothing where it stands in another's way, as a batch may in
    the prompt cache's.
    """

    name: str
    detail: str
    used: bool
    per_month_nanousd: int
    saving_nanousd: int

    @property
    def per_month(self) -> Decimal:
        """Dollars a month with it."""
        return money.to_usd(self.per_month_nanousd)

    @property
    def saving(self) -> Decimal:
        """Dollars that it saves a month."""
        return money.to_usd(self.saving_nanousd)

    @property
    def saving_percent(self) -> Decimal:
        """What it saves of the bill without it, to a tenth of a percent, rounded down."""
        without = self.per_month_nanousd + self.saving_nanousd
        return Decimal(self.saving_nanousd * 1_000 // without if without else 0).scaleb(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class MonthlyEstimate:
    """What a usage costs a call, a day and a month, in nano-dollars and as Decimal dollars.

    ``per_call`` is the average, calls that a cache answers for nothing among them. ``levers`` are
    those in use and then those that would save something, the most helpful first.
    ``prompt_cache`` is "off", "5m" or "1h", whichever is cheapest.
    """

    model: str
    calls_per_day: int
    input_tokens: int
    output_tokens: int
    cache_hit_rate: Decimal
    cached_prefix_tokens: int
    batch: bool
    days: int
    per_call_nanousd: int
    per_day_nanousd: int
    per_month_nanousd: int
    prompt_cache: str
    levers: tuple[Lever, ...]

    @property
    def per_call(self) -> Decimal:
        return money.to_usd(self.per_call_nanousd)

    @property
    def per_day(self) -> Decimal:
        return money.to_usd(self.per_day_nanousd)

    @property
    def per_month(self) -> Decimal:
        return money.to_usd(self.per_month_nanousd)

    @property
    def reconsider(self) -> bool:
        """Whether this is more than $10,000 a month."""
        return self.per_month_nanousd > RECONSIDER_NANOUSD

    @property
    def best_lever(self) -> Lever | None:
        """The lever not used yet that would save the most, if any would."""
        return next((lever for lever in self.levers if not lever.used), None)


def estimate_monthly(
    model: str,
    *,
    calls_per_day: int,
    input_tokens: int,
    output_tokens: int,
    cache_hit_rate: Decimal | Fraction | int | str = 0,
    cached_prefix_tokens: int = 0,
    batch: bool = False,
    days: int = 30,
    at: datetime | None = None,
) -> MonthlyEstimate:
    """Return what so many equal calls cost, and what each lever does to the bill.

    Tokens are of one call, all of its prompt in ``input_tokens``. ``cache_hit_rate`` is the share
    of calls that the response cache answers for nothing, such as Decimal("0.3") or "30%".
    ``cached_prefix_tokens`` is the repeated beginning of the prompt; it is cached in whichever
    way is cheapest, not at all included. ``at`` chooses among dated prices (default: now).
    Raises ``ValueError`` or ``TypeError`` for usage that makes no sense, and ``UnpricedModel``.
    """
    _ensure_count("calls a day", calls_per_day, least=1, most=MOST_CALLS)
    _ensure_count("input tokens", input_tokens, least=1)
    _ensure_count("output tokens", output_tokens)
    _ensure_count("tokens of the cached prefix", cached_prefix_tokens)
    _ensure_count("days", days, least=1, most=MOST_DAYS)
    hits = read_share(cache_hit_rate)
    if cached_prefix_tokens > input_tokens:
        raise ValueError(
            f"The cached prefix ({cached_prefix_tokens:,} tokens) is longer than the prompt that "
            f"it is part of ({input_tokens:,} tokens)."
        )
    rates = resolve(model, at=at)
    if input_tokens + output_tokens > rates.context_window:
        raise ValueError(
            f"{input_tokens:,} tokens in and {output_tokens:,} out do not fit into the context "
            f"window of {model} ({rates.context_window:,} tokens)."
        )
    usage = _Usage(
        rates=rates,
        calls=calls_per_day,
        input=input_tokens,
        output=output_tokens,
        hits=hits,
        prefix=cached_prefix_tokens,
        batch=batch,
        days=days,
    )
    per_call = usage.per_call
    return MonthlyEstimate(
        model=model,
        calls_per_day=calls_per_day,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache_hit_rate=_decimal(hits),
        cached_prefix_tokens=cached_prefix_tokens,
        batch=batch,
        days=days,
        per_call_nanousd=_up(per_call),
        per_day_nanousd=_up(per_call * calls_per_day),
        per_month_nanousd=usage.per_month_nanousd,
        prompt_cache=usage.prompt_cache.kept,
        levers=_levers(usage, at),
    )


def read_share(value: Decimal | Fraction | int | str) -> Fraction:
    """Return a share from 0 to 1, exactly: of 0.3 as of "30%".

    Raises ``TypeError`` for a float (which has no exact share) and ``ValueError`` for what is no
    share, or has more than nine decimals.
    """
    wrong = ValueError(f"A share is from 0 to 1, or from 0% to 100%, not {value!r}.")
    if isinstance(value, bool) or not isinstance(value, (Decimal, Fraction, int, str)):
        raise TypeError(f"A share is a Decimal, int or str, not {type(value).__name__}.")
    if not isinstance(value, Fraction):
        text = str(value).strip()
        try:
            number = Decimal(text.removesuffix("%").rstrip())
        except InvalidOperation:
            raise wrong from None
        # By their size first: the most extreme ones would take for ever as fractions.
        if not number.is_finite() or (number and not -_MOST_DECIMALS <= number.adjusted() <= 2):
            raise wrong
        value = Fraction(number) / (100 if text.endswith("%") else 1)
    if not 0 <= value <= 1 or 10**_MOST_DECIMALS % value.denominator:
        raise wrong
    return value


# One usage ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _PromptCache:
    """How a prefix is kept, by what share of the paid calls it is read, and a call's cost."""

    kept: str
    reads: Fraction
    per_paid_call: Fraction


@dataclass(frozen=True, kw_only=True, slots=True)
class _Usage:
    """So many calls a day, all alike, with the levers that are in use."""

    rates: ModelRates
    calls: int
    input: int
    output: int
    hits: Fraction
    prefix: int
    batch: bool
    days: int

    @property
    def per_call(self) -> Fraction:
        """Nano-dollars of a call on average, those answered from the cache at nothing."""
        return self.prompt_cache.per_paid_call * (1 - self.hits)

    @property
    def per_month_nanousd(self) -> int:
        return _up(self.per_call * self.calls * self.days)

    @property
    def prompt_cache(self) -> _PromptCache:
        """The cheapest way to keep the prefix; none where none pays for its writes."""
        plain = _PromptCache(kept="off", reads=Fraction(0), per_paid_call=self._plain())
        if self.prefix < minimum_prefix(self.rates.model):
            return plain
        kept = (self._kept(lifetime) for lifetime in CACHE_LIFETIMES)
        return min((plain, *kept), key=lambda each: each.per_paid_call)

    def _plain(self) -> Fraction:
        per = self._per_million
        return self._scaled(self.input * per.input)

    def _kept(self, lifetime: str) -> _PromptCache:
        per = self._per_million
        write = {"5m": per.cache_write_5m, "1h": per.cache_write_1h}[lifetime]
        reads = self._reads(CACHE_LIFETIMES[lifetime])
        prefix = reads * per.cache_read + (1 - reads) * write
        cost = self._scaled(self.prefix * prefix + (self.input - self.prefix) * per.input)
        return _PromptCache(kept=lifetime, reads=reads, per_paid_call=cost)

    @property
    def _per_million(self) -> TokenRates:
        # Cached or not, the whole prompt selects the long-context tier.
        return self.rates.at(self.input, "")

    def _scaled(self, prompt: Fraction | int) -> Fraction:
        tokens = Fraction(prompt + self.output * self._per_million.output) / _MILLION
        geo = Fraction(*self.rates.us_geo) if conf.INFERENCE_GEO == "us" else 1
        return tokens * geo * (Fraction(*BATCH) if self.batch else 1)

    def _reads(self, seconds: int) -> Fraction:
        """Return the share of paid calls that come within so many seconds of another.

        Where calls come at random the time between two is exponential: 1 - exp(-rate * seconds).
        In millionths, rounded down: some call always has to write.
        """
        expected = self.calls * (1 - self.hits) * seconds / _SECONDS_A_DAY
        exponent = _ENOUGH.divide(Decimal(-expected.numerator), Decimal(expected.denominator))
        found = Fraction(1) - Fraction(_ENOUGH.exp(exponent).quantize(_TINY, context=_ENOUGH))
        reads = Fraction(min(int(found * _MILLION), _MILLION - 1), _MILLION)
        return min(reads, BATCH_READS) if self.batch else reads


# Levers ------------------------------------------------------------------------------------------


def _levers(usage: _Usage, at: datetime | None) -> tuple[Lever, ...]:
    now = usage.per_month_nanousd
    in_use = [
        Lever(
            name=name,
            detail=detail,
            used=True,
            per_month_nanousd=now,
            saving_nanousd=without.per_month_nanousd - now,
        )
        for name, detail, without in _in_use(usage)
    ]
    offered = [
        Lever(
            name=name,
            detail=detail,
            used=False,
            per_month_nanousd=with_it.per_month_nanousd,
            saving_nanousd=now - with_it.per_month_nanousd,
        )
        for name, detail, with_it in _not_in_use(usage, at)
    ]
    helpful = [lever for lever in offered if lever.saving_nanousd > 0]
    return (*in_use, *sorted(helpful, key=lambda lever: -lever.saving_nanousd))


def _in_use(usage: _Usage) -> Iterator[tuple[str, str, _Usage]]:
    """Yield the levers in use, each with the usage without it."""
    if usage.hits:
        yield "response_cache", _hits(usage), replace(usage, hits=Fraction(0))
    if usage.prefix:
        yield "prompt_cache", _kept(usage), replace(usage, prefix=0)
    if usage.batch:
        yield "batch", _BATCH, replace(usage, batch=False)


def _not_in_use(usage: _Usage, at: datetime | None) -> Iterator[tuple[str, str, _Usage]]:
    """Yield the levers that are left, each with the usage that it would make."""
    if not usage.hits:
        with_it = replace(usage, hits=ASSUMED_HITS)
        yield "response_cache", _hits(with_it), with_it
    if not usage.prefix:
        with_it = replace(usage, prefix=int(usage.input * ASSUMED_PREFIX))
        yield "prompt_cache", _kept(with_it), with_it
    if not usage.batch:
        yield "batch", _BATCH, replace(usage, batch=True)
    for rates in _tiers_below(usage, at):
        yield "model", rates.model, replace(usage, rates=rates)
    shorter = _up(usage.output * ASSUMED_OUTPUT)
    yield "output", f"answers of {shorter:,} tokens", replace(usage, output=shorter)


_BATCH = "answers within 24 hours"


def _hits(usage: _Usage) -> str:
    return f"{_percent(usage.hits)} of calls answered from it"


def _kept(usage: _Usage) -> str:
    chosen = usage.prompt_cache
    if chosen.kept != "off":
        return f"{usage.prefix:,} tokens for {chosen.kept}, {_percent(chosen.reads)} reads"
    least = minimum_prefix(usage.rates.model)
    if usage.prefix < least:
        return f"off: {usage.prefix:,} tokens, kept from {least:,} on"
    return f"off: {usage.prefix:,} tokens, read too seldom to pay"


def _tiers_below(usage: _Usage, at: datetime | None) -> Iterator[ModelRates]:
    """Yield the prices of the tiers below the model, those that can read such a prompt."""
    tiers, model = list(conf.TIERS), usage.rates.model
    for tier in tiers[: tiers.index(model)] if model in tiers else tiers:
        try:
            rates = resolve(tier, at=at)
        except UnpricedModel:
            continue
        if usage.input + usage.output <= rates.context_window:
            yield rates


# Figures -----------------------------------------------------------------------------------------


def _ensure_count(name: str, value: int, *, least: int = 0, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name.capitalize()} must be a whole number, not {value!r}.")
    if value < least or (most is not None and value > most):
        span = f"from {least} on" if most is None else f"from {least:,} to {most:,}"
        raise ValueError(f"{name.capitalize()} must be a whole number {span}, not {value}.")


def _up(amount: Fraction) -> int:
    return money.ceil_div(amount.numerator, amount.denominator)


def _decimal(share: Fraction) -> Decimal:
    """Return a share of at most nine decimals as it is."""
    return _ENOUGH.divide(Decimal(share.numerator), Decimal(share.denominator))


def _percent(share: Fraction) -> str:
    tenths = int(share * 1_000)
    return f"{tenths // 10} %" if tenths % 10 == 0 else f"{tenths // 10}.{tenths % 10} %"
