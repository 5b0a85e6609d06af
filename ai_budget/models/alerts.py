"""Alerts: what somebody should know about a budget, each told once, and how it was delivered."""

from __future__ import annotations

from decimal import Decimal
from typing import ClassVar

from django.conf import settings
from django.db import models
from django.urls import NoReverseMatch, reverse
from django.utils.translation import gettext_lazy as _

from ai_budget import money
from ai_budget.models import alert_texts
from ai_budget.models.windows import SpendWindow


class Alert(models.Model):
    """One thing that came to pass, of one budget in one day or month.

    Whoever inserts the row has it delivered, so that it is told once however many workers look:
    its key is what it is about. Of several thresholds that were passed at once the highest covers
    the others. It names its budget, and outlives it.
    """

    class Kind(models.TextChoices):
        PLAN = "plan", _("Plan")
        LIMIT = "limit", _("Limit")
        OFF = "off", _("Limit used up")
        FORECAST = "forecast", _("Forecast")
        LADDER = "ladder", _("Cheaper model")
        SPIKE = "spike", _("Spike")
        UNPRICED = "unpriced", _("Unpriced model")
        BOUND = "bound", _("Bound too low")
        BATCH = "batch", _("Batch failed")
        UNCERTAIN = "uncertain", _("Batch uncertain")
        STUCK = "stuck", _("Batch stuck")
        SET_ASIDE = "aside", _("Set aside")

    class Effect(models.TextChoices):
        ALERTS = "alerts", _("Only alerts")
        DOWNGRADES = "downgrades", _("Downgrades")
        REFUSES = "refuses", _("Refuses")
        SHADOW = "shadow", _("Shadow mode: would refuse or downgrade")

    kind = models.CharField(_("kind"), max_length=9, choices=Kind)
    budget = models.CharField(_("budget"), max_length=64)
    period = models.CharField(_("period"), max_length=5, choices=SpendWindow.Period)
    first_day = models.DateField(_("first day"))
    threshold = models.PositiveIntegerField(_("threshold (%)"), default=0)
    about = models.CharField(
        _("about"),
        max_length=200,
        blank=True,
        help_text=_(
            "A model, a batch, a row, or the amount of a limit: raised, it is another limit."
        ),
    )

    effect = models.CharField(_("effect"), max_length=10, choices=Effect, default=Effect.ALERTS)
    spent_nanousd = models.BigIntegerField(_("spent"), default=0)
    of_nanousd = models.BigIntegerField(
        _("compared with"),
        null=True,
        blank=True,
        help_text=_("The plan, the limit, what was held, or what is usual."),
    )
    forecast_nanousd = models.BigIntegerField(_("forecast"), null=True, blank=True)
    percent = models.BigIntegerField(_("percent"), null=True, blank=True)
    count = models.PositiveBigIntegerField(
        _("count"), default=0, help_text=_("Calls, refusals or items.")
    )
    model = models.CharField(_("model"), max_length=128, blank=True)
    rung = models.PositiveSmallIntegerField(_("rung (%)"), null=True, blank=True)
    since = models.DateTimeField(_("since"), null=True, blank=True)
    until = models.DateTimeField(_("resets at"), null=True, blank=True)

    covered = models.BooleanField(
        _("covered"),
        default=False,
        help_text=_("Passed together with a higher threshold, which was told instead."),
    )
    raised_at = models.DateTimeField(_("raised at"), db_index=True)
    acknowledged_at = models.DateTimeField(_("acknowledged at"), null=True, blank=True)
    acknowledged_by = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        verbose_name=_("acknowledged by"),
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="+",
    )

    class Meta:
        verbose_name = _("alert")
        verbose_name_plural = _("alerts")
        ordering: ClassVar = ["-id"]
        default_permissions = ("view",)
        permissions: ClassVar = [("acknowledge_alert", "Can acknowledge alerts")]
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["first_day", "budget", "period", "kind", "threshold", "about"],
                name="ai_budget_alert_once",
            ),
        ]

    def __str__(self) -> str:
        return self.title

    @property
    def title(self) -> str:
        """What came to pass, in one line."""
        return alert_texts.title(self)

    @property
    def text(self) -> str:
        """What came to pass, with the figures, what it has for effect and when that ends."""
        return alert_texts.text(self)

    @property
    def path(self) -> str:
        """Where the site's admin shows it; empty where there is no admin."""
        try:
            return reverse("admin:ai_budget_alert_change", args=[self.pk])
        except NoReverseMatch:
            return ""

    @property
    def spent_usd(self) -> Decimal:
        return money.to_usd(self.spent_nanousd)

    @property
    def of_usd(self) -> Decimal | None:
        """The plan, the limit, what was held, or what is usual."""
        return None if self.of_nanousd is None else money.to_usd(self.of_nanousd)

    @property
    def forecast_usd(self) -> Decimal | None:
        return None if self.forecast_nanousd is None else money.to_usd(self.forecast_nanousd)


class AlertDelivery(models.Model):
    """An alert on its way to one notifier.

    Only one worker at a time has it: whoever moves ``due_at`` on. It is over without one.
    """

    alert = models.ForeignKey(
        Alert, verbose_name=_("alert"), on_delete=models.CASCADE, related_name="deliveries"
    )
    notifier = models.CharField(_("notifier"), max_length=200)
    tries = models.PositiveIntegerField(_("tries"), default=0)
    due_at = models.DateTimeField(_("due at"), null=True, blank=True)
    delivered_at = models.DateTimeField(_("delivered at"), null=True, blank=True)
    error = models.CharField(_("error"), max_length=64, blank=True)

    class Meta:
        verbose_name = _("delivery of an alert")
        verbose_name_plural = _("deliveries of alerts")
        ordering: ClassVar = ["alert", "id"]
        default_permissions = ()
        indexes: ClassVar = [models.Index(fields=["due_at"], name="ai_budget_delivery_due")]
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["alert", "notifier"], name="ai_budget_delivery_once_a_notifier"
            ),
        ]

    def __str__(self) -> str:
        return self.notifier
