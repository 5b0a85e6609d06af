"""The balances of simulated calls: the sums that the ledger would have kept."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

from ai_budget.models import CallLog, SpendWindow
from ai_budget.policy.limits import balance_keys
from ai_budget.values import BalanceKey, Charge


class Books:
    """Balances by scope and calendar window. All money in nano-dollars."""

    def __init__(self) -> None:
        self._windows: dict[BalanceKey, SpendWindow] = {}

    def enter(self, call: CallLog) -> None:
        """Count a call as its status says: held while reserved, spent after, not if released."""
        for key in self._keys(call.feature_id, call.category, call.user_id, call.day):
            window = self._window(key)
            if call.status == CallLog.Status.RESERVED:
                window.held_nanousd += call.reserved_nanousd
            window.spent_nanousd += call.cost_nanousd or 0
            if call.status != CallLog.Status.RELEASED:
                window.calls += call.counted

    def refuse(self, keys: Iterable[BalanceKey]) -> None:
        """Count a refusal, which leaves no row."""
        for key in keys:
            self._window(key).refused += 1

    def taken(self, key: BalanceKey) -> int:
        """Return what is spent and held."""
        window = self._windows.get(key)
        return 0 if window is None else window.spent_nanousd + window.held_nanousd

    def windows(self) -> list[SpendWindow]:
        """Return all balances, to be written."""
        return list(self._windows.values())

    def _window(self, key: BalanceKey) -> SpendWindow:
        if key not in self._windows:
            self._windows[key] = SpendWindow(
                scope=key.scope, period=key.period, first_day=key.first_day
            )
        return self._windows[key]

    def _keys(self, feature: str, category: str, user_id: object, day: date) -> list[BalanceKey]:
        return balance_keys(Charge(feature=feature, user_id=user_id), category, day)
