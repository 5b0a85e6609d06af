"""Budgets with what is spent of them, and quotas of users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.views.main import ChangeList
from django.contrib.auth import get_user_model
from django.db import transaction
from django.db.models import Exists, Field, ForeignKey, OuterRef, QuerySet
from django.forms import ModelChoiceField
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from django.utils.http import urlencode
from django.utils.safestring import SafeString
from django.utils.text import capfirst
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from ai_budget import money, periods
from ai_budget.admin.amounts import EMPTY, UsdInput, bar, price
from ai_budget.admin.history import ValuesInHistory, change
from ai_budget.admin.user_spend import may_see_spend, user_url
from ai_budget.models import (
    CallLog,
    DayTotal,
    DowngradeRung,
    FeatureBudget,
    LimitOverride,
    UserQuota,
)
from ai_budget.models.fields import UsdField
from ai_budget.review.balances import BudgetUse, balances_today_and_month
from ai_budget.review.caching import WORTH_CACHING_PERCENT, caching_of
from ai_budget.service import forget_answers
from ai_budget.values import SITE

if TYPE_CHECKING:
    _RungInline = admin.TabularInline[DowngradeRung, FeatureBudget]
    _OverrideInline = admin.TabularInline[LimitOverride, FeatureBudget]
else:
    _RungInline = _OverrideInline = admin.TabularInline

_LEVERS = ("cache_scope", "cache_ttl", "cache_counts", "cache_version", "prompt_cache", "routing")
_FOUND = ("found_in_cache",)
_CACHING_DAYS = 30
_USE = "use_shown_in_admin"
_USD_INPUTS: Mapping[type[Field[Any, Any]], Mapping[str, Any]] = {UsdField: {"widget": UsdInput}}


class DowngradeRungInline(_RungInline):
    model = DowngradeRung
    extra = 0


class LimitOverrideInline(_OverrideInline):
    model = LimitOverride
    extra = 0
    fields = ("period", "amount_usd", "until", "reason", "created_by", "created_at")
    readonly_fields = ("created_by", "created_at")
    formfield_overrides = _USD_INPUTS

    def get_queryset(self, request: HttpRequest) -> QuerySet[LimitOverride]:
        return super().get_queryset(request).select_related("created_by")


class BudgetChangeList(ChangeList):
    """Reads the balances of all budgets on the page at once."""

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        budgets = list(self.result_list)
        uses = balances_today_and_month(budgets)
        for budget in budgets:
            setattr(budget, _USE, uses[budget.name])
        self.result_list: Any = budgets


@admin.register(FeatureBudget)
class FeatureBudgetAdmin(ValuesInHistory):
    """What may be spent, beside what is; every change of it is kept in the history."""

    actions = ("pause", "resume", "forget")
    formfield_overrides = _USD_INPUTS
    inlines = (DowngradeRungInline, LimitOverrideInline)
    list_display = ("name", "parent", "enabled", "enforce", "today", "this_month", "calls_link")
    list_filter = ("enabled", "enforce")
    list_select_related = ("parent",)
    search_fields = ("name", "owner_email")
    show_facets = admin.ShowFacets.NEVER

    class Media:
        css = {"all": ("ai_budget/admin.css",)}

    # Pages

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return BudgetChangeList

    def get_list_display(self, request: HttpRequest) -> tuple[Any, ...]:
        columns = tuple(super().get_list_display(request))
        if self._may_see_calls(request):
            return columns
        return tuple(column for column in columns if column != "calls_link")

    def get_fieldsets(self, request: HttpRequest, obj: FeatureBudget | None = None) -> Any:
        basics = ("name", "parent", "enabled", "enforce", "owner_email")
        limits = (
            "daily_limit_usd",
            "monthly_limit_usd",
            "requests_per_minute",
            "tokens_per_minute",
            "monthly_plan_usd",
            "plan_share",
        )
        spend = [] if obj is None else [(_("Spend"), {"fields": ("today", "this_month")})]
        # No call is made for the whole site itself; but all its answers can be forgotten.
        levers = ("cache_version",) if obj is not None and obj.is_site else _LEVERS
        return [
            (None, {"fields": basics}),
            *spend,
            (_("Limits"), {"fields": limits}),
            (_("Model"), {"fields": ("model", "max_tokens", "allow_unbounded")}),
            (_("Savings"), {"fields": [*levers, *(() if obj is None else _FOUND)]}),
        ]

    def get_readonly_fields(
        self, request: HttpRequest, obj: FeatureBudget | None = None
    ) -> tuple[str, ...]:
        # Balances and calls are kept under the name.
        figures = ("today", "this_month", *_FOUND)
        return figures if obj is None else ("name", *figures)

    def formfield_for_foreignkey(
        self, db_field: ForeignKey[Any, Any], request: HttpRequest, **kwargs: Any
    ) -> ModelChoiceField[Any] | None:
        if db_field.name == "parent":
            kwargs["queryset"] = FeatureBudget.objects.filter(parent=None).exclude(name=SITE)
        return super().formfield_for_foreignkey(db_field, request, **kwargs)

    def save_formset(self, request: HttpRequest, form: Any, formset: Any, change: bool) -> None:
        if formset.model is LimitOverride:
            for override in (inline.instance for inline in formset.extra_forms):
                override.created_by = request.user
        super().save_formset(request, form, formset, change)

    def get_deleted_objects(
        self, objs: Sequence[FeatureBudget] | QuerySet[FeatureBudget], request: HttpRequest
    ) -> Any:
        """Refuse to delete features that have calls, without reading their calls.

        Django would collect every call only to say that each protects its feature.
        """
        called = (
            FeatureBudget.objects.filter(pk__in=[budget.pk for budget in objs])
            .filter(
                Exists(CallLog.objects.filter(feature=OuterRef("name")))
                # Of calls that were purged there are sums alone.
                | Exists(DayTotal.objects.filter(feature=OuterRef("name")))
            )
            .values_list("name", flat=True)
        )
        protected = [
            _("The calls of %(feature)s. What was spent stays on record; pause it instead.")
            % {"feature": name}
            for name in called
        ]
        if protected:
            return [], {}, set(), protected
        return super().get_deleted_objects(objs, request)

    # Columns

    @admin.display(description=gettext_lazy("today"))
    def today(self, budget: FeatureBudget) -> SafeString:
        return bar(_use(budget).today)

    @admin.display(description=gettext_lazy("this month"))
    def this_month(self, budget: FeatureBudget) -> SafeString:
        return bar(_use(budget).month)

    @admin.display(description=gettext_lazy("found in the cache"))
    def found_in_cache(self, budget: FeatureBudget) -> str:
        since = periods.now() - timedelta(days=_CACHING_DAYS)
        caching = caching_of(budget.name, since=since)
        if not caching.looked_up:
            return _("Nothing was looked for in the last %(days)s days.") % {"days": _CACHING_DAYS}
        numbers = _(
            "%(found)s of %(calls)s calls in %(days)s days (%(rate)s %%), %(saved)s saved"
        ) % {
            "found": f"{caching.cached:,}",
            "calls": f"{caching.looked_up:,}",
            "days": _CACHING_DAYS,
            "rate": caching.hit_rate,
            "saved": money.format_usd(caching.saved_nanousd),
        }
        if not caching.is_worthless:
            return numbers
        advice = _("Not worth caching: fewer than %(percent)s %% are found.")
        return f"{numbers}. {advice % {'percent': WORTH_CACHING_PERCENT}}"

    @admin.display(description=gettext_lazy("calls"))
    def calls_link(self, budget: FeatureBudget) -> SafeString:
        url = reverse("admin:ai_budget_calllog_changelist", current_app=self.admin_site.name)
        query = "" if budget.is_site else "?" + urlencode({"feature": budget.name})
        return format_html('<a href="{}{}">{}</a>', url, query, _("Calls"))

    def _may_see_calls(self, request: HttpRequest) -> bool:
        if not self.admin_site.is_registered(CallLog):
            return False
        return self.admin_site.get_model_admin(CallLog).has_view_permission(request)

    # Actions

    @admin.action(permissions=["change"], description=gettext_lazy("Pause selected features"))
    def pause(self, request: HttpRequest, budgets: QuerySet[FeatureBudget]) -> None:
        changed = self._enable(request, budgets, enabled=False)
        text = ngettext("%(count)s feature paused.", "%(count)s features paused.", changed)
        self.message_user(request, text % {"count": changed}, messages.SUCCESS)

    @admin.action(permissions=["change"], description=gettext_lazy("Resume selected features"))
    def resume(self, request: HttpRequest, budgets: QuerySet[FeatureBudget]) -> None:
        changed = self._enable(request, budgets, enabled=True)
        text = ngettext("%(count)s feature resumed.", "%(count)s features resumed.", changed)
        self.message_user(request, text % {"count": changed}, messages.SUCCESS)

    @admin.action(
        permissions=["change"],
        description=gettext_lazy("Forget cached answers of selected features"),
    )
    def forget(self, request: HttpRequest, budgets: QuerySet[FeatureBudget]) -> None:
        label = capfirst(str(FeatureBudget._meta.get_field("cache_version").verbose_name))
        forgotten = 0
        for budget in budgets:
            if not self.has_change_permission(request, budget):
                continue
            forget_answers(budget.name)
            before = budget.cache_version
            budget.refresh_from_db(fields=["cache_version"])
            fields = [change(label, before, budget.cache_version)]
            self.log_change(request, budget, [{"changed": {"fields": fields}}])
            forgotten += 1
        text = ngettext(
            "The cached answers of %(count)s feature are forgotten.",
            "The cached answers of %(count)s features are forgotten.",
            forgotten,
        )
        self.message_user(request, text % {"count": forgotten}, messages.SUCCESS)

    def _enable(
        self, request: HttpRequest, budgets: QuerySet[FeatureBudget], *, enabled: bool
    ) -> int:
        """Switch those that are not so yet, each with its own entry in the history."""
        label = capfirst(str(FeatureBudget._meta.get_field("enabled").verbose_name))
        changed = 0
        with transaction.atomic(using=budgets.db):
            for budget in budgets.exclude(enabled=enabled):
                if not self.has_change_permission(request, budget):
                    continue
                budget.enabled = enabled
                budget.save(update_fields=["enabled"])
                fields = [change(label, not enabled, enabled)]
                self.log_change(request, budget, [{"changed": {"fields": fields}}])
                changed += 1
        return changed


@admin.register(UserQuota)
class UserQuotaAdmin(ValuesInHistory):
    """What users may use. A second quota for the same is an error of the form."""

    fields = (
        "user",
        "group",
        "priority",
        "feature",
        "unlimited",
        "daily_calls",
        "daily_limit_usd",
        "monthly_limit_usd",
        "requests_per_minute",
        "tokens_per_minute",
    )
    formfield_overrides = _USD_INPUTS
    list_display = (
        "whom",
        "feature",
        "unlimited",
        "calls_a_day",
        "daily_limit",
        "monthly_limit",
        "spend_link",
    )
    list_filter = ("feature",)
    list_select_related = ("user", "group", "feature")
    # A raw key works with every user model; autocomplete needs one that is in the admin.
    raw_id_fields = ("user",)
    show_facets = admin.ShowFacets.NEVER

    def get_search_fields(self, request: HttpRequest) -> tuple[str, ...]:
        return (f"user__{get_user_model().USERNAME_FIELD}", "feature__name")

    def get_list_display(self, request: HttpRequest) -> tuple[Any, ...]:
        columns = tuple(super().get_list_display(request))
        if may_see_spend(request, self.admin_site):
            return columns
        return tuple(column for column in columns if column != "spend_link")

    @admin.display(description=gettext_lazy("whom"), ordering="key")
    def whom(self, quota: UserQuota) -> str:
        return str(quota.user or quota.group or _("everyone"))

    @admin.display(description=gettext_lazy("calls a day"), ordering="daily_calls")
    def calls_a_day(self, quota: UserQuota) -> str:
        return EMPTY if quota.daily_calls is None else str(quota.daily_calls)

    @admin.display(description=gettext_lazy("daily limit"), ordering="daily_limit_usd")
    def daily_limit(self, quota: UserQuota) -> str:
        return price(quota.daily_limit_usd)

    @admin.display(description=gettext_lazy("monthly limit"), ordering="monthly_limit_usd")
    def monthly_limit(self, quota: UserQuota) -> str:
        return price(quota.monthly_limit_usd)

    @admin.display(description=gettext_lazy("spend"), empty_value="")
    def spend_link(self, quota: UserQuota) -> SafeString | None:
        if quota.user_id is None:
            return None
        return format_html(
            '<a href="{}">{}</a>', user_url(self.admin_site, quota.user_id), _("Spend")
        )


def _use(budget: FeatureBudget) -> BudgetUse:
    """Return what the page has read for this budget, or read it for this one alone."""
    use: BudgetUse | None = getattr(budget, _USE, None)
    return balances_today_and_month([budget])[budget.name] if use is None else use
