"""What was spent as FOCUS 1.2 rows, for tools that read the bills of every provider.

One row for each day, feature, model and class of tokens; what batches cost stands apart, at its
own price. The FinOps Open Cost and Usage Specification, version 1.2:
https://focus.finops.org/focus-specification/v1-2/
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from decimal import Decimal, localcontext
from tempfile import SpooledTemporaryFile
from typing import Any
from zoneinfo import ZoneInfo

from ai_budget import money, periods
from ai_budget.exceptions import UnpricedModel
from ai_budget.pricing.rates import BATCH, ModelRates, TokenRates, published, resolve
from ai_budget.review import csv_cells
from ai_budget.review.spans import Span
from ai_budget.review.spending import added
from ai_budget.review.sums import Figures, Reading, reading
from ai_budget.values import Kind, Status

ESTIMATED = "estimated"
"""The class of what was booked without usage: at the most that it can have cost."""

OTHER = "other"
"""The class of what has no tokens, or none with a price."""

WEB_SEARCHES = "web searches"

_CLASSES = {
    "input": ("uncached input", "input_tokens"),
    "cache_write_5m": ("cache write 5m", "cache_write_5m_tokens"),
    "cache_write_1h": ("cache write 1h", "cache_write_1h_tokens"),
    "cache_read": ("cache read", "cache_read_tokens"),
    "output": ("output", "output_tokens"),
}
"""By the name of its rate: each class of tokens, and where they are counted."""

_TOKENS, _SEARCHES = 1_000_000, 1_000  # what rates are for
_IN_MEMORY = 1_000_000
_DIGITS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seller:
    """Who sells a provider's tokens, and as what."""

    name: str
    service: str


