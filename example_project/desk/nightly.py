"""The night's work: every note in the box gets its kind, by one batch at half the price.

Run ``manage.py sort_notes`` once a night by cron or Celery beat, and ``manage.py ai_budget_tick``
every minute, which sends the batch and brings what was answered.
"""

from __future__ import annotations

from django.contrib.auth.models import AnonymousUser

import ai_budget
from ai_budget import periods
from ai_budget.batches import Result
from ai_budget.conf import conf
from ai_budget.models import Batch
from example_project.desk.models import Note

FEATURE = "nightly"
SORTER = (
    "You sort the notes that readers leave at the desk of a library. "
    f"Answer with one word: {', '.join(Note.Kind.values)}."
)


def sort_notes() -> Batch | None:
    """Submit all notes without a kind, once a day; return the batch, None without a note.

    Called again on the same day it returns the batch of that day. As many notes are sorted as the
    budget has room for; raises ``BudgetExceeded`` where it has none.
    """
    notes = Note.objects.filter(kind="").order_by("left_at", "pk")
    if not notes.exists():
        return None
    today = periods.day(periods.now(), conf.TIME_ZONE).first_day
    batch: Batch = ai_budget.submit_batch(
        notes.values_list("pk", "text"),
        feature=FEATURE,
        # The library pays, not whoever of the staff starts it.
        user=AnonymousUser(),
        system=SORTER,
        max_tokens=10,
        allow_partial=True,
        idempotency_key=f"{FEATURE} {today}",
        on_result="example_project.desk.nightly.store_kind",
    )
    return batch


def store_kind(result: Result) -> None:
    """Give a note the kind that came for it. What was not answered waits for the next night."""
    if not result.ok:
        return
    word = result.text.strip(" .\n").lower()
    kind = word if word in Note.Kind.values else Note.Kind.OTHER
    Note.objects.filter(pk=result.key).update(kind=kind)


def latest() -> Batch | None:
    """Return the last night's batch, if there was any."""
    return Batch.objects.filter(feature__name=FEATURE).order_by("-pk").first()
