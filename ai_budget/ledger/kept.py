"""What a purge has left of the journal: which balances it can still be added up for."""

from __future__ import annotations

from datetime import date

from ai_budget import periods
from ai_budget.models import TotalState
from ai_budget.models.totals import STATE


def whole_since(alias: str) -> date | None:
    """Return the first day of the first month that has all its calls; None if all of them do.

    Of balances before that day the calls are gone, or some of them: they must stay as they are.
    """
    states = TotalState.objects.using(alias).filter(pk=STATE, purged_day__isnull=False)
    purged = states.values_list("purged_day", flat=True).first()
    if purged is None or purged.day == 1:
        return purged
    return periods.next_month(purged)
