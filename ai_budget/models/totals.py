"""Sums of the log of calls, so that no page has to read every call of a month.

What the log says is so; these are sums of it that are brought up to date now and then. A mark says
which of them a booking has changed since, so that a reader counts those calls itself.
"""

from __future__ import annotations

from typing import ClassVar

from django.conf import settings
from django.db import models
from django.utils.translation import gettext_lazy as _

from ai_budget.models.calls import CallLog
from ai_budget.models.windows import SpendWindow

STATE = 1
"""The primary key of the one row of ``TotalState``."""


class _Total(models.Model):
    """Attempts that are over and alike, added up. What is in flight is in no sum."""

    feature = models.CharField(_("feature"), max_length=64)
    category = models.CharField(_("category"), max_length=64, blank=True)
    provider = models.CharField(_("provider"), max_length=32)
    model = models.CharField(_("model"), max_length=128)
    requested_model = models.CharField(_("requested model"), max_length=128)
    kind = models.CharField(_("kind"), max_length=8, choices=CallLog.Kind)
    status = models.CharField(_("status"), max_length=9, choices=CallLog.Status)
    saved_reason = models.CharField(_("saved by"), max_length=32, blank=True)

    attempts = models.BigIntegerField(_("attempts"))
    counted = models.BigIntegerField(_("counted calls"))
    checked = models.BigIntegerField(
        _("cache checked"), help_text=_("Counted calls that were looked for in the cache.")
    )
    input_tokens = models.BigIntegerField(_("input tokens"))
    cache_write_5m_tokens = models.BigIntegerField(_("5m cache writes"))
    cache_write_1h_tokens = models.BigIntegerField(_("1h cache writes"))
    cache_read_tokens = models.BigIntegerField(_("cache reads"))
    output_tokens = models.BigIntegerField(_("output tokens"))
    thinking_tokens = models.BigIntegerField(_("of which thinking"))
    web_searches = models.BigIntegerField(_("web searches"))
    max_tokens = models.BigIntegerField(_("most output tokens"))
    cut = models.BigIntegerField(_("answers that were cut"))
    roomy = models.BigIntegerField(
        _("roomy answers"), help_text=_("Answers that used less than half of what they might.")
    )
    cost_nanousd = models.BigIntegerField(_("cost"))
    saved_nanousd = models.BigIntegerField(_("saved"))

    class Meta:
        abstract = True


class QuarterTotal(_Total):
    """Sums of a quarter of an hour, which every zone's days are made of."""

    start = models.DateTimeField(_("start"))

    class Meta:
        verbose_name = _("sum of a quarter-hour")
        verbose_name_plural = _("sums of quarter-hours")
        indexes: ClassVar = [models.Index(fields=["start"], name="ai_budget_quarter_start")]

    def __str__(self) -> str:
        return f"{self.feature} {self.start:%Y-%m-%d %H:%M}"


class DayTotal(_Total):
    """Sums of a day of the zone that ``TotalState`` names: of its quarter-hours."""

    day = models.DateField(_("day"))

    class Meta:
        verbose_name = _("spend")
        verbose_name_plural = _("spend")
        default_permissions = ()
        permissions: ClassVar = [
            ("view_spend", "Can see what was spent, by feature, user and model"),
        ]
        indexes: ClassVar = [models.Index(fields=["day", "feature"], name="ai_budget_day_feature")]

    def __str__(self) -> str:
        return f"{self.feature} {self.day}"


class _CallerTotal(models.Model):
    """What one caller spent in a day or a month, as limits count them."""

    period = models.CharField(_("period"), max_length=5, choices=SpendWindow.Period)
    first_day = models.DateField(_("first day"))
    attempts = models.BigIntegerField(_("attempts"))
    calls = models.BigIntegerField(_("calls"))
    cost_nanousd = models.BigIntegerField(_("cost"))
    saved_nanousd = models.BigIntegerField(_("saved"))

    class Meta:
        abstract = True


class UserTotal(_CallerTotal):
    """What one user spent in a day or a month."""

    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        verbose_name=_("user"),
        on_delete=models.DO_NOTHING,
        db_constraint=False,
        db_index=False,
        related_name="+",
    )

    class Meta:
        verbose_name = _("sum of a user")
        verbose_name_plural = _("sums of users")
        indexes: ClassVar = [
            models.Index(fields=["user", "period", "first_day"], name="ai_budget_user_total"),
            models.Index(fields=["period", "first_day", "cost_nanousd"], name="ai_budget_user_top"),
        ]

    def __str__(self) -> str:
        return f"{self.user_id} {self.period} {self.first_day}"


class SubjectTotal(_CallerTotal):
    """What one subject spent in a day or a month."""

    subject = models.CharField(_("subject"), max_length=100)

    class Meta:
        verbose_name = _("sum of a subject")
        verbose_name_plural = _("sums of subjects")
        indexes: ClassVar = [
            models.Index(fields=["subject", "period", "first_day"], name="ai_budget_subject_total"),
            models.Index(
                fields=["period", "first_day", "cost_nanousd"], name="ai_budget_subject_top"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.subject} {self.period} {self.first_day}"


class TotalMark(models.Model):
    """Says that a booking changed the sums of this moment and caller.

    Written in the transaction of the booking, and never waited for: one row a booking, deleted by
    whoever has added up anew what it names. Its user has no constraint, as in ``CallLog``.
    """

    reserved_at = models.DateTimeField(_("reserved at"))
    day = models.DateField(_("day"))
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        verbose_name=_("user"),
        on_delete=models.DO_NOTHING,
        db_constraint=False,
        db_index=False,
        null=True,
        related_name="+",
    )
    subject = models.CharField(_("subject"), max_length=100, blank=True)

    class Meta:
        verbose_name = _("changed sum")
        verbose_name_plural = _("changed sums")

    def __str__(self) -> str:
        return f"{self.reserved_at:%Y-%m-%d %H:%M}"


class TotalState(models.Model):
    """One row: whose days ``DayTotal`` holds, and how far calls were purged.

    Of what was reserved before ``purged_before``, and of callers before ``purged_day``, the sums
    are all there is. Whoever adds up locks the row, so that no older sum is written over a newer.
    """

    zone = models.CharField(_("time zone"), max_length=64, blank=True)
    purged_before = models.DateTimeField(_("purged before"), null=True)
    purged_day = models.DateField(_("first day that is kept"), null=True)

    class Meta:
        verbose_name = _("state of the sums")
        verbose_name_plural = _("state of the sums")

    def __str__(self) -> str:
        return self.zone
