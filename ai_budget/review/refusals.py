"""How often calls were refused, which balances count by the day."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import islice

from django.db import connections

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.models import FeatureBudget, SpendWindow
from ai_budget.periods import Period
from ai_budget.policy.limits import caller_scopes
from ai_budget.review.spans import Span
from ai_budget.values import SITE, Charge

_FEATURE = "feature:"
_KEYS_AT_ONCE = 5_000
_MOST_KEYS = 50_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusals:
    """How often a feature was refused, whichever limit did it."""

    feature: str
    refused: int


def by_refusal(span: Span, *, using: str | None = None) -> tuple[Refusals, ...]:
    """Return how often each feature was refused on the days that the span touches.

    Nobody counts by feature how often one user, model or tag was refused: of such a span, none.
    """
    if span.is_narrow:
        return ()
    alias = using or conf.LEDGER_DATABASE
    scopes = {_FEATURE + name: name for name in _names(span.feature, alias)}
    refused = _refused(list(scopes), span, alias)
    rows = (Refusals(feature=scopes[scope], refused=count) for scope, count in refused.items())
    return tuple(sorted(rows, key=lambda it: (-it.refused, it.feature)))


def refused_in(span: Span, refusals: Sequence[Refusals], *, using: str | None = None) -> int | None:
    """Return how often calls of the span were refused; None where nobody counts that."""
    if span.model or span.tag is not None:
        return None
    if span.user_id is None:
        return sum(row.refused for row in refusals)
    if span.feature != SITE:
        return None
    (scope, _), *_others = caller_scopes(Charge(feature=SITE, user_id=span.user_id))
    return sum(_refused([scope], span, using or conf.LEDGER_DATABASE).values())


def _names(feature: str, alias: str) -> list[str]:
    """Return the features of a category, or all of them, and the name itself."""
    budgets = FeatureBudget.objects.using(alias)
    if feature != SITE:
        children = budgets.filter(parent__name=feature).values_list("name", flat=True)
        return [feature, *children]
    return [*budgets.values_list("name", flat=True)]


def _refused(scopes: Sequence[str], span: Span, alias: str) -> dict[str, int]:
    """Return the refusals of each scope that was refused at all."""
    first, after = _days(span)
    windows = SpendWindow.objects.using(alias).filter(refused__gt=0).order_by()
    if (after - first).days * len(scopes) > _MOST_KEYS:
        found = [
            windows.filter(
                period=Period.DAY, first_day__gte=first, first_day__lt=after, scope__in=scopes
            )
        ]
    else:
        # Balances are by far the most rows there are, and these few are known by name.
        days = [first + timedelta(days=number) for number in range((after - first).days)]
        keys = (SpendWindow.key_for(scope, Period.DAY, day) for scope in scopes for day in days)
        most = connections[alias].features.max_query_params or _KEYS_AT_ONCE
        some_at_once = _parts(keys, min(most - 10, _KEYS_AT_ONCE))
        found = [windows.filter(pk__in=some) for some in some_at_once]
    refused: dict[str, int] = {}
    for rows in found:
        for scope, count in rows.values_list("scope", "refused"):
            refused[scope] = refused.get(scope, 0) + count
    return refused


def _days(span: Span) -> tuple[date, date]:
    """Return the first day that a span touches, and the first after it that it does not."""
    zone = conf.TIME_ZONE
    last = periods.day(span.until - timedelta(microseconds=1), zone).first_day
    return periods.day(span.since, zone).first_day, last + timedelta(days=1)


def _parts(keys: Iterable[str], size: int) -> Iterator[list[str]]:
    some = iter(keys)
    while part := list(islice(some, size)):
        yield part
