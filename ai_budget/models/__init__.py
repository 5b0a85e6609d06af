"""The tables, one file a subject. Imports point down: nothing here knows pricing or policy."""

from __future__ import annotations

from ai_budget.models.alerts import Alert, AlertDelivery
from ai_budget.models.batches import Batch, BatchItem, BatchSubmission
from ai_budget.models.budgets import DowngradeRung, FeatureBudget, LimitOverride, UserQuota
from ai_budget.models.calls import CallLog
from ai_budget.models.prices import ModelRate
from ai_budget.models.texts import CallText
from ai_budget.models.totals import (
    DayTotal,
    QuarterTotal,
    SubjectTotal,
    TotalMark,
    TotalState,
    UserTotal,
)
from ai_budget.models.windows import RateBucket, SpendWindow

__all__ = [
    "Alert",
    "AlertDelivery",
    "Batch",
    "BatchItem",
    "BatchSubmission",
    "CallLog",
    "CallText",
    "DayTotal",
    "DowngradeRung",
    "FeatureBudget",
    "LimitOverride",
    "ModelRate",
    "QuarterTotal",
    "RateBucket",
    "SpendWindow",
    "SubjectTotal",
    "TotalMark",
    "TotalState",
    "UserQuota",
    "UserTotal",
]
