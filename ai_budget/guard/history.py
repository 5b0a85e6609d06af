"""What a feature's latest calls were like: the best guess at the next one."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.db import connections
from django.db.models import QuerySet

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.guard.charge import HELPERS
from ai_budget.ledger.connection import retry
from ai_budget.models import CallLog

LATEST = 100
"""How many calls say what is usual."""

FORGOTTEN_DAYS = 7
"""After which a classifier that did not pay gets another chance."""


def usual_output(feature: str, most: int) -> int:
    """Return the average output of the feature's latest answers, or half of ``most``, in tokens."""
    answers = _calls(feature).filter(status=CallLog.Status.SETTLED).order_by("-id")
    seen = _read(answers.values_list("output_tokens", flat=True))
    usual = sum(seen) // len(seen) if seen else most // 2
    return min(usual, most)


def classified(feature: str) -> tuple[int, int]:
    """Return how many of the latest calls a classifier sent to a cheaper model, and of how many."""
    since = periods.now() - timedelta(days=FORGOTTEN_DAYS)
    calls = _calls(feature).filter(reserved_at__gte=since, decision__startswith="classifier: ")
    levers = _read(calls.order_by("-reserved_at").values_list("saved_reason", flat=True))
    return sum(lever.startswith("routing") for lever in levers), len(levers)


def _read(latest: QuerySet[CallLog, Any]) -> list[Any]:
    return retry(connections[latest.db], lambda: list(latest[:LATEST]))


def _calls(feature: str) -> QuerySet[CallLog, Any]:
    calls = CallLog.objects.using(conf.LEDGER_DATABASE).filter(
        feature_id=feature  # type: ignore[misc] # to_field
    )
    return calls.exclude(kind__in=HELPERS)
