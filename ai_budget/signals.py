"""Signals, sent by the verbs and the guard, never by ``save()``.

Receivers run in the thread of the call, after its money is settled and outside any
transaction of the ledger; an exception in one is logged and changes nothing.
"""

from __future__ import annotations

from django.dispatch import Signal

call_settled = Signal()
"""An attempt was booked. Arguments: ``reservation`` and ``settlement`` (ai_budget.values)."""

call_refused = Signal()
"""A call was refused for good, after what might have helped was tried.

Arguments: ``charge`` (ai_budget.values) and ``error`` (AIBudgetError).
"""

batch_waiting = Signal()
"""Submissions of a batch wait for a worker: to be sent, or to be looked after at once.

Argument: ``submission_ids``. With QUEUE "celery" a task is sent for each; a site with another
queue may have it call ``ai_budget.batches.advance`` with an id. ``ai_budget_tick`` does what
nobody does.
"""

batch_finished = Signal()
"""Every item of a batch is over. Argument: ``batch``, whose ``results()`` can be read.

Sent at least once: again, where the worker that sent it died in the middle.
"""

call_downgraded = Signal()
"""A cheaper model took over; told once its attempt is booked.

Arguments: ``charge``, ``requested_model``, ``model`` and ``percent``.
"""
