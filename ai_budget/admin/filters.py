"""Filters of calls and batches whose choices come from small tables, never from the calls."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import permutations
from typing import Any

from django.contrib import admin
from django.contrib.admin.views.main import SEARCH_VAR, ChangeList
from django.db.models import F, Q, QuerySet, Value
from django.db.models.fields.json import KeyTextTransform
from django.db.models.lookups import Exact
from django.http import HttpRequest
from django.utils import formats
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
from ai_budget.review.callers import user_by_key
from ai_budget.review.names import deleted_user
from ai_budget.values import SITE

BATCH = "batch"
"""The parameter that names the batch whose calls or items are shown."""

ANY = "yes"
"""What a filter is asked for that has no certain value."""

SINCE, UNTIL = "since", "until"
"""The parameters of a range of one's own, ``[since, until)``: days or moments, in ISO format."""


class _DefaultedFilter(admin.SimpleListFilter):
    """A filter that always filters: its first choice is what a bare address shows."""

    rivals: tuple[str, ...] = ()
    """Parameters that a choice takes out of the address."""

    def chosen(self) -> str:
        """Return the choice in force, the first where the address names none that exists."""
        keys = [str(key) for key, _title in self.lookup_choices]
        value = self.value()
        return value if value in keys else keys[0]

    def choices(self, changelist: ChangeList) -> Iterator[Any]:
        name = self.parameter_name or ""
        for index, (key, title) in enumerate(self.lookup_choices):
            own = {name: key if index else None}
            yield {
                "selected": self.chosen() == str(key),
                "query_string": changelist.get_query_string(own, self.rivals),
                "display": title,
            }


class ReservedFilter(_DefaultedFilter):
    """The last seven days unless asked otherwise, so that a page reads recent rows alone.

    A range of one's own, which links name by ``since`` and ``until``, wins over the choices.
    """

    title = _("time")
    parameter_name = "reserved"
    column = "reserved_at"
    rivals = (SINCE, UNTIL)

    def __init__(
        self, request: HttpRequest, params: dict[str, Any], model: Any, model_admin: Any
    ) -> None:
        since, until = (params.pop(name, [""])[-1] for name in (SINCE, UNTIL))
        self._own = _moment(since), _moment(until)
        super().__init__(request, params, model, model_admin)

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [
            ("week", _("Last 7 days")),
            ("today", _("Today")),
            ("month", _("This month")),
            ("last_month", _("Last month")),
            ("all", _("Any time")),
        ]

    def expected_parameters(self) -> list[str | None]:
        return [self.parameter_name, *self.rivals]

    def chosen(self) -> str:
        if any(self._own):
            return _OWN
        # Who looks for one request by its id, or for one batch, means it wherever it is.
        one = self.request.GET.get(SEARCH_VAR) or self.request.GET.get(BATCH)
        if self.value() is None and one:
            return "all"
        return super().chosen()

    def choices(self, changelist: ChangeList) -> Iterator[Any]:
        yield from super().choices(changelist)
        if any(self._own):
            since, until = ("…" if at is None else _shown(at) for at in self._own)
            own = changelist.get_query_string()
            yield {"selected": True, "query_string": own, "display": f"{since} – {until}"}

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
            case "own":
                return self._own
            case _:
                return now - timedelta(days=7), None


_OWN = "own"


def _moment(text: str) -> datetime | None:
    """Return the start of a day, in the zone that limits count in, or a moment; None of others."""
    try:
        if len(text) == len("2026-10-15"):
            return periods.midnight(date.fromisoformat(text), conf.TIME_ZONE)
        at = datetime.fromisoformat(text)
        return at.astimezone(UTC) if at.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _shown(at: datetime) -> str:
    local = at.astimezone(conf.TIME_ZONE)
    day = formats.date_format(local, "SHORT_DATE_FORMAT")
    return day if not (local.hour or local.minute) else f"{day} {local:%H:%M}"


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
        return [(model, model) for model in sorted(models_named())]

    def queryset(
        self, request: HttpRequest, queryset: QuerySet[CallLog]
    ) -> QuerySet[CallLog] | None:
        value = self.value()
        return None if value is None else queryset.filter(model=value)


