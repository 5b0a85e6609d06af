"""Dated prices: what a million tokens of a model cost at a moment, in whole nano-dollars.

The source is the library ``genai-prices``. A ``ModelRate`` row wins over it from its date on.
What the library lacks is added in ``ALIASES``, ``US_GEO`` and ``BATCH`` below, with its source:
https://platform.claude.com/docs/en/about-claude/pricing, read on 2026-11-22.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any

from django.db import OperationalError, ProgrammingError

from ai_budget import money, periods
from ai_budget.conf import conf
from ai_budget.exceptions import UnpricedModel
from ai_budget.models import ModelRate
from ai_budget.pricing.model_names import is_spelling_of, means

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice

log = logging.getLogger("ai_budget")

Ratio = tuple[int, int]

BATCH: Ratio = (1, 2)
"""Message batches cost half, prompt cache included; searches are not discounted."""

US_GEO: Ratio = (11, 10)
"""Inference in the US only costs 1.1 times as much, for models from 4.6 on."""

ALIASES = {
    "claude-mythos-5": "claude-fable-5",
    "claude-mythos-5-1": "claude-fable-5-1",
    "claude-mythos-preview": "claude-fable-5",
}
"""Models that the library does not list, and the one whose prices they share."""

WEB_SEARCHES = 10 * money.NANO_PER_USD
"""A thousand web searches, where the library is silent (it is for Bedrock and Vertex)."""

DEAREST = "dearest known"
"""The source of the prices of a model that has none of its own, where such are allowed."""

WIDEST_WINDOW = 1_000_000
"""The context window of the current models, in tokens: assumed where the library is silent."""

IMAGE_TOKENS = 4_784 + 16
"""The most an image can take, models from Opus 4.7 on, and its frame.
https://platform.claude.com/docs/en/build-with-claude/vision"""

IMAGE_TOKENS_BEFORE_4_7 = 1_568 + 16

_BEFORE_4_6 = re.compile(r"claude-(?:[23v]|instant|[a-z]+-4-[015]\b|[a-z]+-4(?:@|-20|$)|4-)")
_BEFORE_4_7 = re.compile(_BEFORE_4_6.pattern + r"|claude-[a-z]+-4[-.]6\b")

CACHE_LIFETIMES = {"5m": 300, "1h": 3_600}
"""For how many seconds a prefix is kept; each read keeps it for as long again.
https://platform.claude.com/docs/en/build-with-claude/prompt-caching"""

_MINIMUM_PREFIX = (
    (re.compile(r"opus-4-[56]\b|haiku-4-5\b"), 4_096),
    (re.compile(r"opus-4-7\b|mythos-preview|3-(?:5-)?haiku"), 2_048),
    (re.compile(r"sonnet-5(?!-\d\b)|-4-\d\b|-4(?:@|-20|$)|claude-[23]"), 1_024),
)

_LIBRARY_PROVIDERS = {
    "anthropic": "anthropic",
    "bedrock": "aws",
    "vertex": "google",
    "foundry": "azure",
}

_RELOAD_SECONDS = 10.0
_KEPT = 2_000


def is_before_4_6(model: str) -> bool:
    """Say whether a model is older than the 4.6 family."""
    return _BEFORE_4_6.search(model) is not None


def minimum_prefix(model: str) -> int:
    """Return how many tokens a prefix must have to be kept; a shorter one is read anew.

    "Cache limitations" on https://platform.claude.com/docs/en/build-with-claude/prompt-caching,
    autumn 2026.
    """
    return next((least for name, least in _MINIMUM_PREFIX if name.search(model)), 512)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRates:
    """Nano-dollars per million tokens of each class."""

    input: int
    output: int
    cache_write_5m: int
    cache_write_1h: int
    cache_read: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """The rates of requests whose whole prompt is above so many tokens."""

    above: int
    rates: TokenRates


