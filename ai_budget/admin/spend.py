"""The spend page: what was spent just now and in a range of days, on what, and by whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.translation import gettext as _

from ai_budget import money, periods
from ai_budget.admin import spend_sections as sections
from ai_budget.admin.spend_address import RANGES, Asked, asked_for
from ai_budget.admin.spend_sections import Links
from ai_budget.admin.user_spend import SEE_SPEND, CallerPages, subject_url, user_url
from ai_budget.models import CallLog, DayTotal
from ai_budget.review.csv_cells import lines
from ai_budget.review.present import Present, present
from ai_budget.review.render import csv_rows
from ai_budget.review.report import Report, report_of
from ai_budget.review.sums import reading

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[DayTotal]
else:
    _ModelAdmin = admin.ModelAdmin

_MOST_CALLERS = 10


@admin.register(DayTotal)
class SpendAdmin(_ModelAdmin):
    """One page for who may see what was spent, in the place of a list of sums."""

    def get_urls(self) -> list[URLPattern]:
        wrap = self.admin_site.admin_view
        return [
            *CallerPages(self.admin_site).urls(),
            path("", wrap(self.spend_view), name="ai_budget_daytotal_changelist"),
            path("", wrap(self.spend_view), name="ai_budget_spend"),
            path("csv/", wrap(self.csv_view), name="ai_budget_spend_csv"),
        ]

    def has_module_permission(self, request: HttpRequest) -> bool:
        return self.has_view_permission(request)

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return request.user.has_perm(SEE_SPEND)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def spend_view(self, request: HttpRequest) -> HttpResponse:
        """Show the page."""
        asked = self._asked(request)
        figures = _read(asked)
        links = self._links(request, asked)
        context = {
            **self.admin_site.each_context(request),
            "title": _("Spend"),
            "opts": self.opts,
            "asked": asked,
            "range": sections.range_in_words(asked),
            "ranges": [
                (title, asked.query(range=key), asked.range == key) for key, title in RANGES.items()
            ],
            "everything": asked.query(feature="*", model="", user_id=None, tag=""),
            "csv_url": self._url("spend_csv") + asked.query(),
            **figures.context(links),
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(request, "admin/ai_budget/spend.html", context)

    def csv_view(self, request: HttpRequest) -> HttpResponse | StreamingHttpResponse:
        """Send what the page shows as CSV, in long form."""
        asked = self._asked(request)
        figures = _read(asked)
        name = f"spend-{asked.first.isoformat()}-{asked.last.isoformat()}.csv"
        return StreamingHttpResponse(
            lines(figures.rows()),
            content_type="text/csv; charset=utf-8",
            headers={"Content-Disposition": f'attachment; filename="{name}"'},
        )

    def _asked(self, request: HttpRequest) -> Asked:
        if not self.has_view_permission(request):
            raise PermissionDenied
        return asked_for(request.GET)

    def _links(self, request: HttpRequest, asked: Asked) -> Links:
        # A site may have taken the list of calls out of its admin.
        calls = self.admin_site._registry.get(CallLog)
        may_see_calls = calls is not None and calls.has_view_permission(request)
        return Links(
            asked=asked,
            calls_url=self._url("calllog_changelist") if may_see_calls else "",
            user_url=partial(user_url, self.admin_site),
            subject_url=partial(subject_url, self.admin_site),
        )

    def _url(self, page: str) -> str:
        return reverse(f"admin:ai_budget_{page}", current_app=self.admin_site.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Figures:
    """What was read, all of it as it was at one moment."""

    asked: Asked
    report: Report
    present: Present
    by_day: Mapping[tuple[date, str], int]
    months: Mapping[tuple[date], int]
    trends: Mapping[tuple[date, str], int]
    purged_before: datetime | None

    def context(self, links: Links) -> dict[str, Any]:
        """Return the sections of the page."""
        report = self.report
        trends = sections.trends(self.trends, sections.trend_days(self.asked))
        return {
            "at": report.at.astimezone(self.asked.zone),
            "purged": self._purged(),
            "cards": sections.cards(self.present, links),
            "attention": sections.attention(report, links),
            "totals": sections.totals(report, links),
            "month": sections.month(self.months, self.present, links),
            "days": sections.days(self.by_day, links),
            "on_what": [
                *([sections.categories(report, links)] if report.categories else []),
                sections.features(report, trends, links),
                sections.models(report, links),
            ],
            "by_whom": [
                sections.users(report, links),
                *([sections.subjects(report, links)] if report.subjects else []),
            ],
            "not_spent": [
                sections.savings(report, links),
                sections.downgrades(report, links),
            ],
        }

    def _purged(self) -> datetime | None:
        """Return when the calls begin that are kept, where that makes a difference.

        Of users there are sums of all features and models together, and of tags none.
        """
        before, asked = self.purged_before, self.asked
        if before is None or not asked.is_filtered or asked.since >= before:
            return None
        return before.astimezone(asked.zone)

    def rows(self) -> Iterator[Sequence[Any]]:
        """Yield the report, and what was spent day by day."""
        yield from csv_rows(self.report)
        for (day, name), nanousd in sorted(self.by_day.items()):
            yield (
                "days",
                f"{day.isoformat()}, {name}",
                "spend_usd",
                format(money.to_usd(nanousd), "f"),
            )


def _read(asked: Asked) -> _Figures:
    """Read all figures. How many queries that takes does not depend on how many calls there are."""
    with reading() as sums:
        report = report_of(sums, asked.span, top=_MOST_CALLERS)
        trend = asked.within(
            periods.midnight(sections.trend_days(asked)[0], asked.zone), asked.until
        )
        return _Figures(
            asked=asked,
            report=report,
            present=present(sums, asked.span),
            purged_before=sums.state.purged_before,
            months=sums.spend(sections.month_days(asked), "day"),
            by_day=report.days
            if asked.stack == "feature"
            else sums.spend(asked.span, "day", asked.stack),
            trends=report.days if trend == asked.span else sums.spend(trend, "day", "feature"),
        )
