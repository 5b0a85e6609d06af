"""The admin: one file a subject, as in ``models``. Importing it registers the pages."""

from __future__ import annotations

from ai_budget.admin.alerts import AlertAdmin
from ai_budget.admin.batches import BatchAdmin, BatchItemAdmin
from ai_budget.admin.budgets import FeatureBudgetAdmin, UserQuotaAdmin
from ai_budget.admin.calls import CallLogAdmin
from ai_budget.admin.prices import ModelRateAdmin
from ai_budget.admin.spend import SpendAdmin
from ai_budget.admin.windows import SpendWindowAdmin

__all__ = [
    "AlertAdmin",
    "BatchAdmin",
    "BatchItemAdmin",
    "CallLogAdmin",
    "FeatureBudgetAdmin",
    "ModelRateAdmin",
    "SpendAdmin",
    "SpendWindowAdmin",
    "UserQuotaAdmin",
]
