"""Pages over tables that grow with every call: nothing on them reads the whole table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.core.paginator import Paginator
from django.db.models import Model
from django.http import HttpRequest
from django.utils import formats
from django.utils.functional import cached_property

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Any]
    _Paginator = Paginator[Any]
else:
    _ModelAdmin = admin.ModelAdmin
    _Paginator = Paginator


class CappedPaginator(_Paginator):
    """Counts up to ``most`` rows and offers pages over those: filters lead to the others."""

    most = 10_000

    @cached_property
    def count(self) -> int:
        return min(self._found, self.most)

    @property
    def is_capped(self) -> bool:
        """Whether there are more rows than the pages reach."""
        return self._found > self.most

    @property
    def most_shown(self) -> str:
        return formats.number_format(self.most, force_grouping=True)

    @cached_property
    def _found(self) -> int:
        rows: Any = self.object_list
        return int(rows.order_by()[: self.most + 1].count())


class JournalChangeList(ChangeList):
    """Says how many rows match in one place, where the paginator knows whether it is all."""

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        if not self.query:
            # The search bar shows a count where this one differs from the count of matches.
            self.full_result_count = self.result_count


class JournalAdmin(_ModelAdmin):
    """A read-only page of a large table: what the ledger wrote is evidence, not a form.

    No full count, no facets, no sorting by columns without an index.
    """

    actions = None
    change_list_template = "admin/ai_budget/journal_change_list.html"
    list_per_page = 50
    list_max_show_all = 0
    paginator = CappedPaginator
    show_facets = admin.ShowFacets.NEVER
    show_full_result_count = False
    sortable_by = ()

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return JournalChangeList

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False
