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

call_downgraded = Signal()
"""A cheaper model took over; told once its attempt is booked.

Arguments: ``charge``, ``requested_model``, ``model`` and ``percent``.
"""
