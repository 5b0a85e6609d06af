"""Refusals: counted where they count, without a row of their own."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.ledger.base import Ledger
from ai_budget.policy.limits import refused_keys
from ai_budget.values import Charge


def count_refusal(ledger: Ledger, charge: Charge, at: datetime, *, scope: str = "") -> None:
    """Count a call that a limit or a paused budget refused; ``scope`` is that of the limit."""
    day = periods.day(at, conf.TIME_ZONE).first_day
    # One that cannot be counted is a refusal all the same.
    with suppress(LedgerUnavailable):
        ledger.count_refusal(refused_keys(charge, day, scope=scope))
