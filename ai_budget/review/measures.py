"""What is added up of calls, and by what: the same for the totals and for the calls themselves."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db.models import Count, DateTimeField, F, Func, Q, Sum
from django.db.models.expressions import Combinable

from ai_budget.models import CallLog

QUARTER = timedelta(minutes=15)
"""Every zone's days are made of whole ones."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

ALIKE = (
    "feature",
    "category",
    "provider",
    "model",
    "requested_model",
    "kind",
    "status",
    "saved_reason",
)
"""Columns of the totals by which calls are told apart."""

PAID = Q(status__in=[CallLog.Status.SETTLED, CallLog.Status.ESTIMATED])
HELD = Q(status=CallLog.Status.RESERVED)
RELEASED = Q(status=CallLog.Status.RELEASED)
HELPERS = Q(kind__in=[CallLog.Kind.ROUTER, CallLog.Kind.SUMMARY])
"""Calls that only help another, which is the one that counts."""
CACHED = Q(status=CallLog.Status.CACHED) & ~HELPERS


class Total(Sum):
    """A sum that is read as an integer: PostgreSQL adds up BIGINT to a decimal, which is slow."""

    def as_postgresql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        sql, params = self.as_sql(compiler, connection, **extra)
        return f"({sql})::bigint", params


MEASURES: Mapping[str, Combinable] = {
    "attempts": Count("pk"),
    "counted": Total("counted", default=0),
    "checked": Total("counted", filter=Q(cache_checked=True), default=0),
    **{
        name: Total(name, default=0)
        for name in (
            "input_tokens",
            "cache_write_5m_tokens",
            "cache_write_1h_tokens",
            "cache_read_tokens",
            "output_tokens",
            "thinking_tokens",
            "web_searches",
            "max_tokens",
        )
    },
    "cut": Count("pk", filter=Q(stop_reason="max_tokens")),
    "roomy": Count("pk", filter=Q(max_tokens__gt=F("output_tokens") * 2)),
    "cost_nanousd": Total("cost_nanousd", default=0),
    "saved_nanousd": Total("saved_nanousd", default=0),
}
"""Each measure of the totals, as it is reckoned from calls."""

CALLER_MEASURES: Mapping[str, Combinable] = {
    "attempts": Count("pk"),
    "calls": Total("counted", filter=PAID | HELD, default=0) + Count("pk", filter=CACHED),
    "cost_nanousd": Total("cost_nanousd", filter=PAID, default=0),
    "saved_nanousd": Total("saved_nanousd", default=0),
}
"""Each measure of a caller's totals, as it is reckoned from calls that were not released."""


class QuarterStart(Func):
    """The start of the quarter-hour that a moment is in."""

    output_field = DateTimeField()

    def as_postgresql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        template = "to_timestamp(FLOOR(EXTRACT(EPOCH FROM %(expressions)s) / 900) * 900)"
        return self.as_sql(compiler, connection, template=template, **extra)

    def as_sqlite(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        # As Django writes moments without a fraction, for they are compared as text; and read
        # without one, which would be rounded to milliseconds: up into the next quarter-hour.
        template = (
            "strftime('%%%%Y-%%%%m-%%%%d %%%%H:%%%%M:%%%%S', "
            "(CAST(strftime('%%%%s', substr(%(expressions)s, 1, 19)) AS INTEGER) / 900) * 900, "
            "'unixepoch')"
        )
        return self.as_sql(compiler, connection, template=template, **extra)

    def as_mysql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        number = "TIMESTAMPDIFF(SECOND, '1970-01-01', %(expressions)s) DIV 900"
        template = f"TIMESTAMPADD(SECOND, ({number}) * 900, TIMESTAMP('1970-01-01'))"
        return self.as_sql(compiler, connection, template=template, **extra)


def quarter_of(at: datetime) -> datetime:
    """Return the start of the quarter-hour that a moment is in."""
    return at - (at - _EPOCH) % QUARTER
