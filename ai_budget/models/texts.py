"""Prompts and answers, apart from the log of calls: they are kept for less long, or not at all."""

from __future__ import annotations

from django.db import models
from django.utils.translation import gettext_lazy as _


class CallText(models.Model):
    """What a call asks and was answered, as JSON.

    What a batch is to send has to be kept until it is answered. After that, and for every other
    call, texts are kept only where the setting LOG_PROMPTS says so, and for the days that
    LOG_PROMPTS_DAYS gives.
    """

    call_id = models.UUIDField(_("call"), primary_key=True)
    request = models.TextField(_("request"), blank=True)
    message = models.TextField(_("message"), blank=True)
    kept_at = models.DateTimeField(_("kept since"), db_index=True)

    class Meta:
        verbose_name = _("text of a call")
        verbose_name_plural = _("texts of calls")

    def __str__(self) -> str:
        return str(self.call_id)