@dataclass(frozen=True, kw_only=True)
class ModelRates:
    """All prices of one model at one moment, and the facts that bounds are made of."""

    model: str
    provider: str
    source: str
    standard: tuple[Band, ...]
    fast: tuple[Band, ...] = ()
    web_searches: int = WEB_SEARCHES
    us_geo: Ratio = US_GEO
    context_window: int = WIDEST_WINDOW
    image_tokens: int = IMAGE_TOKENS

    def bands(self, speed: str) -> tuple[Band, ...]:
        """Return the bands of a speed, the lowest first; UnpricedModel where it has none."""
        if speed != "fast":
            return self.standard
        if not self.fast:
            raise UnpricedModel(
                f"No fast-mode price is known for {self.model}. Leave out speed, or add a model "
                "rate for the fast speed in admin."
            )
        return self.fast

    def at(self, prompt_tokens: int, speed: str) -> TokenRates:
        """Return the rates of a request: the highest band that its prompt is above."""
        bands = self.bands(speed)
        rates = bands[0].rates
        for band in bands[1:]:
            if prompt_tokens > band.above:
                rates = band.rates
        return rates

    @cached_property
    def reference(self) -> str:
        """These prices as one line, to freeze on the call they were used for."""
        bands = [
            f"{speed}>{band.above}="
            + "/".join(str(getattr(band.rates, one.name)) for one in fields(TokenRates))
            for speed, group in (("standard", self.standard), ("fast", self.fast))
            for band in group
        ]
        geo = f"us={self.us_geo[0]}/{self.us_geo[1]}"
        return f"{self.source}; {self.model}; {'; '.join(bands)}; {self.web_searches}; {geo}"

    @classmethod
    def of_reference(cls, reference: str, *, provider: str) -> ModelRates:
        """Return the prices that were frozen in a reference: all that a cost is reckoned with.

        Raises ``ValueError`` for what is none.
        """
        source, model, *bands, searches, geo = reference.split("; ")
        by_speed: dict[str, list[Band]] = {"standard": [], "fast": []}
        for band in bands:
            speed, above, *amounts = re.split(r"[>=/]", band)
            if speed not in by_speed:
                raise ValueError("The reference has a speed that nobody has priced.")
            names = (one.name for one in fields(TokenRates))
            rates = TokenRates(**dict(zip(names, map(int, amounts), strict=True)))
            by_speed[speed].append(Band(above=int(above), rates=rates))
        over, under = geo.removeprefix("us=").split("/")
        if not by_speed["standard"]:
            raise ValueError("The reference has no standard prices.")
        return cls(
            model=model,
            provider=provider,
            source=source,
            standard=tuple(by_speed["standard"]),
            fast=tuple(by_speed["fast"]),
            web_searches=int(searches),
            us_geo=(int(over), int(under)),
        )


def resolve(
    model: str, *, at: datetime | None = None, provider: str = "anthropic", region: str = ""
) -> ModelRates:
    """Return the prices in force at a moment (default: now), from memory where possible.

    Raises ``UnpricedModel``; where ``UNPRICED_MODEL`` is "allow" returns the dearest known.
    """
    if at is None:
        at = periods.now()
    elif at.tzinfo is None:
        raise ValueError("A price is that of a moment: at must be an aware datetime.")
    prices = _prices()
    for start, end, rates in prices.resolved.get((model, provider, region), ()):
        if start <= at < end:
            return rates
    return _resolve(model, provider, region, at, prices)


def published(
    model: str, *, at: datetime | None = None, provider: str = "anthropic"
) -> ModelRates | None:
    """Return what anybody pays at a moment, without rates of one's own; None where nobody says."""
    return _from_library(model, provider, periods.now() if at is None else at)


