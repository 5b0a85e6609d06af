"""The log of calls, to look at."""

from __future__ import annotations

import uuid
from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.timezone import get_current_timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from ai_budget import money
from ai_budget.admin.amounts import EMPTY, count, exact_usd, milliseconds
from ai_budget.admin.filters import (
    BatchCallsFilter,
    DowngradeFilter,
    FeatureFilter,
    ModelFilter,
    ReservedFilter,
    SavingFilter,
    SubjectFilter,
    TagFilter,
    UserFilter,
)
from ai_budget.admin.large_tables import JournalAdmin
from ai_budget.models import Batch, CallLog
from ai_budget.review.names import deleted_user

_MOST_ATTEMPTS_SHOWN = 20


@admin.register(CallLog)
class CallLogAdmin(JournalAdmin):
    """Every attempt and cached answer. The same few queries however many rows there are."""

    list_display = (
        "time",
        "feature_name",
        "caller",
        "kind",
        "status",
        "models",
        "tokens",
        "cost",
        "latency",
    )
    list_filter = (
        ReservedFilter,
        BatchCallsFilter,
        UserFilter,
        SubjectFilter,
        TagFilter,
        DowngradeFilter,
        SavingFilter,
        FeatureFilter,
        "status",
        "kind",
        ModelFilter,
    )
    ordering = ("-id",)
    search_fields = ("request_id",)
    search_help_text = gettext_lazy("A request id or a call id, in full.")
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("feature", "category"),
                    ("caller_with_calls", "subject"),
                    ("kind", "status", "error"),
                    "tags",
                )
            },
        ),
        (
            gettext_lazy("Money"),
            {
                "fields": (
                    ("exact_cost", "exact_reserved"),
                    ("exact_saved", "saved_reason", "cache_checked"),
                    "rates",
                )
            },
        ),
        (
            gettext_lazy("Model"),
            {
                "fields": (
                    ("model", "requested_model"),
                    "decision",
                    ("provider", "service_tier", "speed", "inference_geo"),
                )
            },
        ),
        (
            gettext_lazy("Tokens"),
            {
                "fields": (
                    ("input_tokens", "output_tokens", "thinking_tokens"),
                    ("cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens"),
                    ("max_tokens", "stop_reason", "web_searches"),
                )
            },
        ),
        (
            gettext_lazy("Time"),
            {
                "fields": (
                    ("reserved_at", "settled_at", "deadline"),
                    "day",
                    ("latency", "first_token"),
                )
            },
        ),
        (
            gettext_lazy("Request"),
            {"fields": (("request_id", "call_id"), ("attempt", "counted"), "attempts_of_call")},
        ),
    )
    readonly_fields = (
        "attempts_of_call",
        "caller_with_calls",
        "exact_cost",
        "exact_reserved",
        "exact_saved",
        "first_token",
        "latency",
    )

    class Media:
        css = {"all": ("ai_budget/admin.css",)}

    def get_queryset(self, request: HttpRequest) -> QuerySet[CallLog]:
        # One query a page for the users. A prefetch, unlike a join, keeps calls whose user is
        # gone, and remembers that there is none.
        return super().get_queryset(request).prefetch_related("user")

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Find one request or one call by its whole id, each through its index."""
        term = search_term.strip()
        if not term:
            return queryset, False
        try:
            return queryset.filter(call_id=uuid.UUID(term)), False
        except ValueError:
            return queryset.filter(request_id=term), False

    # Columns

    @admin.display(description=gettext_lazy("time"))
    def time(self, call: CallLog) -> str:
        return f"{call.reserved_at.astimezone(get_current_timezone()):%Y-%m-%d %H:%M}"

    @admin.display(description=gettext_lazy("feature"))
    def feature_name(self, call: CallLog) -> str:
        return call.feature_id

    @admin.display(description=gettext_lazy("user"), empty_value=EMPTY)
    def caller(self, call: CallLog) -> str | None:
        return user_label(call) or call.subject or None

    @admin.display(description=gettext_lazy("model"))
    def models(self, call: CallLog) -> str | SafeString:
        if not call.downgraded:
            return call.model
        return format_html(
            '{}<div class="ai-budget-quiet">{}</div>',
            call.model,
            _("asked for %(model)s") % {"model": call.requested_model},
        )

    @admin.display(description=gettext_lazy("tokens in / out"))
    def tokens(self, call: CallLog) -> str:
        prompt = (
            call.input_tokens
            + call.cache_write_5m_tokens
            + call.cache_write_1h_tokens
            + call.cache_read_tokens
        )
        return f"{count(prompt)} / {count(call.output_tokens)}"

    @admin.display(description=gettext_lazy("cost"))
    def cost(self, call: CallLog) -> str | SafeString:
        if call.cost_nanousd is not None:
            return money.format_usd(call.cost_nanousd, decimals=6)
        held = money.format_usd(call.reserved_nanousd, decimals=6)
        return format_html(
            '<span class="ai-budget-quiet">{}</span>', _("%(amount)s held") % {"amount": held}
        )

    @admin.display(description=gettext_lazy("latency"))
    def latency(self, call: CallLog) -> str:
        return milliseconds(call.latency_ms)

    # Fields

    @admin.display(description=gettext_lazy("user"))
    def caller_with_calls(self, call: CallLog) -> str | SafeString:
        label = user_label(call)
        if label is None:
            return EMPTY
        return format_html(
            '{} (<a href="{}?user={}&amp;reserved=all">{}</a>)',
            label,
            self._url("changelist"),
            call.user_id,
            _("all calls of this user"),
        )

    @admin.display(description=gettext_lazy("cost"))
    def exact_cost(self, call: CallLog) -> str:
        return EMPTY if call.cost_nanousd is None else exact_usd(call.cost_nanousd)

    @admin.display(description=gettext_lazy("reserved"))
    def exact_reserved(self, call: CallLog) -> str:
        return exact_usd(call.reserved_nanousd)

    @admin.display(description=gettext_lazy("saved"))
    def exact_saved(self, call: CallLog) -> str:
        return exact_usd(call.saved_nanousd)

    @admin.display(description=gettext_lazy("first token"))
    def first_token(self, call: CallLog) -> str:
        return milliseconds(call.first_token_ms)

    @admin.display(description=gettext_lazy("attempts of this call"))
    def attempts_of_call(self, call: CallLog) -> SafeString:
        attempts = CallLog.objects.filter(call_id=call.call_id).order_by("attempt", "id")
        return format_html_join(
            SafeString("<br>"),
            '<a href="{}">{}</a> {} {}',
            (
                (
                    self._url("change", other.pk),
                    _("Attempt %(number)s") % {"number": other.attempt},
                    other.get_status_display(),
                    EMPTY if other.cost_nanousd is None else exact_usd(other.cost_nanousd),
                )
                for other in attempts[:_MOST_ATTEMPTS_SHOWN]
            ),
        )

    def _url(self, page: str, *args: Any) -> str:
        name = f"admin:ai_budget_calllog_{page}"
        return reverse(name, args=args, current_app=self.admin_site.name)


def user_label(row: CallLog | Batch) -> str | None:
    """Return whom a call or batch was for, whether or not the user still exists.

    No query, where users were prefetched.
    """
    if row.user_id is None:
        return None
    return deleted_user(row.user_id) if row.user is None else row.user.get_username()
