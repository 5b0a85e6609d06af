"""A cost report as plain values, JSON and CSV, for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from decimal import Decimal
from typing import Any

from ai_budget import money
from ai_budget.review import csv_cells
from ai_budget.review.attention import Concern
from ai_budget.review.comparison import Change, Comparison
from ai_budget.review.forecast import Forecast
from ai_budget.review.pace import BudgetPace
from ai_budget.review.report import Report
from ai_budget.review.spending import CategorySpend, FeatureSpend, ModelSpend
from ai_budget.review.wording import sentence
from ai_budget.values import SITE


def to_json(report: Report) -> str:
    """Return the report as one JSON object, dollars and percentages as decimal strings."""
    return json.dumps(to_data(report), indent=2) + "\n"


def to_csv(report: Report) -> str:
    """Return the report as CSV in long form: section, name, metric, value."""
    return "".join(csv_lines(report))


def csv_lines(report: Report) -> Iterator[str]:
    """Yield the lines of ``to_csv`` one by one."""
    return csv_cells.lines(csv_rows(report))


def csv_rows(report: Report) -> Iterator[Sequence[Any]]:
    """Yield the rows of ``to_csv``, the one with the names of its columns first."""
    yield ("section", "name", "metric", "value")
    yield from _long_form(to_data(report))


def to_data(report: Report) -> dict[str, Any]:
    """Return the report as plain values. New keys may come; those that are here stay."""
    span, total = report.span, report.total
    return {
        "since": report.since.isoformat(),
        "until": report.until.isoformat(),
        "time_zone": report.time_zone,
        "feature": None if report.feature == SITE else report.feature,
        "model": span.model or None,
        "user_id": None if span.user_id is None else str(span.user_id),
        "tag": None if span.tag is None else "=".join(span.tag),
        "total": {
            "spend_usd": exact(total.spend_nanousd),
            "estimated_usd": exact(total.estimated_nanousd),
            "held_usd": exact(total.held_nanousd),
            "budget_usd": exact(total.budget_nanousd),
            "budget_used_percent": _decimal(total.budget_used),
            "plan_usd": exact(total.plan_nanousd),
            "plan_used_percent": _decimal(total.plan_used),
            "over_plan": total.is_over_plan,
            "calls": total.calls,
            "attempts": total.attempts,
            "in_flight": total.in_flight,
            "cached": total.cached,
            "looked_up": total.looked_up,
            "hit_rate_percent": _decimal(total.hit_rate),
            "saved_usd": exact(total.saved_nanousd),
            "refused": total.refused,
            "active_users": total.active_users,
            "cost_per_active_user_usd": exact(total.cost_per_active_user_nanousd),
        },
        "comparison": _comparison(report.comparison),
        "forecast": None if report.forecast is None else _forecast(report.forecast),
        "attention": [_concern(it) for it in report.attention],
        "categories": [{"category": it.category, **_part(it)} for it in report.categories],
        "features": [
            {"feature": it.feature, "worth_caching": not it.caching.is_worthless, **_part(it)}
            for it in report.features
        ],
        "weeks": [week for it in report.weeks for week in _weeks(it)],
        "forecasts": [_forecast(it) for it in report.forecasts],
        "users": [
            {
                "user": it.label,
                "user_id": str(it.user_id),
                "deleted": it.deleted,
                "calls": it.calls,
                "spend_usd": exact(it.spend_nanousd),
            }
            for it in report.users
        ],
        "subjects": [
            {"subject": it.subject, "calls": it.calls, "spend_usd": exact(it.spend_nanousd)}
            for it in report.subjects
        ],
        "models": [_model(it) for it in report.models],
        "refusals": [{"feature": it.feature, "refused": it.refused} for it in report.refusals],
        "downgrades": [
            {
                "feature": it.feature,
                "requested_model": it.requested_model,
                "model": it.model,
                "calls": it.calls,
                "spend_usd": exact(it.spend_nanousd),
            }
            for it in report.downgrades
        ],
        "savings": [
            {"lever": it.lever, "calls": it.calls, "saved_usd": exact(it.saved_nanousd)}
            for it in report.savings
        ],
        "changes": [_change(it) for it in report.comparison.features],
    }


def exact(nanousd: int | None) -> str | None:
    """Return dollars to the nano-dollar, as a decimal."""
    return None if nanousd is None else format(money.to_usd(nanousd), "f")


def _part(it: FeatureSpend | CategorySpend) -> dict[str, Any]:
    return {
        "spend_usd": exact(it.spend_nanousd),
        "share_percent": _decimal(it.share),
        "held_usd": exact(it.held_nanousd),
        "calls": it.calls,
        "in_flight": it.in_flight,
        "cached": it.cached,
        "looked_up": it.looked_up,
        "hit_rate_percent": _decimal(it.hit_rate),
        "saved_usd": exact(it.saved_nanousd),
        "budget_usd": exact(it.budget_nanousd),
        "budget_used_percent": _decimal(it.budget_used),
        "plan_usd": exact(it.plan_nanousd),
        "plan_used_percent": _decimal(it.plan_used),
        "over_plan": it.is_over_plan,
        "downgraded": it.downgraded,
        "refused": it.refused,
    }


def _model(it: ModelSpend) -> dict[str, Any]:
    return {
        "model": it.model,
        "calls": it.calls,
        "average_prompt_tokens": it.average_prompt_tokens,
        "average_output_tokens": it.average_output_tokens,
        "average_cost_usd": exact(it.average_cost_nanousd),
        "cost_per_1000_output_tokens_usd": exact(it.cost_per_1000_output_nanousd),
        "cache_read_percent": _decimal(it.cache_read_share),
        "spend_usd": exact(it.spend_nanousd),
        "share_percent": _decimal(it.share),
    }


def _comparison(it: Comparison) -> dict[str, Any]:
    return {
        "since": it.since.isoformat(),
        "until": it.until.isoformat(),
        "same_days": it.same_days,
        "calls": it.calls,
        "calls_before": it.calls_before,
        **{key: value for key, value in _change(it.total).items() if key != "feature"},
    }


def _change(it: Change) -> dict[str, Any]:
    return {
        "feature": it.name,
        "spend_usd": exact(it.spend_nanousd),
        "before_usd": exact(it.before_nanousd),
        "difference_usd": exact(it.difference_nanousd),
        "change_percent": _decimal(it.change),
    }


def _forecast(it: Forecast) -> dict[str, Any]:
    return {
        "budget": it.name,
        "spent_usd": exact(it.spent_nanousd),
        "forecast_usd": exact(it.forecast_nanousd),
        "limit_usd": exact(it.budget_nanousd),
        "limit_used_percent": _decimal(it.budget_used),
        "plan_usd": exact(it.plan_nanousd),
        "plan_used_percent": _decimal(it.plan_used),
    }


def _weeks(pace: BudgetPace) -> Iterator[dict[str, Any]]:
    for it in pace.weeks:
        yield {
            "budget": pace.name,
            "since": it.since.isoformat(),
            "until": it.until.isoformat(),
            "against": pace.against.value,
            "running": it.running,
            "spend_usd": exact(it.spend_nanousd),
            "expected_usd": exact(it.expected_nanousd),
            "used_percent": _decimal(it.used),
            "pace": it.pace.value,
        }


def _concern(it: Concern) -> dict[str, Any]:
    """Return a concern's figures by name, and the sentence that is made of them."""
    figures: dict[str, Any] = {}
    for field in fields(it):
        value = getattr(it, field.name)
        if field.name.endswith("_nanousd"):
            figures[field.name.replace("_nanousd", "_usd")] = exact(value)
        elif field.name not in ("feature", "model"):
            figures[field.name] = value.isoformat() if isinstance(value, datetime) else value
    return {
        "kind": it.kind,
        "feature": it.feature or None,
        "model": it.model or None,
        **figures,
        "text": sentence(it),
    }


def _decimal(value: Decimal | None) -> str | None:
    return None if value is None else format(value, "f")


# What names a row of each section; its other keys are metrics.
_NAMED_BY: Mapping[str, tuple[str, ...]] = {
    "attention": ("kind", "feature", "model"),
    "categories": ("category",),
    "features": ("feature",),
    "weeks": ("budget", "since"),
    "forecasts": ("budget",),
    "users": ("user",),
    "subjects": ("subject",),
    "models": ("model",),
    "refusals": ("feature",),
    "downgrades": ("feature", "requested_model", "model"),
    "savings": ("lever",),
    "changes": ("feature",),
}


def _long_form(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    for key in ("since", "until", "time_zone", "feature", "model", "user_id", "tag"):
        yield "report", "", key, data[key]
    for section in ("total", "comparison", "forecast"):
        for metric, value in (data[section] or {}).items():
            yield section, "", metric, value
    for section, columns in _NAMED_BY.items():
        for row in data[section]:
            name = " > ".join(row[column] for column in columns if row[column] is not None)
            for metric, value in row.items():
                if metric not in columns:
                    yield section, name, metric, value
