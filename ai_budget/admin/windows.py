"""Balances of each scope, to look at."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from ai_budget import money, periods
from ai_budget.admin.amounts import exact_usd
from ai_budget.admin.filters import PeriodFilter
from ai_budget.admin.large_tables import JournalAdmin
from ai_budget.conf import conf
from ai_budget.models import SpendWindow

_WINDOWS_FOUND = 400


@admin.register(SpendWindow)
class SpendWindowAdmin(JournalAdmin):
    """What was spent, held, called and refused, the newest windows first."""

    fields = ("scope", "period", "first_day", "exact_spent", "exact_held", "calls", "refused")
    list_display = ("scope", "first_day", "spent", "held", "calls", "refused")
    list_filter = (PeriodFilter,)
    ordering = ("-first_day", "scope")
    readonly_fields = ("exact_spent", "exact_held")
    search_fields = ("scope",)
    search_help_text = _("A scope in full, such as feature:chat or user:42: its last 400 windows.")

    class Media:
        css = {"all": ("ai_budget/admin.css",)}

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Find the windows of one scope by their keys: no index begins with the scope."""
        scope = search_term.strip()
        if not scope:
            return queryset, False
        day = periods.day(periods.now(), conf.TIME_ZONE).first_day
        month = day.replace(day=1)
        keys = []
        for _number in range(_WINDOWS_FOUND):
            keys.append(SpendWindow.key_for(scope, SpendWindow.Period.DAY, day))
            keys.append(SpendWindow.key_for(scope, SpendWindow.Period.MONTH, month))
            day, month = day - timedelta(days=1), periods.previous_month(month)
        return queryset.filter(pk__in=keys), False

    @admin.display(description=_("spent"))
    def spent(self, window: SpendWindow) -> str:
        return money.format_usd(window.spent_nanousd, decimals=6)

    @admin.display(description=_("held"))
    def held(self, window: SpendWindow) -> str:
        return money.format_usd(window.held_nanousd, decimals=6)

    @admin.display(description=_("spent"))
    def exact_spent(self, window: SpendWindow) -> str:
        return exact_usd(window.spent_nanousd)

    @admin.display(description=_("held"))
    def exact_held(self, window: SpendWindow) -> str:
        return exact_usd(window.held_nanousd)
