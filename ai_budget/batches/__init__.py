"""Batches: submitted now, answered within a day, at half the price.

``submit_batch`` reserves and returns. All else is done by workers in small steps that may die
anywhere and be repeated: ``advance`` takes one submission one step further, ``tidy`` ends what is
over. A Celery task, ``ai_budget_tick`` or any other queue may call them, many at once.
"""

from __future__ import annotations

from ai_budget.batches.ending import tidy
from ai_budget.batches.handing import Result, results
from ai_budget.batches.resolving import accept, release, send_again
from ai_budget.batches.steps import advance, due
from ai_budget.batches.submitting import cancel, resubmit, submit_batch

__all__ = [
    "Result",
    "accept",
    "advance",
    "cancel",
    "due",
    "release",
    "resubmit",
    "results",
    "send_again",
    "submit_batch",
    "tidy",
]
