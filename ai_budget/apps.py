"""The app's entry in INSTALLED_APPS."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks
from django.utils.translation import gettext_lazy as _


class AIBudgetConfig(AppConfig):
    name = "ai_budget"
    verbose_name = _("AI budget")
    # Fixed here so that a project's DEFAULT_AUTO_FIELD never asks for a migration of ours.
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from ai_budget.checks import check_database, check_settings

        checks.register(check_settings)
        checks.register(check_database)
