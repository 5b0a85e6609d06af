"""Filters of calls and batches whose choices come from small tables, never from the calls."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from django.contrib import admin
from django.contrib.admin.views.main import SEARCH_VAR, ChangeList
from django.db.models import Q, QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.models import (
    Batch,
    BatchItem,
    CallLog,
    DowngradeRung,
    FeatureBudget,
    ModelRate,
    SpendWindow,
)
from ai_budget.values import SITE

BATCH = "batch"
"""The parameter that names the batch whose calls or items are shown."""


class _DefaultedFilter(admin.SimpleListFilter):
    """A filter that always filters: its first choice is what a bare address shows."""

    def chosen(self) -> str:
        """Return the choice in force, the first where the address names none that exists."""
        keys = [str(key) for key, _title in self.lookup_choices]
        value = self.value()
        return value if value in keys else keys[0]

    def choices(self, changelist: ChangeList) -> Iterator[Any]:
        name = self.parameter_name or ""
        for index, (key, title) in enumerate(self.lookup_choices):
            yield {
                "selected": self.chosen() == str(key),
                "query_string": changelist.get_query_string({name: key if index else None}),
                "display": title,
            }


class ReservedFilter(_DefaultedFilter):
    """The last seven days unless asked otherwise, so that a page reads recent rows alone."""

    title = _("time")
    parameter_name = "reserved"
    column = "reserved_at"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [
            ("week", _("Last 7 days")),
            ("today", _("Today")),
            ("month", _("This month")),
            ("last_month", _("Last month")),
            ("all", _("Any time")),
        ]

    def chosen(self) -> str:
        # Who looks for one request by its id, or for one batch, means it wherever it is.
        one = self.request.GET.get(SEARCH_VAR) or self.request.GET.get(BATCH)
        if self.value() is None and one:
            return "all"
        return super().chosen()

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        since, until = self._range()
        if since is not None:
            queryset = queryset.filter(**{f"{self.column}__gte": since})
        if until is not None:
            queryset = queryset.filter(**{f"{self.column}__lt": until})
        return queryset

    def _range(self) -> tuple[datetime | None, datetime | None]:
        now, zone = periods.now(), conf.TIME_ZONE
        month = periods.month(now, zone)
        match self.chosen():
            case "today":
                return periods.day(now, zone).start, None
            case "month":
                return month.start, None
            case "last_month":
                return periods.month(month.start - timedelta(days=1), zone).start, month.start
            case "all":
                return None, None
            case _:
                return now - timedelta(days=7), None


class CreatedFilter(ReservedFilter):
    """Batches of any time unless asked otherwise: there are few, and one may take days."""

    parameter_name = "created"
    column = "created_at"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        *ranges, any_time = super().lookups(request, model_admin)
        return [any_time, *ranges]


class FeatureFilter(admin.SimpleListFilter):
    """Features and categories, from their budgets; a category shows what its features did."""

    title = _("feature")
    parameter_name = "feature"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        budgets = FeatureBudget.objects.exclude(name=SITE)
        self._parents = dict(budgets.values_list("name", "parent__name"))
        return [(name, name) for name in sorted(self._parents)]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any] | None:
        value = self.value()
        if value is None:
            return None
        members = [name for name, parent in self._parents.items() if parent == value]
        return queryset.filter(feature__in=[value, *members])


class ModelFilter(admin.SimpleListFilter):
    """Models that budgets, ladders, rates and settings name."""

    title = _("model")
    parameter_name = "model"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        budgets, rungs, rates = (
            table.objects.order_by().values_list("model")
            for table in (FeatureBudget, DowngradeRung, ModelRate)
        )
        named = budgets.union(rungs, rates).order_by("model")
        models = {model for (model,) in named} | {conf.DEFAULT_MODEL, *conf.TIERS}
        return [(model, model) for model in sorted(models) if model]

    def queryset(
        self, request: HttpRequest, queryset: QuerySet[CallLog]
    ) -> QuerySet[CallLog] | None:
        value = self.value()
        return None if value is None else queryset.filter(model=value)


class _BatchFilter(admin.SimpleListFilter):
    """One batch, named in the address: links lead here, and it can be taken off again."""

    title = _("batch")
    parameter_name = BATCH

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        value = self.value()
        return [] if value is None else [(value, f"#{value}")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any] | None:
        value = self.value()
        if value is None:
            return None
        batch = Batch.objects.filter(pk=value).first() if value.isdecimal() else None
        return queryset.none() if batch is None else self.of_batch(queryset, batch)

    def of_batch(self, queryset: QuerySet[Any], batch: Batch) -> QuerySet[Any]:
        raise NotImplementedError


class BatchItemsFilter(_BatchFilter):
    """The items of one batch."""

    def of_batch(self, queryset: QuerySet[BatchItem], batch: Batch) -> QuerySet[BatchItem]:
        return queryset.filter(batch=batch)


class BatchCallsFilter(_BatchFilter):
    """The calls of a batch's items, and the one that holds what is open of it.

    All of them were reserved at the same moment: so few of all calls are looked at.
    """

    def of_batch(self, queryset: QuerySet[CallLog], batch: Batch) -> QuerySet[CallLog]:
        if batch.reserved_at is None:
            return queryset.none()
        of_items = BatchItem.objects.filter(batch=batch).order_by().values("call_id")
        return queryset.filter(
            Q(call_id=batch.call_id) | Q(call_id__in=of_items),
            reserved_at=batch.reserved_at,
        )


class PeriodFilter(_DefaultedFilter):
    """Days unless months are asked for: the index of balances begins with the period."""

    title = _("period")
    parameter_name = "period"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [(choice.value, choice.label) for choice in SpendWindow.Period]

    def queryset(
        self, request: HttpRequest, queryset: QuerySet[SpendWindow]
    ) -> QuerySet[SpendWindow]:
        return queryset.filter(period=self.chosen())
