"""The app's entry in INSTALLED_APPS."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from django.apps import AppConfig
from django.core import checks
from django.core.signals import setting_changed
from django.utils.translation import gettext_lazy as _

from ai_budget.conf import conf

log = logging.getLogger("ai_budget")


class AIBudgetConfig(AppConfig):
    name = "ai_budget"
    verbose_name = _("AI budget")
    # Fixed here so that a project's DEFAULT_AUTO_FIELD never asks for a migration of ours.
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from ai_budget import masking
        from ai_budget.checks import check_database, check_settings
        from ai_budget.metrics import log as lines
        from ai_budget.metrics import otel
        from ai_budget.signals import batch_waiting, call_refused, call_settled

        masking.mask_settings()
        setting_changed.connect(masking.mask_settings, dispatch_uid="ai_budget.masking")
        checks.register(check_settings)
        checks.register(check_database)
        batch_waiting.connect(_send_tasks, dispatch_uid="ai_budget.tasks")
        call_settled.connect(lines.write_line, dispatch_uid="ai_budget.metrics.log")
        call_settled.connect(otel.tell_settled, dispatch_uid="ai_budget.metrics.otel")
        call_refused.connect(otel.tell_refused, dispatch_uid="ai_budget.metrics.otel")


def _send_tasks(submission_ids: Sequence[int], **kwargs: object) -> None:
    """Send a task for each submission that waits; where that fails the tick will do it."""
    if conf.QUEUE != "celery":
        return
    from ai_budget.tasks import send

    try:
        send(submission_ids)
    except Exception as error:
        log.warning(
            "Tasks for %s submissions could not be sent (%s); the next tick does their work.",
            len(submission_ids),
            type(error).__name__,
        )