def forget() -> None:
    """Drop what is remembered: a rate was changed in this process."""
    global _known, _known_at
    _known, _known_at = _Prices(), float("-inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prices:
    """Where prices come from, and what was resolved from just these.

    A thread that is still resolving while prices change writes into the old ones.
    """

    rows: tuple[ModelRate, ...] = ()
    snapshot: object = None
    resolved: dict[tuple[str, str, str], tuple[tuple[datetime, datetime, ModelRates], ...]] = field(
        default_factory=dict
    )


_known = _Prices()
_known_at = float("-inf")


def _prices() -> _Prices:
    """Return the sources of prices, looked at again every few seconds for changes elsewhere."""
    global _known, _known_at
    now = periods.monotonic()
    if now - _known_at < _RELOAD_SECONDS:
        return _known
    from genai_prices import data_snapshot

    snapshot = data_snapshot.get_snapshot()
    try:
        rows = tuple(ModelRate.objects.using(conf.LEDGER_DATABASE).order_by("valid_from"))
    except (OperationalError, ProgrammingError):
        # Prices can be asked for before the tables are there.
        log.warning("The table of model rates cannot be read; the prices known so far stand.")
        return _known
    if _known.snapshot is not snapshot or _versions(_known.rows) != _versions(rows):
        _known = _Prices(rows=rows, snapshot=snapshot)
    _known_at = now
    return _known


def _versions(rows: Sequence[ModelRate]) -> list[tuple[Any, ...]]:
    return [
        tuple(getattr(row, column.attname) for column in row._meta.concrete_fields) for row in rows
    ]


def _resolve(model: str, provider: str, region: str, at: datetime, prices: _Prices) -> ModelRates:
    rows = [row for row in prices.rows if _row_is_for(row, model, provider, region)]
    start, end = _span(at, rows)
    in_force = [row for row in rows if _is_in_force(row, at)]
    rates = _with_own(_from_library(model, provider, at), model, provider, in_force)
    if rates is None:
        if conf.UNPRICED_MODEL != "allow":
            raise UnpricedModel(
                f"No price is known for the model {model!r} of {provider}. Check its name, "
                "update genai-prices, or add a model rate in admin."
            )
        # Not remembered: the setting may change at any call.
        return _dearest(model, provider, at, [row for row in prices.rows if _is_in_force(row, at)])
    resolved, key = prices.resolved, (model, provider, region)
    if len(resolved) >= _KEPT:
        resolved.clear()
    resolved[key] = (*resolved.get(key, ()), (start, end, rates))[-8:]
    return rates


def _span(at: datetime, rows: Sequence[ModelRate]) -> tuple[datetime, datetime]:
    """Return the time around ``at`` in which no price changes: library dates are UTC days."""
    utc = at.astimezone(UTC)
    midnight = datetime(utc.year, utc.month, utc.day, tzinfo=UTC)
    start, end = midnight, midnight + timedelta(days=1)
    for row in rows:
        for edge in (row.valid_from, row.valid_until):
            if edge is not None and edge <= at:
                start = max(start, edge)
            elif edge is not None:
                end = min(end, edge)
    return start, end


def _row_is_for(row: ModelRate, model: str, provider: str, region: str) -> bool:
    if row.provider != provider or row.region not in ("", region):
        return False
    return is_spelling_of(model, row.model)


def _is_in_force(row: ModelRate, at: datetime) -> bool:
    return row.valid_from <= at and (row.valid_until is None or at < row.valid_until)


# The library


def _from_library(model: str, provider: str, at: datetime) -> ModelRates | None:
    from genai_prices import data_snapshot

    snapshot = data_snapshot.get_snapshot()
    library_provider = _LIBRARY_PROVIDERS.get(provider, "anthropic")
    name = ALIASES.get(re.sub(r"[-@]\d{8}$", "", model), model)
    try:
        _, info = snapshot.find_provider_model(name, None, library_provider, None)
    except LookupError:
        return None
    if not means(name, info):
        return None
    standard = _bands(info.get_prices(at))
    if standard is None:
        return None
    window = info.context_window or WIDEST_WINDOW
    if standard[-1].above >= window:
        # A tier above the window: the model has a wider one behind a beta header.
        window = WIDEST_WINDOW
    return ModelRates(
        model=model,
        provider=provider,
        source=f"genai-prices {_library_version()}",
        standard=standard,
        fast=_fast(info, at),
        web_searches=_web_searches(info.get_prices(at)),
        # Elsewhere the region is part of the model's name or of the rate.
        us_geo=US_GEO if provider == "anthropic" and not is_before_4_6(info.id) else (1, 1),
        context_window=window,
        image_tokens=IMAGE_TOKENS_BEFORE_4_7 if _BEFORE_4_7.search(info.id) else IMAGE_TOKENS,
    )


def _bands(price: ModelPrice) -> tuple[Band, ...] | None:
    if price.input_mtok is None or price.output_mtok is None:
        return None
    starts = {0}
    for value in vars(price).values():
        starts.update(tier.start for tier in getattr(value, "tiers", ()))
    return tuple(Band(above=above, rates=_token_rates(price, above)) for above in sorted(starts))


def _token_rates(price: ModelPrice, above: int) -> TokenRates:
    return _complete(
        _nanousd(price.input_mtok, above) or 0,
        _nanousd(price.output_mtok, above) or 0,
        _nanousd(price.cache_write_mtok, above),
        _nanousd(price.cache_write_1h_mtok, above),
        _nanousd(price.cache_read_mtok, above),
    )


def _complete(
    given: int, output: int, write_5m: int | None, write_1h: int | None, read: int | None
) -> TokenRates:
    """Fill in cache prices by the API's own multiples; a read without a price saves nothing."""
    return TokenRates(
        input=given,
        output=output,
        cache_write_5m=money.ceil_div(given * 5, 4) if write_5m is None else write_5m,
        cache_write_1h=given * 2 if write_1h is None else write_1h,
        cache_read=given if read is None else read,
    )


def _nanousd(price: Any, above: int) -> int | None:
    """Return dollars per million tokens, flat or tiered, in the band that starts there."""
    if price is None:
        return None
    amount: Decimal = getattr(price, "base", price)
    for tier in getattr(price, "tiers", ()):
        if above >= tier.start:
            amount = tier.price
    return money.parse_usd(amount)


def _fast(info: ModelInfo, at: datetime) -> tuple[Band, ...]:
    variants = info.price_variants or ()
    if not any(variant.when == {"speed": "fast"} for variant in variants):
        return ()
    return _bands(info.get_prices(at, {"speed": "fast"})) or ()


def _web_searches(price: ModelPrice) -> int:
    return _nanousd(price.web_searches_kcount, 0) or WEB_SEARCHES


def _library_version() -> str:
    import genai_prices

    return genai_prices.__version__


def _dearest(model: str, provider: str, at: datetime, own: Sequence[ModelRate]) -> ModelRates:
    """Return, field by field, the dearest that any model of Claude costs."""
    known = list(_all_known(at, own))
    standard = [band.rates for rates in known for band in rates.standard]
    fast = [band.rates for rates in known for band in rates.fast]
    return ModelRates(
        model=model,
        provider=provider,
        source=DEAREST,
        standard=(Band(above=0, rates=_highest(standard)),),
        fast=(Band(above=0, rates=_highest(standard + fast)),),
        web_searches=max(rates.web_searches for rates in known),
    )


def _highest(rates: Sequence[TokenRates]) -> TokenRates:
    names = [one.name for one in fields(TokenRates)]
    return TokenRates(**{name: max(getattr(one, name) for one in rates) for name in names})


def _all_known(at: datetime, own: Sequence[ModelRate]) -> Iterator[ModelRates]:
    from genai_prices import data_snapshot

    for provider in data_snapshot.get_snapshot().providers:
        if provider.id == "anthropic":
            for info in provider.models:
                rates = _from_library(info.id, "anthropic", at)
                if rates is not None:
                    yield rates
    for row in own:
        rates = _with_own(None, row.model, row.provider, [row])
        if rates is not None:
            yield rates


# The project's own rates


def _with_own(
    library: ModelRates | None, model: str, provider: str, rows: Sequence[ModelRate]
) -> ModelRates | None:
    """Lay the rows over the library's rates, the more particular and the later ones last."""
    if not rows:
        return library
    rows = sorted(rows, key=lambda row: (row.region != "", len(row.model), row.valid_from))
    standard = _lay(library.standard if library else (), rows, ModelRate.Speed.STANDARD)
    if not standard:
        return None
    base = library or ModelRates(model=model, provider=provider, source="", standard=standard)
    if library is None and provider != "anthropic":
        base = replace(base, us_geo=(1, 1))
    searches = [row.web_search_usd for row in rows if row.web_search_usd is not None]
    return replace(
        base,
        source=f"model rate {rows[-1].pk}",
        standard=standard,
        fast=_lay(base.fast, rows, ModelRate.Speed.FAST),
        web_searches=money.parse_usd(searches[-1]) if searches else base.web_searches,
    )


def _lay(
    bands: tuple[Band, ...], rows: Sequence[ModelRate], speed: ModelRate.Speed
) -> tuple[Band, ...]:
    laid = {band.above: band.rates for band in bands}
    for row in rows:
        if row.speed != speed:
            continue
        lower = [above for above in laid if above <= row.prompt_tokens_above]
        under = laid[max(lower)] if lower else None
        rates = _over(row, under)
        if rates is not None:
            laid[row.prompt_tokens_above] = rates
    if laid and 0 not in laid:
        # Prices known for long prompts only: the same, rather than none, for short ones.
        laid[0] = laid[min(laid)]
    return tuple(Band(above=above, rates=laid[above]) for above in sorted(laid))


def _over(row: ModelRate, under: TokenRates | None) -> TokenRates | None:
    """Return the row's rates, its empty ones from the band beneath; None if it has no price."""

    def pick(value: Decimal | None, inherited: int | None) -> int | None:
        return inherited if value is None else money.parse_usd(value)

    given = pick(row.input_usd, under.input if under else None)
    output = pick(row.output_usd, under.output if under else None)
    if given is None or output is None:
        return None
    return _complete(
        given,
        output,
        pick(row.cache_write_5m_usd, under.cache_write_5m if under else None),
        pick(row.cache_write_1h_usd, under.cache_write_1h if under else None),
        pick(row.cache_read_usd, under.cache_read if under else None),
    )
