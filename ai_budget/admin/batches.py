"""Batches: how far they are, what they hold and spent, and their items.

What was asked and answered is shown nowhere: texts have no page in the admin.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.db.models import Count, Model, OuterRef, Q, QuerySet, Subquery
from django.db.models.functions import Coalesce
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html, format_html_join
from django.utils.http import urlencode
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from ai_budget import money
from ai_budget.admin.amounts import EMPTY, count, exact_usd
from ai_budget.admin.batch_decisions import BatchDecisions, moment
from ai_budget.admin.calls import user_label
from ai_budget.admin.filters import BATCH, BatchItemsFilter, CreatedFilter, FeatureFilter
from ai_budget.admin.large_tables import JournalAdmin
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallLog

if TYPE_CHECKING:
    _SubmissionInline = admin.TabularInline[BatchSubmission, Batch]
else:
    _SubmissionInline = admin.TabularInline

_STATES = {
    "open": gettext_lazy("open"),
    "succeeded": gettext_lazy("succeeded"),
    "cached": gettext_lazy("from the cache"),
    "errored": gettext_lazy("errored"),
    "canceled": gettext_lazy("canceled"),
    "expired": gettext_lazy("expired"),
    "refused": gettext_lazy("refused"),
}
"""The states of items, by the columns that count them."""
_WITH_CALL = frozenset({BatchItem.Status.SUCCEEDED, BatchItem.Status.CACHED})
"""How items end that have a row of their own in the log of calls."""


class BatchSubmissionInline(_SubmissionInline):
    """The message batches at the API, to look at."""

    model = BatchSubmission
    extra = 0
    max_num = 0
    can_delete = False
    fields = ("number", "state", "api_id", "items", "sent", "next_look", "tries", "error")
    readonly_fields = fields
    show_change_link = False

    def has_add_permission(self, request: HttpRequest, obj: Batch | None = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Batch | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Batch | None = None) -> bool:
        return False

    @admin.display(description=gettext_lazy("status"))
    def state(self, submission: BatchSubmission) -> str:
        label = submission.get_status_display()
        open_for_us = submission.status not in {
            BatchSubmission.Status.CANCELING,
            BatchSubmission.Status.DONE,
        }
        if submission.cancel_requested and open_for_us:
            return _("%(status)s (cancel requested)") % {"status": label}
        return label

    @admin.display(description=gettext_lazy("items"))
    def items(self, submission: BatchSubmission) -> str:
        return count(submission.items_count)

    @admin.display(description=gettext_lazy("sent"))
    def sent(self, submission: BatchSubmission) -> str:
        return moment(submission.sent_at)

    @admin.display(description=gettext_lazy("next look"))
    def next_look(self, submission: BatchSubmission) -> str:
        return moment(submission.next_look_at)


@admin.register(Batch)
class BatchAdmin(BatchDecisions):
    """Every batch, the newest first. What a list shows is counted in the batches' own rows."""

    change_form_template = "admin/ai_budget/batch_change_form.html"
    inlines = (BatchSubmissionInline,)
    list_display = (
        "number",
        "feature_name",
        "caller",
        "state",
        "items_over",
        "reserved",
        "held",
        "spent",
        "created",
    )
    list_filter = (CreatedFilter, FeatureFilter, "status")
    ordering = ("-id",)
    search_fields = ("idempotency_key",)
    search_help_text = gettext_lazy(
        "A batch's number, its idempotency key, an id at the API or a call id, in full."
    )
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("feature", "category"),
                    ("caller_with_batches", "subject"),
                    "status",
                    "tags",
                )
            },
        ),
        (
            gettext_lazy("Items"),
            {"fields": ("progress", "by_state", "by_state_with_links", "calls_link")},
        ),
        (
            gettext_lazy("Money"),
            {"fields": (("exact_reserved", "exact_held", "exact_spent"), "rates")},
        ),
        (
            gettext_lazy("Time"),
            {
                "fields": (
                    ("created_at", "reserved_at", "day"),
                    ("deadline", "finished_at", "told_at"),
                    "touched_at",
                )
            },
        ),
        (
            gettext_lazy("Request"),
            {
                "fields": (
                    ("call_id", "idempotency_key"),
                    "on_result",
                    ("resubmits", "resubmitted_as_links"),
                )
            },
        ),
    )
    readonly_fields = (
        "by_state",
        "by_state_with_links",
        "calls_link",
        "caller_with_batches",
        "exact_held",
        "exact_reserved",
        "exact_spent",
        "progress",
        "resubmitted_as_links",
    )

    class Media:
        css = {"all": ("ai_budget/admin.css",)}

    def get_queryset(self, request: HttpRequest) -> QuerySet[Batch]:
        uncertain = (
            BatchSubmission.objects.filter(
                batch=OuterRef("pk"), status=BatchSubmission.Status.UNCERTAIN
            )
            .order_by()
            .values("batch")
            .annotate(number=Count("pk"))
            .values("number")
        )
        # Users as in the log of calls: one query a page, and batches stay whose user is gone.
        found: QuerySet[Batch] = super().get_queryset(request).prefetch_related("user")
        return found.annotate(uncertain=Coalesce(Subquery(uncertain), 0))

    def get_fieldsets(self, request: HttpRequest, obj: Batch | None = None) -> Any:
        hidden = {"by_state" if _may_see(self, request, BatchItem) else "by_state_with_links"}
        if not _may_see(self, request, CallLog):
            hidden.add("calls_link")
        return _without(hidden, super().get_fieldsets(request, obj))

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Find batches by whole ids, each through its index."""
        term = search_term.strip()
        if not term:
            return queryset, False
        call_id = _uuid(term)
        if call_id is not None:
            of_items = BatchItem.objects.filter(call_id=call_id).order_by().values("batch")
            wanted = Q(call_id=call_id) | Q(pk__in=of_items)
        else:
            of_api = BatchSubmission.objects.filter(api_id=term).order_by().values("batch")
            wanted = Q(pk__in=of_api)
        if term.isdecimal():
            wanted |= Q(pk=term)
        return queryset.filter(wanted | Q(idempotency_key=term)), False

    # Columns

    @admin.display(description=gettext_lazy("batch"))
    def number(self, batch: Batch) -> str:
        return f"#{batch.pk}"

    @admin.display(description=gettext_lazy("feature"))
    def feature_name(self, batch: Batch) -> str:
        return batch.feature_id

    @admin.display(description=gettext_lazy("user"), empty_value=EMPTY)
    def caller(self, batch: Batch) -> str | None:
        return user_label(batch) or batch.subject or None

    @admin.display(description=gettext_lazy("status"))
    def state(self, batch: Batch) -> SafeString:
        """Say how a batch stands, since when it is finished, and whether somebody must decide."""
        uncertain: int = getattr(batch, "uncertain", 0)
        alarm = _("%(count)s uncertain") % {"count": count(uncertain)} if uncertain else ""
        return format_html(
            '{}<div class="ai-budget-quiet">{}</div><div class="ai-budget-alarm">{}</div>',
            batch.get_status_display(),
            "" if batch.finished_at is None else moment(batch.finished_at),
            alarm,
        )

    @admin.display(description=gettext_lazy("items"))
    def items_over(self, batch: Batch) -> SafeString:
        states = [f"{count(number)} {label}" for _name, label, number in _states(batch)]
        return format_html(
            '{}<div class="ai-budget-quiet">{}</div>', progress_bar(batch), ", ".join(states)
        )

    @admin.display(description=gettext_lazy("reserved"))
    def reserved(self, batch: Batch) -> str:
        return money.format_usd(batch.reserved_nanousd, decimals=4)

    @admin.display(description=gettext_lazy("held"))
    def held(self, batch: Batch) -> str:
        return money.format_usd(batch.held_nanousd, decimals=4)

    @admin.display(description=gettext_lazy("spent"))
    def spent(self, batch: Batch) -> str:
        return money.format_usd(batch.spent_nanousd, decimals=4)

    @admin.display(description=gettext_lazy("created"))
    def created(self, batch: Batch) -> str:
        return moment(batch.created_at)

    # Fields

    @admin.display(description=gettext_lazy("user"))
    def caller_with_batches(self, batch: Batch) -> str | SafeString:
        label = user_label(batch)
        if label is None:
            return EMPTY
        return format_html(
            '{} (<a href="{}?{}">{}</a>)',
            label,
            self.url_of("changelist"),
            urlencode({"user": str(batch.user_id)}),
            _("all batches of this user"),
        )

    @admin.display(description=gettext_lazy("over"))
    def progress(self, batch: Batch) -> SafeString:
        return progress_bar(batch)

    @admin.display(description=gettext_lazy("by state"))
    def by_state(self, batch: Batch) -> str | SafeString:
        lines = ((count(number), label) for _name, label, number in _states(batch))
        return format_html_join(SafeString("<br>"), "{} {}", lines) or EMPTY

    @admin.display(description=gettext_lazy("by state"))
    def by_state_with_links(self, batch: Batch) -> str | SafeString:
        url = reverse("admin:ai_budget_batchitem_changelist", current_app=self.admin_site.name)
        lines = (
            (url, urlencode({BATCH: str(batch.pk), "status__exact": name}), count(number), label)
            for name, label, number in _states(batch)
        )
        return format_html_join(SafeString("<br>"), '<a href="{}?{}">{} {}</a>', lines) or EMPTY

    @admin.display(description=gettext_lazy("calls"))
    def calls_link(self, batch: Batch) -> SafeString:
        url = reverse("admin:ai_budget_calllog_changelist", current_app=self.admin_site.name)
        query = urlencode({BATCH: batch.pk})
        return format_html('<a href="{}?{}">{}</a>', url, query, _("Calls of this batch"))

    @admin.display(description=gettext_lazy("reserved"))
    def exact_reserved(self, batch: Batch) -> str:
        return exact_usd(batch.reserved_nanousd)

    @admin.display(description=gettext_lazy("held"))
    def exact_held(self, batch: Batch) -> str:
        return exact_usd(batch.held_nanousd)

    @admin.display(description=gettext_lazy("spent"))
    def exact_spent(self, batch: Batch) -> str:
        return exact_usd(batch.spent_nanousd)

    @admin.display(description=gettext_lazy("resubmitted as"))
    def resubmitted_as_links(self, batch: Batch) -> str | SafeString:
        later = batch.resubmitted_as.order_by("pk").values_list("pk", flat=True)
        return format_html_join(", ", "{}", ((self.link_to(pk),) for pk in later)) or EMPTY


@admin.register(BatchItem)
class BatchItemAdmin(JournalAdmin):
    """The items of batches. Links from their batch lead here; the index does not list them."""

    list_display = ("position", "key", "state", "models", "reserved", "error", "call")
    list_display_links = ("key",)
    list_filter = (BatchItemsFilter, "status")
    search_fields = ("custom_id",)
    search_help_text = gettext_lazy("A call id, in full; within one batch also an item's key.")
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("batch", "submission", "position"),
                    ("key", "custom_id"),
                    ("status", "error"),
                    ("call_id", "call", "handed"),
                )
            },
        ),
        (
            gettext_lazy("Model"),
            {
                "fields": (
                    ("model", "requested_model", "may_fall_back"),
                    "decision",
                    ("max_tokens", "inference_geo"),
                )
            },
        ),
        (gettext_lazy("Money"), {"fields": ("exact_reserved",)}),
    )
    readonly_fields = ("call", "exact_reserved")

    class Media:
        css = {"all": ("ai_budget/admin.css",)}

    def has_module_permission(self, request: HttpRequest) -> bool:
        return False

    def get_list_display(self, request: HttpRequest) -> tuple[Any, ...]:
        columns = tuple(super().get_list_display(request))
        if _may_see(self, request, CallLog):
            return columns
        return tuple(column for column in columns if column != "call")

    def get_fieldsets(self, request: HttpRequest, obj: BatchItem | None = None) -> Any:
        hidden = set() if _may_see(self, request, CallLog) else {"call"}
        return _without(hidden, super().get_fieldsets(request, obj))

    def get_ordering(self, request: HttpRequest) -> tuple[str, ...]:
        # Each is the order of an index: of a batch's own items, or of all.
        return ("batch_id", "position") if request.GET.get(BATCH) else ("-id",)

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Find an item by its call, or by its key among those of one batch."""
        term = search_term.strip()
        if not term:
            return queryset, False
        call_id = _uuid(term)
        of_call = Q() if call_id is None else Q(call_id=call_id)
        # There is no index of keys, but one batch's items are few.
        of_key = Q(key=term) if request.GET.get(BATCH) else Q()
        wanted = of_call | of_key
        return (queryset.filter(wanted) if wanted else queryset.none()), False

    @admin.display(description=gettext_lazy("status"))
    def state(self, item: BatchItem) -> str:
        return item.get_status_display()

    @admin.display(description=gettext_lazy("model"))
    def models(self, item: BatchItem) -> str | SafeString:
        if item.model == item.requested_model:
            return item.model
        return format_html(
            '{}<div class="ai-budget-quiet">{}</div>',
            item.model,
            _("asked for %(model)s") % {"model": item.requested_model},
        )

    @admin.display(description=gettext_lazy("reserved"))
    def reserved(self, item: BatchItem) -> str:
        return money.format_usd(item.reserved_nanousd, decimals=6)

    @admin.display(description=gettext_lazy("booked as"))
    def call(self, item: BatchItem) -> str | SafeString:
        if item.status not in _WITH_CALL:
            return EMPTY
        url = reverse("admin:ai_budget_calllog_changelist", current_app=self.admin_site.name)
        query = urlencode({"q": str(item.call_id)})
        return format_html('<a href="{}?{}">{}</a>', url, query, _("Call"))

    @admin.display(description=gettext_lazy("reserved"))
    def exact_reserved(self, item: BatchItem) -> str:
        return exact_usd(item.reserved_nanousd)


