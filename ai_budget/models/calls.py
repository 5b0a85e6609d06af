"""The log of calls, which is also the journal of the ledger: a row is a reservation."""

from __future__ import annotations

import uuid
from decimal import Decimal
from typing import ClassVar

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils.translation import gettext_lazy as _

from ai_budget import money
from ai_budget.models.budgets import FeatureBudget


class CallLog(models.Model):
    """One HTTP attempt that may cost money, or one answer from the cache.

    Its foreign keys have no constraint in the database: the ledger's connection may not see
    a user whom the caller's open transaction has just created, and must never wait for one.
    So deleting a user changes nothing here, and no balance moves.
    """

    class Status(models.TextChoices):
        RESERVED = "reserved", _("Reserved")
        SETTLED = "settled", _("Settled")
        ESTIMATED = "estimated", _("Estimated")
        RELEASED = "released", _("Released")
        CACHED = "cached", _("Cached")

    class Kind(models.TextChoices):
        ASK = "ask", _("Ask")
        STREAM = "stream", _("Stream")
        BATCH = "batch", _("Batch")
        ROUTER = "router", _("Router")
        SUMMARY = "summary", _("Summary")

    call_id = models.UUIDField(_("call"), default=uuid.uuid4, db_index=True)
    attempt = models.PositiveSmallIntegerField(_("attempt"), default=0)
    counted = models.PositiveIntegerField(
        _("counted calls"),
        default=1,
        help_text=_(
            "1 where this attempt counts as a call in quotas, 0 for its repeats. A batch counts "
            "one for each item that is still open."
        ),
    )
    feature = models.ForeignKey(
        FeatureBudget,
        verbose_name=_("feature"),
        to_field="name",
        on_delete=models.PROTECT,
        db_constraint=False,
        db_index=False,
        related_name="calls",
    )
    category = models.CharField(_("category"), max_length=64, blank=True)
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        verbose_name=_("user"),
        on_delete=models.DO_NOTHING,
        db_constraint=False,
        db_index=False,
        null=True,
        blank=True,
        related_name="+",
    )
    subject = models.CharField(_("subject"), max_length=100, blank=True)
    kind = models.CharField(_("kind"), max_length=8, choices=Kind, default=Kind.ASK)
    status = models.CharField(_("status"), max_length=9, choices=Status, default=Status.RESERVED)
    requested_model = models.CharField(_("requested model"), max_length=128)
    model = models.CharField(_("model"), max_length=128)
    provider = models.CharField(_("provider"), max_length=32, default="anthropic")

    input_tokens = models.PositiveBigIntegerField(_("input tokens"), default=0)
    cache_write_5m_tokens = models.PositiveBigIntegerField(_("5m cache writes"), default=0)
    cache_write_1h_tokens = models.PositiveBigIntegerField(_("1h cache writes"), default=0)
    cache_read_tokens = models.PositiveBigIntegerField(_("cache reads"), default=0)
    output_tokens = models.PositiveBigIntegerField(_("output tokens"), default=0)
    thinking_tokens = models.PositiveBigIntegerField(_("of which thinking"), default=0)
    web_searches = models.PositiveIntegerField(_("web searches"), default=0)
    service_tier = models.CharField(_("service tier"), max_length=16, blank=True)
    speed = models.CharField(_("speed"), max_length=16, blank=True)
    inference_geo = models.CharField(_("inference geography"), max_length=32, blank=True)
    max_tokens = models.PositiveIntegerField(_("most output tokens"), default=0)
    stop_reason = models.CharField(_("stop reason"), max_length=32, blank=True)

    reserved_nanousd = models.BigIntegerField(_("reserved"), default=0)
    cost_nanousd = models.BigIntegerField(_("cost"), null=True, blank=True)
    saved_nanousd = models.BigIntegerField(_("saved"), default=0)
    saved_reason = models.CharField(_("saved by"), max_length=32, blank=True)
    cache_checked = models.BooleanField(
        _("cache checked"),
        default=False,
        help_text=_("Whether the answer was looked for in the response cache."),
    )
    decision = models.CharField(_("decision"), max_length=200, blank=True)
    rates = models.TextField(
        _("rates"), blank=True, help_text=_("The prices that the cost was reckoned with.")
    )

    request_id = models.CharField(_("request id"), max_length=64, blank=True)
    reserved_at = models.DateTimeField(_("reserved at"))
    day = models.DateField(
        _("day"), help_text=_("The calendar day, in the site's zone then, that it counts in.")
    )
    deadline = models.DateTimeField(_("deadline"))
    settled_at = models.DateTimeField(_("settled at"), null=True, blank=True)
    latency_ms = models.PositiveIntegerField(_("latency (ms)"), null=True, blank=True)
    first_token_ms = models.PositiveIntegerField(_("first token (ms)"), null=True, blank=True)
    error = models.CharField(_("error"), max_length=64, blank=True)
    tags = models.JSONField(_("tags"), default=dict, blank=True)

    class Meta:
        verbose_name = _("call")
        verbose_name_plural = _("calls")
        ordering = ["-id"]
        indexes: ClassVar = [
            models.Index(fields=["reserved_at"], name="ai_budget_call_time"),
            models.Index(fields=["feature", "reserved_at"], name="ai_budget_call_feature"),
            models.Index(fields=["user", "reserved_at"], name="ai_budget_call_user"),
            models.Index(fields=["model", "reserved_at"], name="ai_budget_call_model"),
            models.Index(fields=["subject", "reserved_at"], name="ai_budget_call_subject"),
            models.Index(fields=["status", "deadline"], name="ai_budget_call_overdue"),
            models.Index(fields=["request_id"], name="ai_budget_call_request"),
        ]
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=Q(status="reserved", cost_nanousd__isnull=True)
                | Q(~Q(status="reserved"), cost_nanousd__isnull=False),
                name="ai_budget_call_has_cost_once_settled",
            ),
            models.CheckConstraint(
                condition=Q(cost_nanousd__gte=0) | Q(cost_nanousd__isnull=True),
                name="ai_budget_call_cost_not_negative",
            ),
            models.CheckConstraint(
                condition=Q(reserved_nanousd__gte=0),
                name="ai_budget_call_reserved_not_negative",
            ),
            models.CheckConstraint(
                condition=~Q(status__in=["released", "cached"]) | Q(cost_nanousd=0),
                name="ai_budget_call_released_costs_nothing",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.feature_id} #{self.pk}"

    @property
    def reserved_usd(self) -> Decimal:
        return money.to_usd(self.reserved_nanousd)

    @property
    def cost_usd(self) -> Decimal | None:
        return None if self.cost_nanousd is None else money.to_usd(self.cost_nanousd)

    @property
    def saved_usd(self) -> Decimal:
        return money.to_usd(self.saved_nanousd)

    @property
    def downgraded(self) -> bool:
        """Whether the ladder put a cheaper model in the place of the one asked for."""
        return self.model != self.requested_model
