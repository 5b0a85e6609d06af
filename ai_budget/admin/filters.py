"""Filters of calls whose choices come from small tables, never from the calls themselves."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from django.contrib import admin
from django.contrib.admin.views.main import SEARCH_VAR, ChangeList
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.models import CallLog, DowngradeRung, FeatureBudget, ModelRate, SpendWindow
from ai_budget.values import SITE


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

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [
            ("week", _("Last 7 days")),
            ("today", _("Today")),
            ("month", _("This month")),
            ("last_month", _("Last month")),
            ("all", _("Any time")),
        ]

    def chosen(self) -> str:
        # Who looks for one request by its id means it wherever it is.
        if self.value() is None and self.request.GET.get(SEARCH_VAR):
            return "all"
        return super().chosen()

    def queryset(self, request: HttpRequest, queryset: QuerySet[CallLog]) -> QuerySet[CallLog]:
        since, until = self._range()
        if since is not None:
            queryset = queryset.filter(reserved_at__gte=since)
        if until is not None:
            queryset = queryset.filter(reserved_at__lt=until)
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


class FeatureFilter(admin.SimpleListFilter):
    """Features and categories, from their budgets; a category shows its features' calls."""

    title = _("feature")
    parameter_name = "feature"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        budgets = FeatureBudget.objects.exclude(name=SITE)
        self._parents = dict(budgets.values_list("name", "parent__name"))
        return [(name, name) for name in sorted(self._parents)]

    def queryset(
        self, request: HttpRequest, queryset: QuerySet[CallLog]
    ) -> QuerySet[CallLog] | None:
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
