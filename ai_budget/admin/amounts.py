"""How the admin shows amounts: exact where they are evidence, short where they are compared."""

from __future__ import annotations

from decimal import Decimal

from django import forms
from django.utils import formats
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from ai_budget import money
from ai_budget.review.balances import LimitUse

EMPTY = "–"
_WARN_FROM = 80
_FULL_FROM = 100


class UsdInput(forms.NumberInput):
    """An input for dollars that shows 10, not 10.000000000."""

    def __init__(self, attrs: dict[str, object] | None = None) -> None:
        super().__init__({"class": "vBigIntegerField", "step": "any", **(attrs or {})})

    def format_value(self, value: object) -> str | None:
        if isinstance(value, Decimal):
            return trimmed(value)
        text: str | None = super().format_value(value)
        return text


def trimmed(value: Decimal) -> str:
    """Return a decimal exactly, without zeros that say nothing."""
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def exact_usd(nanousd: int) -> str:
    """Return an amount to its last nano-dollar, with at least two decimals."""
    text = money.format_usd(nanousd, decimals=9)
    end = len(text)
    while text[end - 1] == "0" and end > text.index(".") + 3:
        end -= 1
    return text[:end]


def price(value: Decimal | None) -> str:
    """Return a rate or a limit that someone typed, as they would write it."""
    return EMPTY if value is None else f"${trimmed(value)}"


def count(value: int) -> str:
    """Return a count with the separators of the reader's language."""
    return formats.number_format(value, force_grouping=True)


def milliseconds(value: int | None) -> str:
    """Return a duration as ``850 ms`` or ``12.3 s``."""
    if value is None:
        return EMPTY
    if value < 1000:
        return _("%(number)s ms") % {"number": value}
    return _("%(number)s s") % {"number": formats.number_format(value / 1000, 1)}


def bar(use: LimitUse) -> SafeString:
    """Return a limit's use as a drawn bar with the same figures in words beside it.

    Shapes and widths are presentation attributes and colours are classes: a strict content
    security policy blocks ``style=``.
    """
    spent, held = money.format_usd(use.spent_nanousd), money.format_usd(use.held_nanousd)
    if use.limit_nanousd is None:
        return format_html(
            '<span class="ai-budget-figures" title="{}">{}</span>',
            _("%(spent)s spent, %(held)s held, no limit") % {"spent": spent, "held": held},
            money.format_usd(use.taken_nanousd),
        )
    limit = money.format_usd(use.limit_nanousd)
    spent_width, taken_width = (
        _share(amount, use.limit_nanousd) for amount in (use.spent_nanousd, use.taken_nanousd)
    )
    return format_html(
        '<svg class="ai-budget-bar ai-budget-bar-{}" role="img" width="140" height="8" '
        'viewBox="0 0 100 8" preserveAspectRatio="none"><title>{}</title>'
        '<rect class="ai-budget-track" width="100" height="8"/>'
        '<rect class="ai-budget-held" width="{}" height="8"/>'
        '<rect class="ai-budget-spent" width="{}" height="8"/></svg>'
        '<span class="ai-budget-figures">{}</span>',
        _state(use),
        _title(use, spent=spent, held=held, limit=limit),
        taken_width,
        spent_width,
        _figures(use, limit=limit),
    )


def _figures(use: LimitUse, *, limit: str) -> str:
    figures = {"taken": money.format_usd(use.taken_nanousd), "limit": limit}
    if use.raised:
        return _("%(taken)s of %(limit)s (raised)") % figures
    return _("%(taken)s of %(limit)s") % figures


def _title(use: LimitUse, *, spent: str, held: str, limit: str) -> str:
    figures = {"spent": spent, "held": held, "limit": limit}
    if use.used is None:
        return _("%(spent)s spent, %(held)s held; the limit is %(limit)s") % figures
    figures["percent"] = str(use.used)
    if use.raised:
        return (
            _("%(spent)s spent, %(held)s held: %(percent)s %% of %(limit)s, a limit raised for now")
            % figures
        )
    return _("%(spent)s spent, %(held)s held: %(percent)s %% of %(limit)s") % figures


def _state(use: LimitUse) -> str:
    # A limit of 0 allows nothing, so it is full from the start.
    used = _FULL_FROM if use.used is None else use.used
    if used >= _FULL_FROM:
        return "full"
    return "warn" if used >= _WARN_FROM else "fine"


def _share(amount: int, limit: int) -> str:
    """Return the width of a part of the bar, in hundredths with one decimal."""
    if limit <= 0:
        return "100"
    tenths = min(1000, amount * 1000 // limit)
    return f"{tenths // 10}.{tenths % 10}"