class _LinkedFilter(admin.SimpleListFilter):
    """One value, named in the address: links lead here, and it can be taken off again."""

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        value = self.value()
        return [] if value is None else [(value, self.shown(value))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any] | None:
        value = self.value()
        return None if value is None else self.matching(queryset, value)

    def shown(self, value: str) -> Any:
        """Return the value for people."""
        return value

    def matching(self, queryset: QuerySet[Any], value: str) -> QuerySet[Any]:
        raise NotImplementedError


class _BatchFilter(_LinkedFilter):
    """One batch."""

    title = _("batch")
    parameter_name = BATCH

    def shown(self, value: str) -> str:
        return f"#{value}"

    def matching(self, queryset: QuerySet[Any], value: str) -> QuerySet[Any]:
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


class UserFilter(_LinkedFilter):
    """One user, also one whose account is gone."""

    title = _("user")
    parameter_name = "user"

    def shown(self, value: str) -> str:
        try:
            key, user = user_by_key(value)
        except LookupError:
            return value
        return deleted_user(key) if user is None else user.get_username()

    def matching(self, queryset: QuerySet[CallLog], value: str) -> QuerySet[CallLog]:
        try:
            key, _user = user_by_key(value)
        except LookupError:
            return queryset.none()
        return queryset.filter(user_id=key)


class SubjectFilter(_LinkedFilter):
    """One subject."""

    title = _("subject")
    parameter_name = "subject"

    def matching(self, queryset: QuerySet[CallLog], value: str) -> QuerySet[CallLog]:
        return queryset.filter(subject=value)


class TagFilter(_LinkedFilter):
    """One tag, as ``name=value``."""

    title = _("tag")
    parameter_name = "tag"

    def matching(self, queryset: QuerySet[CallLog], value: str) -> QuerySet[CallLog]:
        tag = tag_of(value)
        return queryset.none() if tag is None else queryset.filter(tagged(tag))


class DowngradeFilter(_LinkedFilter):
    """Calls that another model answered than the one they asked for, any or a certain one."""

    title = _("model asked for")
    parameter_name = "downgraded"

    def shown(self, value: str) -> Any:
        return _("not the one that answered") if value == ANY else value

    def matching(self, queryset: QuerySet[CallLog], value: str) -> QuerySet[CallLog]:
        others = queryset.exclude(model=F("requested_model"))
        return others if value == ANY else others.filter(requested_model=value)


class SavingFilter(_LinkedFilter):
    """Calls that one lever, or several together, took something off."""

    title = _("saved by")
    parameter_name = "saved_by"

    def matching(self, queryset: QuerySet[CallLog], value: str) -> QuerySet[CallLog]:
        # A call names its levers in the order in which it met them.
        levers = value.split(", ")[:_MOST_LEVERS]
        return queryset.filter(saved_reason__in=map(", ".join, permutations(levers)))


_MOST_LEVERS = 5


def models_named() -> set[str]:
    """Return the models that budgets, ladders, rates and settings name, in one query."""
    budgets, rungs, rates = (
        table.objects.order_by().values_list("model")
        for table in (FeatureBudget, DowngradeRung, ModelRate)
    )
    named = {model for (model,) in budgets.union(rungs, rates).order_by("model")}
    return (named | {conf.DEFAULT_MODEL, *conf.TIERS}) - {""}


def tagged(tag: tuple[str, str]) -> Exact:
    """Return the condition that calls have a tag, in words that every database knows."""
    name, value = tag
    return Exact(KeyTextTransform(name, "tags"), Value(value))


def tag_of(text: str) -> tuple[str, str] | None:
    """Return a tag that is written as ``name=value``, or None of anything else."""
    name, equals, value = text.partition("=")
    name = name.strip()
    return (name, value.strip()) if name and equals else None


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
