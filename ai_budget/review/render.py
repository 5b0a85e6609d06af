"""A cost report as text: aligned tables for people, JSON and CSV for programs.

Pure functions of the report. JSON and CSV carry exact dollars as decimal strings and keep
their keys; the tables round. Names come from users: tables show no control characters, and CSV
cells can be no formulas.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from ai_budget import money
from ai_budget.periods import next_month
from ai_budget.review.queries import ENOUGH_LOOKED_UP, WORTH_CACHING_PERCENT, Report
from ai_budget.values import SITE

NONE = "-"
"""What a table shows where there is no figure."""

_WIDEST_NAME = 32
_WIDEST_OF_THREE = 26
# The last four are the full-width forms of the first.
_FORMULA_STARTS = tuple("=+-@\t\n\uff1d\uff0b\uff0d\uff20")


# For programs ------------------------------------------------------------------------------------


def to_json(report: Report) -> str:
    """Return the report as one JSON object, dollars and percentages as decimal strings."""
    return json.dumps(to_data(report), indent=2) + "\n"


def to_csv(report: Report) -> str:
    """Return the report as CSV in long form: section, name, metric, value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["section", "name", "metric", "value"])
    for row in _long_form(to_data(report)):
        writer.writerow([_harmless(cell) for cell in row])
    return out.getvalue()


def to_data(report: Report) -> dict[str, Any]:
    """Return the report as plain values. New keys may come; those that are here stay."""
    total = report.total
    return {
        "since": report.since.isoformat(),
        "until": report.until.isoformat(),
        "time_zone": report.time_zone,
        "feature": None if report.feature == SITE else report.feature,
        "total": {
            "spend_usd": _exact(total.spend_nanousd),
            "held_usd": _exact(total.held_nanousd),
            "budget_usd": _exact(total.budget_nanousd),
            "budget_used_percent": _decimal(total.budget_used),
            "plan_usd": _exact(total.plan_nanousd),
            "plan_used_percent": _decimal(total.plan_used),
            "calls": total.calls,
            "attempts": total.attempts,
            "cached": total.cached,
            "looked_up": total.looked_up,
            "hit_rate_percent": _decimal(total.hit_rate),
            "saved_usd": _exact(total.saved_nanousd),
            "refused": total.refused,
            "active_users": total.active_users,
            "cost_per_active_user_usd": _exact(total.cost_per_active_user_nanousd),
        },
        "features": [
            {
                "feature": it.feature,
                "spend_usd": _exact(it.spend_nanousd),
                "share_percent": _decimal(it.share),
                "held_usd": _exact(it.held_nanousd),
                "calls": it.calls,
                "cached": it.cached,
                "looked_up": it.looked_up,
                "hit_rate_percent": _decimal(it.hit_rate),
                "worth_caching": not it.caching.is_worthless,
                "saved_usd": _exact(it.saved_nanousd),
                "budget_usd": _exact(it.budget_nanousd),
                "budget_used_percent": _decimal(it.budget_used),
                "plan_usd": _exact(it.plan_nanousd),
                "plan_used_percent": _decimal(it.plan_used),
                "refused": it.refused,
            }
            for it in report.features
        ],
        "users": [
            {
                "user": it.label,
                "user_id": str(it.user_id),
                "deleted": it.deleted,
                "calls": it.calls,
                "spend_usd": _exact(it.spend_nanousd),
            }
            for it in report.users
        ],
        "subjects": [
            {
                "subject": it.subject,
                "calls": it.calls,
                "spend_usd": _exact(it.spend_nanousd),
            }
            for it in report.subjects
        ],
        "models": [
            {
                "model": it.model,
                "calls": it.calls,
                "average_output_tokens": it.average_output_tokens,
                "average_cost_usd": _exact(it.average_cost_nanousd),
                "spend_usd": _exact(it.spend_nanousd),
                "share_percent": _decimal(it.share),
            }
            for it in report.models
        ],
        "refusals": [{"feature": it.feature, "refused": it.refused} for it in report.refusals],
        "downgrades": [
            {
                "feature": it.feature,
                "requested_model": it.requested_model,
                "model": it.model,
                "calls": it.calls,
                "spend_usd": _exact(it.spend_nanousd),
            }
            for it in report.downgrades
        ],
        "savings": [
            {"lever": it.lever, "calls": it.calls, "saved_usd": _exact(it.saved_nanousd)}
            for it in report.savings
        ],
    }


