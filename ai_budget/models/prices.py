"""Prices that a team sets itself: negotiated rates, new models, other regions."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import F, Q
from django.utils.translation import gettext_lazy as _

from ai_budget.models.fields import UsdField


class ModelRate(models.Model):
    """Dollars per million tokens of one model from a date on, instead of the price library's.

    An empty price is inherited from the library's rate for the model, where it has one.
    """

    class Speed(models.TextChoices):
        STANDARD = "standard", _("Standard")
        FAST = "fast", _("Fast")

    provider = models.CharField(
        _("provider"),
        max_length=32,
        default="anthropic",
        help_text=_("anthropic, bedrock, vertex or foundry."),
    )
    region = models.CharField(
        _("region"), max_length=32, blank=True, help_text=_("Empty: every region.")
    )
    model = models.CharField(_("model"), max_length=128)
    speed = models.CharField(_("speed"), max_length=8, choices=Speed, default=Speed.STANDARD)
    prompt_tokens_above = models.PositiveIntegerField(
        _("for prompts above (tokens)"),
        default=0,
        help_text=_("The long-context tier: these prices are for the whole of such requests."),
    )
    valid_from = models.DateTimeField(_("valid from"))
    valid_until = models.DateTimeField(_("valid until"), null=True, blank=True)
    input_usd = UsdField(_("input ($/M)"), null=True, blank=True)
    output_usd = UsdField(_("output ($/M)"), null=True, blank=True)
    cache_write_5m_usd = UsdField(_("5m cache write ($/M)"), null=True, blank=True)
    cache_write_1h_usd = UsdField(_("1h cache write ($/M)"), null=True, blank=True)
    cache_read_usd = UsdField(_("cache read ($/M)"), null=True, blank=True)
    web_search_usd = UsdField(_("web searches ($/1,000)"), null=True, blank=True)
    note = models.CharField(_("note"), max_length=200, blank=True)

    class Meta:
        verbose_name = _("model rate")
        verbose_name_plural = _("model rates")
        ordering = ["provider", "model", "region", "-valid_from"]
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=[
                    "provider",
                    "region",
                    "model",
                    "speed",
                    "prompt_tokens_above",
                    "valid_from",
                ],
                name="ai_budget_rate_once_a_date",
            ),
            models.CheckConstraint(
                condition=Q(valid_until__isnull=True) | Q(valid_until__gt=F("valid_from")),
                name="ai_budget_rate_ends_after_start",
            ),
            *(
                models.CheckConstraint(
                    condition=Q(**{f"{name}__gte": 0}) | Q(**{f"{name}__isnull": True}),
                    name=f"ai_budget_rate_{name}_ok",
                )
                for name in (
                    "input_usd",
                    "output_usd",
                    "cache_write_5m_usd",
                    "cache_write_1h_usd",
                    "cache_read_usd",
                    "web_search_usd",
                )
            ),
        ]

    def __str__(self) -> str:
        return f"{self.provider} {self.model} from {self.valid_from:%Y-%m-%d}"
