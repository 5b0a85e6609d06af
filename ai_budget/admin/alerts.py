"""Alerts: what came to pass, whom it was told to, and who has taken note of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from ai_budget import periods
from ai_budget.admin.amounts import EMPTY, count, exact_usd
from ai_budget.admin.batch_decisions import moment
from ai_budget.admin.filters import ReservedFilter
from ai_budget.admin.large_tables import JournalAdmin
from ai_budget.models import Alert, AlertDelivery, Batch, FeatureBudget
from ai_budget.review.alerts import acknowledge

if TYPE_CHECKING:
    _DeliveryInline = admin.TabularInline[AlertDelivery, Alert]
else:
    _DeliveryInline = admin.TabularInline


class RaisedFilter(ReservedFilter):
    """The month unless asked otherwise: most alerts are about one."""

    parameter_name = "raised"
    column = "raised_at"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        week, today, month, last_month, any_time = super().lookups(request, model_admin)
        return [month, today, week, last_month, any_time]


class StateFilter(admin.SimpleListFilter):
    """Those that were told; what a higher threshold covers only where it is asked for."""

    title = gettext_lazy("state")
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [
            ("open", gettext_lazy("Not acknowledged")),
            ("acknowledged", gettext_lazy("Acknowledged")),
            ("covered", gettext_lazy("Covered by a higher threshold")),
        ]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        match self.value():
            case "open":
                return queryset.filter(covered=False, acknowledged_at__isnull=True)
            case "acknowledged":
                return queryset.filter(acknowledged_at__isnull=False)
            case "covered":
                return queryset.filter(covered=True)
            case _:
                return queryset.filter(covered=False)


class BudgetFilter(admin.SimpleListFilter):
    """Budgets by name, the site's too; a category shows its features' alerts as well."""

    title = gettext_lazy("budget")
    parameter_name = "budget"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        self._parents = dict(FeatureBudget.objects.values_list("name", "parent__name"))
        names = sorted({"*", *self._parents})
        return [(name, name) for name in names]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any] | None:
        value = self.value()
        if value is None:
            return None
        members = [name for name, parent in self._parents.items() if parent == value]
        return queryset.filter(budget__in=[value, *members])


class AlertDeliveryInline(_DeliveryInline):
    """Whom it was told to, to look at. Addresses are in the settings alone."""

    model = AlertDelivery
    extra = 0
    max_num = 0
    can_delete = False
    fields = ("notifier", "tries", "delivered", "due", "error")
    readonly_fields = fields
    show_change_link = False

    def has_view_permission(self, request: HttpRequest, obj: Alert | None = None) -> bool:
        return True  # whoever sees the alert

    def has_add_permission(self, request: HttpRequest, obj: Alert | None = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Alert | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Alert | None = None) -> bool:
        return False

    @admin.display(description=gettext_lazy("delivered"))
    def delivered(self, delivery: AlertDelivery) -> str:
        return moment(delivery.delivered_at)

    @admin.display(description=gettext_lazy("due"))
    def due(self, delivery: AlertDelivery) -> str:
        return moment(delivery.due_at)


@admin.register(Alert)
class AlertAdmin(JournalAdmin):
    """Every alert, the newest first. Who may acknowledges them; nobody changes one."""

    actions: Any = ("acknowledge",)
    inlines = (AlertDeliveryInline,)
    list_display = ("raised", "headline", "details", "effect", "state")
    list_display_links = ("headline",)
    list_filter = (RaisedFilter, StateFilter, "kind", BudgetFilter)
    ordering = ("-id",)
    fieldsets = (
        (None, {"fields": ("text", "kind", "effect", "budget_link", "batch_link")}),
        (
            gettext_lazy("Figures"),
            {
                "fields": (
                    ("exact_spent", "exact_of", "exact_forecast"),
                    ("percent", "threshold", "number"),
                    ("model", "rung", "about"),
                )
            },
        ),
        (
            gettext_lazy("Time"),
            {"fields": (("period", "first_day"), ("since", "until"), ("raised_at", "covered"))},
        ),
        (gettext_lazy("Acknowledged"), {"fields": (("acknowledged_at", "acknowledged_by"),)}),
    )
    readonly_fields = (
        "batch_link",
        "budget_link",
        "exact_forecast",
        "exact_of",
        "exact_spent",
        "number",
        "text",
    )

    class Media:
        css = {"all": ("ai_budget/admin.css",)}

    def get_queryset(self, request: HttpRequest) -> QuerySet[Alert]:
        found: QuerySet[Alert] = super().get_queryset(request)
        return found.select_related("acknowledged_by")

    def has_acknowledge_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("ai_budget.acknowledge_alert"))

    @admin.action(
        permissions=["acknowledge"], description=gettext_lazy("Acknowledge selected alerts")
    )
    def acknowledge(self, request: HttpRequest, alerts: QuerySet[Alert]) -> None:
        acknowledged = acknowledge(alerts, by=request.user, at=periods.now())
        for alert in acknowledged:
            self.log_change(request, alert, _("Acknowledged."))
        text = ngettext(
            "%(count)s alert is acknowledged.",
            "%(count)s alerts are acknowledged.",
            len(acknowledged),
        )
        self.message_user(request, text % {"count": count(len(acknowledged))}, messages.SUCCESS)

    # Columns

    @admin.display(description=gettext_lazy("raised"))
    def raised(self, alert: Alert) -> str:
        return moment(alert.raised_at)

    @admin.display(description=gettext_lazy("alert"))
    def headline(self, alert: Alert) -> str:
        return alert.title

    @admin.display(description=gettext_lazy("figures"))
    def details(self, alert: Alert) -> SafeString:
        return format_html('<span class="ai-budget-quiet">{}</span>', alert.text)

    @admin.display(description=gettext_lazy("acknowledged"))
    def state(self, alert: Alert) -> str:
        if alert.acknowledged_at is None:
            return _("covered") if alert.covered else EMPTY
        by = "" if alert.acknowledged_by is None else alert.acknowledged_by.get_username()
        return f"{moment(alert.acknowledged_at)} {by}".strip()

    # Fields

    @admin.display(description=gettext_lazy("alert"))
    def text(self, alert: Alert) -> SafeString:
        return format_html("{}<br>{}", alert.title, alert.text)

    @admin.display(description=gettext_lazy("budget"))
    def budget_link(self, alert: Alert) -> str | SafeString:
        row = FeatureBudget.objects.filter(name=alert.budget).values_list("pk", flat=True).first()
        return self._link(alert.budget, "featurebudget", row)

    @admin.display(description=gettext_lazy("batch"))
    def batch_link(self, alert: Alert) -> str | SafeString:
        if alert.kind not in (Alert.Kind.BATCH, Alert.Kind.UNCERTAIN, Alert.Kind.STUCK):
            return EMPTY
        number = alert.about.strip("#").partition("/")[0]
        row = Batch.objects.filter(pk=number).values_list("pk", flat=True).first()
        return self._link(alert.about, "batch", row)

    @admin.display(description=gettext_lazy("spent"))
    def exact_spent(self, alert: Alert) -> str:
        return exact_usd(alert.spent_nanousd)

    @admin.display(description=gettext_lazy("compared with"))
    def exact_of(self, alert: Alert) -> str:
        return EMPTY if alert.of_nanousd is None else exact_usd(alert.of_nanousd)

    @admin.display(description=gettext_lazy("forecast"))
    def exact_forecast(self, alert: Alert) -> str:
        return EMPTY if alert.forecast_nanousd is None else exact_usd(alert.forecast_nanousd)

    @admin.display(description=gettext_lazy("count"))
    def number(self, alert: Alert) -> str:
        return count(alert.count)

    def _link(self, text: str, model: str, row: Any) -> str | SafeString:
        """Return a link to a row's page; the page asks for its own permission."""
        if row is None:
            return text
        name = f"admin:ai_budget_{model}_change"
        url = reverse(name, args=[row], current_app=self.admin_site.name)
        return format_html('<a href="{}">{}</a>', url, text)
