"""Balances: what each scope has spent and holds in each calendar day and month."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from hashlib import blake2b
from typing import TYPE_CHECKING, ClassVar, cast

from django.db import models
from django.db.models import Q
from django.utils.translation import gettext_lazy as _

from ai_budget import money

if TYPE_CHECKING:
    _CharField = models.CharField[str, str]
else:
    _CharField = models.CharField


class WindowKeyField(_CharField):
    """The primary key of a balance, made of what it is for.

    A key that can be told beforehand spares the ledger a look-up, and sorts: rows are locked
    in its order.
    """

    empty_strings_allowed = False

    def get_pk_value_on_save(self, instance: models.Model) -> str:
        window = cast(SpendWindow, instance)
        return SpendWindow.key_for(window.scope, window.period, window.first_day)


class SpendWindow(models.Model):
    """One balance: a cache of the call log, and the only place where refusals are counted."""

    class Period(models.TextChoices):
        DAY = "day", _("Day")
        MONTH = "month", _("Month")

    key = WindowKeyField(max_length=32, primary_key=True, editable=False)
    scope = models.CharField(_("scope"), max_length=200)
    period = models.CharField(_("period"), max_length=5, choices=Period)
    first_day = models.DateField(_("first day"))
    spent_nanousd = models.BigIntegerField(_("spent"), default=0)
    held_nanousd = models.BigIntegerField(_("held"), default=0)
    calls = models.BigIntegerField(_("calls"), default=0)
    refused = models.BigIntegerField(_("refused"), default=0)

    class Meta:
        verbose_name = _("spend window")
        verbose_name_plural = _("spend windows")
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=Q(
                    spent_nanousd__gte=0, held_nanousd__gte=0, calls__gte=0, refused__gte=0
                ),
                name="ai_budget_window_not_negative",
            ),
        ]
        indexes: ClassVar = [
            models.Index(fields=["period", "first_day"], name="ai_budget_window_day"),
        ]

    def __str__(self) -> str:
        return f"{self.scope} {self.period} {self.first_day}"

    @staticmethod
    def key_for(scope: str, period: str, first_day: date) -> str:
        """Return the primary key of a balance: a digest, so that no collation merges two."""
        name = f"{scope}|{period}|{first_day.isoformat()}"
        return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    @property
    def spent_usd(self) -> Decimal:
        return money.to_usd(self.spent_nanousd)

    @property
    def held_usd(self) -> Decimal:
        return money.to_usd(self.held_nanousd)


class RateBucket(models.Model):
    """How much of a limit per minute, or of another short span, is used.

    It is kept by a digest of whom it is for, so that no address of a visitor is stored. A row
    that is missing is a bucket that is full.
    """

    key = models.CharField(max_length=32, primary_key=True, editable=False)
    used = models.BigIntegerField(
        _("used"), default=0, help_text=_("Requests or tokens, times the bucket's milliseconds.")
    )
    at_ms = models.BigIntegerField(
        _("at"), default=0, help_text=_("When that was so: milliseconds since 1970, in UTC.")
    )

    class Meta:
        verbose_name = _("rate bucket")
        verbose_name_plural = _("rate buckets")
        indexes: ClassVar = [models.Index(fields=["at_ms"], name="ai_budget_bucket_time")]

    def __str__(self) -> str:
        return self.key

    @staticmethod
    def key_for(scope: str, measure: str, seconds: int) -> str:
        """Return the primary key of a bucket."""
        name = f"{scope}|{measure}|{seconds}"  # a view may count by whatever it was sent
        return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
