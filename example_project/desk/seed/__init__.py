"""A believable month of spend, so that there is something to look at on the first day.

It goes through the models and by the rules of the real thing: each row costs exactly the price
of its tokens, limits refuse, rungs downgrade, and each balance is the sum of its rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from django.db import transaction

from ai_budget.models import CallLog, FeatureBudget, SpendWindow, TotalMark
from ai_budget.review import rollups
from example_project.desk.seed.budgets import CATEGORY, create_budgets
from example_project.desk.seed.people import create_people
from example_project.desk.seed.traffic import simulate

_BATCH = 500


def seed(*, now: datetime) -> bool:
    """Fill the tables once, with the 35 days up to ``now``; say whether there was a need.

    All or nothing. What people changed since is never touched.
    """
    # Only this package makes a category of that name.
    if FeatureBudget.objects.filter(name=CATEGORY).exists():
        return False
    with transaction.atomic():
        people = create_people()
        create_budgets(people)
        month = simulate(people, now=now)
        CallLog.objects.bulk_create(month.calls, batch_size=_BATCH)
        SpendWindow.objects.bulk_create(month.books.windows(), batch_size=_BATCH)
        TotalMark.objects.bulk_create(_marks(month.calls), batch_size=_BATCH)
    rollups.add_up()
    return True


def _marks(calls: Iterable[CallLog]) -> list[TotalMark]:
    """Return what the ledger leaves behind where it books calls."""
    return [
        TotalMark(reserved_at=it.reserved_at, day=it.day, user_id=it.user_id, subject=it.subject)
        for it in calls
    ]
