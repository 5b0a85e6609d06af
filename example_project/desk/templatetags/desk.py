"""How the desk shows money, and the strip with a reader's own numbers."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from django import template

from ai_budget.models import CallLog
from ai_budget.periods import Period
from example_project.desk.usage import allowance

register = template.Library()

_CENTS = 2


@register.filter
def usd(amount: Decimal | None) -> str:
    """Show dollars exactly: at least cents, and every further decimal that is not zero."""
    if amount is None:
        return ""
    exact = amount.normalize()
    decimals = max(_CENTS, -int(exact.as_tuple().exponent))
    return f"${exact:,.{decimals}f}"


@register.filter
def tokens_read(call: CallLog) -> int:
    """Add up the tokens of a call's prompt, however the prompt cache counted them."""
    return (
        call.input_tokens
        + call.cache_read_tokens
        + call.cache_write_5m_tokens
        + call.cache_write_1h_tokens
    )


@register.inclusion_tag("desk/_strip.html")
def budget_strip(user: Any) -> dict[str, Any]:
    """Show what the reader has left today."""
    return {"today": allowance(user, Period.DAY)}
