"""A refusal in words that a reader understands."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

import ai_budget
from ai_budget import money
from ai_budget.conf import conf

P = ParamSpec("P")
View = Callable[Concatenate[HttpRequest, P], HttpResponse]


def refusals_explained(view: View[P]) -> View[P]:
    """Show a page with the numbers when a limit says no, and one when the API does not answer.

    ``BudgetMiddleware`` would answer with a page of its own, which keeps to itself what a
    feature or the site may spend. This desk has open books.
    """

    @wraps(view)
    def explained(request: HttpRequest, /, *args: P.args, **kwargs: P.kwargs) -> HttpResponse:
        # Here, not above: the client takes a second to import, and most pages never need it.
        from anthropic import APIError

        try:
            return view(request, *args, **kwargs)
        except ai_budget.LimitReached as refusal:
            return refused(request, refusal)
        except ai_budget.FeatureDisabled:
            return render(request, "desk/paused.html", status=503)
        except APIError:
            return render(request, "desk/unanswered.html", status=502)

    return explained


def refused(
    request: HttpRequest,
    refusal: ai_budget.LimitReached,
    template: str = "desk/refused.html",
) -> HttpResponse:
    """Say which limit was reached, its numbers, and when to come back: a 429."""
    context = {
        "refusal": refusal,
        "whose": whose(refusal.scope),
        "length": {"day": "daily", "month": "monthly"}.get(refusal.period, refusal.period),
        "limit": _amount(refusal, refusal.limit),
        "spent": _amount(refusal, refusal.spent),
        "held": _amount(refusal, refusal.held) if refusal.held else "",
        "requested": _amount(refusal, refusal.requested),
        "resets_at": refusal.resets_at.astimezone(conf.TIME_ZONE),
    }
    response = render(request, template, context, status=429)
    response["Retry-After"] = str(refusal.retry_after)
    return response


def whose(scope: str) -> str:
    """Name the owner of a limit for the reader, who knows nothing of scopes."""
    if scope == "*":
        return "The whole site’s"
    kind, _, name = scope.partition(":")
    if kind == "user":
        return "Your own"
    return f"The {name} {kind}’s"


def _amount(refusal: ai_budget.LimitReached, amount: int) -> str:
    if refusal.measure == "nanousd":
        return f"${money.to_usd(amount).normalize():f}"
    return f"{amount:,} {refusal.measure}"