# What names a row of each section; its other keys are metrics.
_NAMED_BY: Mapping[str, tuple[str, ...]] = {
    "features": ("feature",),
    "users": ("user",),
    "subjects": ("subject",),
    "models": ("model",),
    "refusals": ("feature",),
    "downgrades": ("feature", "requested_model", "model"),
    "savings": ("lever",),
}


def _long_form(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    for key in ("since", "until", "time_zone", "feature"):
        yield "report", "", key, data[key]
    for metric, value in data["total"].items():
        yield "total", "", metric, value
    for section, columns in _NAMED_BY.items():
        for row in data[section]:
            name = " > ".join(row[column] for column in columns)
            for metric, value in row.items():
                if metric not in columns:
                    yield section, name, metric, value


def _harmless(cell: Any) -> Any:
    """Keep a cell from being read as a formula by the spreadsheet that opens the file."""
    if isinstance(cell, bool):
        return str(cell).lower()
    if not isinstance(cell, str):
        return cell
    # Before Python 3.13 the writer leaves a lone carriage return unquoted: a broken row.
    text = cell.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _exact(nanousd: int | None) -> str | None:
    return None if nanousd is None else format(money.to_usd(nanousd), "f")


def _decimal(value: Decimal | None) -> str | None:
    return None if value is None else format(value, "f")


# For people --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """A section: its first columns hold names, the others figures, set to the right."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1


def to_table(report: Report) -> str:
    """Return the report as aligned columns that fit a terminal of a hundred."""
    title = _title(report)
    if report.is_empty:
        return f"There were no calls {_when(report)}{_about(report)}.\n"
    blocks = [f"{title}\n{'=' * _width(title)}", _summary(report)]
    blocks += [_drawn(table) for table in _tables(report) if table.rows]
    return "\n\n".join(blocks) + "\n"


def _title(report: Report) -> str:
    return f"AI spend {_when(report)}{_about(report)}"


def _about(report: Report) -> str:
    return "" if report.feature == SITE else f", {_shown(report.feature)} only"


def _when(report: Report) -> str:
    if _is_a_month(report.since, report.until):
        return f"in {report.since:%Y-%m} ({report.time_zone})"
    last = (report.until - timedelta(microseconds=1)).date()
    if last == report.since.date():
        return f"on {last} ({report.time_zone})"
    return f"from {report.since.date()} to {last} ({report.time_zone})"


def _is_a_month(since: datetime, until: datetime) -> bool:
    return since.day == 1 and next_month(since.date()) == until.date()


def _summary(report: Report) -> str:
    total = report.total
    rows = [("Spend", _usd(total.spend_nanousd))]
    if total.budget_nanousd is not None:
        used = f", {_percent(total.budget_used)} used" if total.budget_used is not None else ""
        rows.append(("Budget", f"{_usd(total.budget_nanousd)}{used}"))
    else:
        rows.append(("Budget", "no limit"))
    if total.plan_nanousd is not None:
        used = f", {_percent(total.plan_used)} used" if total.plan_used is not None else ""
        rows.append(("Plan", f"{_usd(total.plan_nanousd)}{used}"))
    if total.held_nanousd:
        rows.append(("In flight", f"{_usd(total.held_nanousd)} held"))
    if total.saved_nanousd:
        rows.append(("Saved", _usd(total.saved_nanousd)))
    rows.append(("Calls", f"{total.calls:,}, of which {total.cached:,} from the cache"))
    rows.append(("Attempts", f"{total.attempts:,}"))
    rows.append(("Refused", f"{total.refused:,}"))
    each = total.cost_per_active_user_nanousd
    average = "" if each is None else f", {_small_usd(each)} each"
    rows.append(("Active users", f"{total.active_users:,}{average}"))
    return "\n".join(f"{label:<14}{value}" for label, value in rows)


def _tables(report: Report) -> Iterator[_Table]:
    yield _features(report)
    yield _Table(
        title="Most expensive users",
        headings=["User", "Calls", "Spend"],
        rows=[[it.label, f"{it.calls:,}", _usd(it.spend_nanousd)] for it in report.users],
    )
    yield _Table(
        title="Most expensive subjects",
        headings=["Subject", "Calls", "Spend"],
        rows=[[it.subject, f"{it.calls:,}", _usd(it.spend_nanousd)] for it in report.subjects],
    )
    yield _Table(
        title="By model",
        headings=["Model", "Calls", "Avg output", "Avg cost", "Spend", "Share"],
        rows=[
            [
                it.model,
                f"{it.calls:,}",
                _count(it.average_output_tokens),
                _small_usd(it.average_cost_nanousd),
                _usd(it.spend_nanousd),
                _percent(it.share),
            ]
            for it in report.models
        ],
    )
    yield _Table(
        title="Refusals",
        headings=["Feature", "Refused"],
        rows=[[it.feature, f"{it.refused:,}"] for it in report.refusals],
    )
    yield _Table(
        title="Downgrades",
        headings=["Feature", "Asked for", "Answered by", "Calls", "Spend"],
        rows=[
            [
                _fitted(it.feature, _WIDEST_OF_THREE),
                _fitted(it.requested_model, _WIDEST_OF_THREE),
                _fitted(it.model, _WIDEST_OF_THREE),
                f"{it.calls:,}",
                _usd(it.spend_nanousd),
            ]
            for it in report.downgrades
        ],
        names=3,
    )
    yield _Table(
        title="Savings",
        headings=["Lever", "Calls", "Saved"],
        rows=[[it.lever, f"{it.calls:,}", _usd(it.saved_nanousd)] for it in report.savings],
    )
    yield _Table(
        title=(
            f"Not worth caching: under {WORTH_CACHING_PERCENT} % found in "
            f"{ENOUGH_LOOKED_UP} calls or more"
        ),
        headings=["Feature", "Looked up", "Found", "Hit rate"],
        rows=[
            [it.feature, f"{it.looked_up:,}", f"{it.cached:,}", _percent(it.hit_rate)]
            for it in report.not_worth_caching
        ],
    )


def _features(report: Report) -> _Table:
    headings = ["Feature", "Spend", "Share", "Calls", "Cached", "Budget used", "Refused"]
    rows = [
        [
            it.feature,
            _usd(it.spend_nanousd),
            _percent(it.share),
            f"{it.calls:,}",
            _percent(it.hit_rate),
            _percent(it.budget_used),
            f"{it.refused:,}",
        ]
        for it in report.features
    ]
    if any(it.plan_nanousd is not None for it in report.features):
        headings.insert(-1, "Plan used")
        for row, it in zip(rows, report.features, strict=True):
            row.insert(-1, _percent(it.plan_used))
    return _Table(title="By feature", headings=headings, rows=rows)


def _drawn(table: _Table) -> str:
    rows = [[_fitted(row[0]), *row[1:]] for row in table.rows]
    lines = [list(table.headings), *rows]
    widths = [max(_width(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join([table.title, *(_aligned(line, widths, table.names) for line in lines)])


def _aligned(line: Sequence[str], widths: Sequence[int], names: int) -> str:
    text = ""
    for index, (cell, width) in enumerate(zip(line, widths, strict=True)):
        padding = " " * (width - _width(cell))
        text += "  " + (cell + padding if index < names else padding + cell)
    return text.rstrip()


def _fitted(name: str, widest: int = _WIDEST_NAME) -> str:
    shown = _shown(name)
    if _width(shown) <= widest:
        return shown
    while _width(shown) > widest - 3:
        shown = shown[:-1]
    return shown + "..."


def _shown(name: str) -> str:
    """Replace what could move the cursor or colour the terminal."""
    return "".join(char if char.isprintable() else "?" for char in name)


def _width(text: str) -> int:
    """Return the columns that a text takes in a terminal."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def _usd(nanousd: int) -> str:
    return money.format_usd(nanousd)


def _small_usd(nanousd: int | None) -> str:
    if nanousd is None:
        return NONE
    return money.format_usd(nanousd, decimals=2 if nanousd >= money.NANO_PER_USD else 4)


def _percent(value: Decimal | None) -> str:
    return NONE if value is None else f"{value} %"


def _count(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


RENDERERS: Mapping[str, Callable[[Report], str]] = {
    "table": to_table,
    "json": to_json,
    "csv": to_csv,
}
"""The renderer of each format."""
