"""Signals, sent by the verbs and the guard, never by ``save()``.

Receivers run in the thread of the call, after its money is settled and outside any
transaction of the ledger; an exception in one is logged and changes nothing.
"""

from __future__ import annotations

from django.dispatch import Signal

call_settled = Signal()
"""A booking was made: of an attempt, of an answer from the cache, or of an item of a batch.

Arguments: ``reservation`` and ``settlement`` (ai_budget.values), and ``context``, the
contextvars.Context that the request was made in; None where a worker books for somebody else.
Where nothing was reserved the reservation's id is 0; that of an item is its batch's. Neither
names balances.

Each is told once. After an estimate the truth may come, and is told as well; so is each item of
a batch that was given up as a whole. Two ticks that run at once may both tell of a call whose
worker died.
"""

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

alert_raised = Signal()
"""Something about a budget came to pass that somebody should know. Argument: ``alert``.

Sent by ``ai_budget_tick``, once an alert, however many thresholds were passed at once: again only
where the worker that sent it died in the middle.
"""