def progress_bar(batch: Batch) -> SafeString:
    """Return how many items are over as a drawn bar, with the same figures in words beside it."""
    if not batch.total:
        return format_html('<span class="ai-budget-figures">{}</span>', EMPTY)
    over = batch.total - batch.open
    figures = {
        "over": count(over),
        "total": count(batch.total),
        "percent": 100 * over // batch.total,
    }
    return format_html(
        '<svg class="ai-budget-bar" role="img" width="140" height="8" '
        'viewBox="0 0 100 8" preserveAspectRatio="none"><title>{}</title>'
        '<rect class="ai-budget-track" width="100" height="8"/>'
        '<rect class="ai-budget-unanswered" width="{}" height="8"/>'
        '<rect class="ai-budget-answered" width="{}" height="8"/></svg>'
        '<span class="ai-budget-figures">{}</span>',
        _("%(over)s of %(total)s items are over: %(percent)s %%") % figures,
        _width(over, batch),
        _width(batch.succeeded + batch.cached, batch),
        _("%(over)s of %(total)s") % figures,
    )


def _may_see(page: JournalAdmin, request: HttpRequest, model: type[Model]) -> bool:
    """Say whether to link from a page to the rows of another model."""
    if not page.admin_site.is_registered(model):
        return False
    return page.admin_site.get_model_admin(model).has_view_permission(request)


def _width(number: int, batch: Batch) -> str:
    """Return the width of a part of the bar, in hundredths with one decimal."""
    return f"{100 * number / batch.total:.1f}"


def _states(batch: Batch) -> list[tuple[str, str, int]]:
    """Return the states that a batch has items in: their names, what to call them, how many."""
    numbers = [(name, str(label), getattr(batch, name)) for name, label in _STATES.items()]
    return [(name, label, number) for name, label, number in numbers if number]


def _without(hidden: Collection[str], fieldsets: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Return fieldsets without some of their fields."""

    def kept(field: Any) -> Any:
        if isinstance(field, str):
            return None if field in hidden else field
        return tuple(name for name in field if name not in hidden)

    return [
        (title, {**options, "fields": [kept(it) for it in options["fields"] if kept(it)]})
        for title, options in fieldsets
    ]


def _uuid(term: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(term)
    except ValueError:
        return None