_SELLERS = {
    "anthropic": _Seller(name="Anthropic", service="Claude API"),
    "bedrock": _Seller(name="AWS", service="Amazon Bedrock"),
    "vertex": _Seller(name="Google Cloud", service="Vertex AI"),
    "foundry": _Seller(name="Microsoft", service="Microsoft Foundry"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Charge:
    """What one class of tokens of one feature and model cost in a day.

    Unit prices are nano-dollars of one unit, None where the class has none: it is priced by the
    dollar.
    """

    day: date
    feature: str
    category: str
    provider: str
    model: str
    batch: bool
    token_class: str
    quantity: int
    unit: str
    billed_nanousd: int
    contracted_price: Decimal | None = None
    list_price: Decimal | None = None


def focus_lines(span: Span, *, using: str | None = None) -> Iterator[str]:
    """Yield the lines of a CSV with the charges of a span.

    All of it is read at one moment and kept in a file, so that a reader who takes its time keeps
    no transaction open, and the longest span takes no more memory than the shortest.
    """
    with SpooledTemporaryFile(_IN_MEMORY, "w+", encoding="utf-8", newline="") as file:
        with reading(using) as at_once:
            file.writelines(csv_cells.lines(_rows(at_once, span)))
        file.seek(0)
        yield from file


def charges(reading: Reading, span: Span) -> Iterator[Charge]:
    """Yield the charges of each day of a span; together they are what it spent."""
    for day in sorted(day for (day,) in reading.spend(span, "day")):
        window = periods.day(periods.midnight(day, reading.zone), reading.zone)
        since, until = max(window.start, span.since), min(window.end, span.until)
        if since < until:
            yield from _of_day(reading, replace(span, since=since, until=until), day)


def split(amount: int, weights: Sequence[int]) -> list[int]:
    """Divide a whole amount in proportion to weights, exactly: by the largest remainders.

    Where two remainders are equal the first of them gets more. Weights that are all 0 are equal.
    """
    weights = list(weights) if any(weights) else [1] * len(weights)
    whole = sum(weights)
    shares = [amount * weight // whole for weight in weights]
    missing = amount - sum(shares)
    by_remainder = sorted(
        range(len(weights)), key=lambda index: (-(amount * weights[index] % whole), index)
    )
    for index in by_remainder[:missing]:
        shares[index] += 1
    return shares


# Charges -----------------------------------------------------------------------------------------


def _of_day(reading: Reading, span: Span, day: date) -> Iterator[Charge]:
    groups: dict[tuple[str, str, str, str, bool, bool], list[Figures]] = {}
    columns = ("feature", "category", "provider", "model", "kind", "status")
    for (*names, kind, status), figures in reading.by(span, *columns).items():
        feature, category, provider, model = names
        key = (
            feature,
            category,
            provider,
            model,
            kind == Kind.BATCH,
            status == Status.ESTIMATED,
        )
        groups.setdefault(key, []).append(figures)
    for (feature, category, provider, model, batch, estimated), group in sorted(groups.items()):
        figures = added(group)
        about = Charge(
            day=day,
            feature=feature,
            category=category,
            provider=provider,
            model=model,
            batch=batch,
            token_class=ESTIMATED if estimated else OTHER,
            quantity=figures.paid_attempts,
            unit="Requests",
            billed_nanousd=figures.spend_nanousd,
        )
        if estimated:
            yield about
        else:
            yield from _by_class(about, figures, span.since)


def _by_class(about: Charge, figures: Figures, at: datetime) -> list[Charge]:
    """Split a cost over its tokens, in proportion to what the price table asks for each."""
    try:
        rates = resolve(about.model, at=at, provider=about.provider)
    except UnpricedModel:
        return [about]
    with localcontext(prec=_DIGITS):
        parts = list(_parts(about, figures, rates, at))
        # A price is a whole number of billionths of a nano-dollar.
        weights = [int((part.contracted_price or 0) * part.quantity * 10**9) for part in parts]
    if not any(weights):
        return [about] if about.billed_nanousd else []
    shares = split(about.billed_nanousd, weights)
    return [replace(part, billed_nanousd=share) for part, share in zip(parts, shares, strict=True)]


def _parts(about: Charge, figures: Figures, rates: ModelRates, at: datetime) -> Iterator[Charge]:
    """Yield the classes that were used, with their prices and without a cost."""
    listed = published(about.model, at=at, provider=about.provider) or rates
    ours, theirs = rates.standard[0].rates, listed.standard[0].rates
    for name, (token_class, counted) in _CLASSES.items():
        quantity = getattr(figures, counted)
        if quantity:
            yield replace(
                about,
                token_class=token_class,
                quantity=quantity,
                unit="Tokens",
                contracted_price=_token_price(ours, name, batch=about.batch),
                list_price=_token_price(theirs, name, batch=about.batch),
            )
    if figures.web_searches:
        yield replace(
            about,
            token_class=WEB_SEARCHES,
            quantity=figures.web_searches,
            unit="Searches",
            contracted_price=Decimal(rates.web_searches) / _SEARCHES,
            list_price=Decimal(listed.web_searches) / _SEARCHES,
        )


def _token_price(rates: TokenRates, name: str, *, batch: bool) -> Decimal:
    over, under = BATCH if batch else (1, 1)
    return Decimal(getattr(rates, name)) * over / under / _TOKENS


# Rows --------------------------------------------------------------------------------------------


def _rows(reading: Reading, span: Span) -> Iterator[Sequence[Any]]:
    yield COLUMNS
    for charge in charges(reading, span):
        row = row_of(charge, reading.zone)
        yield [row[name] for name in COLUMNS]


def row_of(charge: Charge, zone: ZoneInfo) -> Mapping[str, Any]:
    """Return a charge by the names of the columns."""
    seller = _SELLERS.get(
        charge.provider, _Seller(name=charge.provider or "unknown", service=charge.provider)
    )
    day = periods.day(periods.midnight(charge.day, zone), zone)
    month = periods.month(day.start, zone)
    billed = money.to_usd(charge.billed_nanousd)
    sku = f"{charge.provider}/{charge.model}/{charge.token_class}"
    described = f"{charge.model}: {charge.token_class}{' in batches' if charge.batch else ''}"
    tags = {"feature": charge.feature, "category": charge.category}
    return {
        "BilledCost": billed,
        "BillingAccountId": charge.provider,
        "BillingAccountName": seller.name,
        "BillingCurrency": "USD",
        "BillingPeriodEnd": _moment(month.end),
        "BillingPeriodStart": _moment(month.start),
        "ChargeCategory": "Usage",
        "ChargeClass": None,
        "ChargeDescription": described,
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodEnd": _moment(day.end),
        "ChargePeriodStart": _moment(day.start),
        "ConsumedQuantity": charge.quantity,
        "ConsumedUnit": charge.unit,
        **_prices(charge, billed),
        "EffectiveCost": billed,
        "InvoiceIssuerName": seller.name,
        "PricingCategory": "Standard",
        "ProviderName": seller.name,
        "PublisherName": "Anthropic",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": seller.service,
        "ServiceSubcategory": "Generative AI",
        "SkuId": sku,
        "SkuMeter": charge.token_class,
        "SkuPriceId": f"{sku}/{'batch' if charge.batch else 'standard'}",
        "SubAccountId": charge.feature,
        "SubAccountName": charge.feature,
        "Tags": json.dumps({name: value for name, value in tags.items() if value}),
        "x_Batch": charge.batch,
        "x_Category": charge.category or None,
        "x_Feature": charge.feature,
        "x_Model": charge.model,
        "x_TokenClass": charge.token_class,
    }


def _prices(charge: Charge, billed: Decimal) -> Mapping[str, Any]:
    """Return what is priced, at which prices: price times quantity is the cost, to the digit."""
    if charge.contracted_price is None or charge.list_price is None:
        # What has no unit of its own is priced by the dollar.
        return {
            "PricingQuantity": billed,
            "PricingUnit": "USD",
            "ContractedUnitPrice": Decimal(1),
            "ContractedCost": billed,
            "ListUnitPrice": Decimal(1),
            "ListCost": billed,
        }
    with localcontext(prec=_DIGITS):
        contracted = charge.contracted_price.scaleb(-9)
        listed = charge.list_price.scaleb(-9)
        return {
            "PricingQuantity": charge.quantity,
            "PricingUnit": charge.unit,
            "ContractedUnitPrice": contracted,
            "ContractedCost": contracted * charge.quantity,
            "ListUnitPrice": listed,
            "ListCost": listed * charge.quantity,
        }


def _moment(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


COLUMNS = (
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "ContractedUnitPrice",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
    "SkuId",
    "SkuMeter",
    "SkuPriceId",
    "SubAccountId",
    "SubAccountName",
    "Tags",
    "x_Batch",
    "x_Category",
    "x_Feature",
    "x_Model",
    "x_TokenClass",
)
"""The columns of FOCUS in the order of the alphabet, and then our own."""
