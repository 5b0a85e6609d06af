"""``manage.py cost_estimate``: what a feature would cost, before it is built."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from django.core.management.base import CommandParser

from ai_budget import money
from ai_budget.exceptions import UnpricedModel
from ai_budget.management.plain import PlainCommand, WrongArgument
from ai_budget.pricing.monthly import (
    RECONSIDER_NANOUSD,
    Lever,
    MonthlyEstimate,
    estimate_monthly,
    read_share,
)


class Command(PlainCommand):
    """Prints the estimate on stdout. Arguments that make no sense: one line on stderr, exit 2."""

    help = (
        "Show what a feature would cost a call, a day and a month, and what each lever would save. "
        "Spends nothing."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        # Values are checked in `handle`, where those that call_command passes arrive too.
        parser.add_argument("--model", metavar="MODEL", required=True, help="the model's name")
        parser.add_argument(
            "--calls-per-day", metavar="N", required=True, help="calls a day, cached ones included"
        )
        parser.add_argument(
            "--input-tokens", metavar="N", required=True, help="tokens of a whole prompt"
        )
        parser.add_argument(
            "--output-tokens", metavar="N", required=True, help="tokens of an answer"
        )
        parser.add_argument(
            "--cache-hit-rate",
            default="0",
            metavar="SHARE",
            help="calls that the response cache answers, such as 0.3 or 30%%; default: none",
        )
        parser.add_argument(
            "--cached-prefix",
            default=0,
            metavar="N",
            help="tokens of the prompt's repeated beginning, for the prompt cache; default: none",
        )
        parser.add_argument(
            "--batch", action="store_true", help="send the calls as batches, at half the price"
        )
        parser.add_argument("--days", default=30, metavar="N", help="days of a month; default: 30")
        parser.add_argument(
            "--format", default="table", metavar="FORMAT", help=f"{_formats()}; default: table"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            render = _renderer(options["format"])
            estimate = _estimate(options)
        except WrongArgument as error:
            self.fail(str(error))
        self.write(render(estimate))


def _estimate(options: Mapping[str, Any]) -> MonthlyEstimate:
    try:
        return estimate_monthly(
            str(options["model"]),
            calls_per_day=_count("--calls-per-day", options["calls_per_day"]),
            input_tokens=_count("--input-tokens", options["input_tokens"]),
            output_tokens=_count("--output-tokens", options["output_tokens"]),
            cache_hit_rate=_share("--cache-hit-rate", options["cache_hit_rate"]),
            cached_prefix_tokens=_count("--cached-prefix", options["cached_prefix"]),
            batch=bool(options["batch"]),
            days=_count("--days", options["days"]),
        )
    except (ValueError, UnpricedModel) as error:
        raise WrongArgument(str(error)) from None


def _count(option: str, value: Any) -> int:
    if re.fullmatch(r"[+-]?[0-9]{1,18}", str(value)) and not isinstance(value, bool):
        return int(value)
    raise WrongArgument(f"{option} must be a whole number, not {value!r}")


def _share(option: str, value: Any) -> Fraction:
    try:
        # A program may pass a float: its text is what was meant.
        return read_share(str(value) if isinstance(value, float) else value)
    except (TypeError, ValueError):
        raise WrongArgument(f"{option} must be a share such as 0.3 or 30%, not {value!r}") from None


def _renderer(name: str) -> Callable[[MonthlyEstimate], str]:
    try:
        return RENDERERS[name]
    except KeyError:
        raise WrongArgument(f"--format must be {_formats()}, not {name!r}") from None


def _formats() -> str:
    return " or ".join(RENDERERS)


# For programs ------------------------------------------------------------------------------------


def to_json(estimate: MonthlyEstimate) -> str:
    """Return the estimate as one JSON object, dollars and percentages as decimal strings."""
    best = estimate.best_lever
    data = {
        "model": estimate.model,
        "calls_per_day": estimate.calls_per_day,
        "input_tokens": estimate.input_tokens,
        "output_tokens": estimate.output_tokens,
        "cache_hit_rate": _exact(estimate.cache_hit_rate),
        "cached_prefix_tokens": estimate.cached_prefix_tokens,
        "prompt_cache": estimate.prompt_cache,
        "batch": estimate.batch,
        "days": estimate.days,
        "per_call_usd": _exact(estimate.per_call),
        "per_day_usd": _exact(estimate.per_day),
        "per_month_usd": _exact(estimate.per_month),
        "levers": [
            {
                "lever": lever.name,
                "detail": lever.detail,
                "used": lever.used,
                "per_month_usd": _exact(lever.per_month),
                "saving_usd": _exact(lever.saving),
                "saving_percent": _exact(lever.saving_percent),
            }
            for lever in estimate.levers
        ],
        "reconsider": estimate.reconsider,
        "best_lever": None if best is None else {"lever": best.name, "detail": best.detail},
    }
    return json.dumps(data, indent=2) + "\n"


def _exact(value: Decimal) -> str:
    return format(value, "f")


# For people --------------------------------------------------------------------------------------

_NAMES = {
    "response_cache": "response cache",
    "prompt_cache": "prompt cache",
    "batch": "batch",
    "model": "cheaper model",
    "output": "shorter answers",
}


def to_table(estimate: MonthlyEstimate) -> str:
    """Return the estimate as aligned columns that fit a terminal of a hundred."""
    used = [lever for lever in estimate.levers if lever.used]
    left = [lever for lever in estimate.levers if not lever.used]
    blocks = [_title(estimate), _bill(estimate)]
    blocks += [_drawn("In use", used)] if used else []
    blocks += [_drawn("What would lower it, each alone", left)] if left else []
    if any(lever.name == "prompt_cache" for lever in estimate.levers):
        blocks.append(
            "The prompt cache is reckoned for calls that share one prefix and come at random, day\n"
            "and night. Calls that come in a crowd read it more often."
        )
    blocks += [_advice(estimate)] if estimate.reconsider else []
    return "\n\n".join(blocks) + "\n"


def _title(estimate: MonthlyEstimate) -> str:
    title = (
        f"{estimate.model}: {estimate.calls_per_day:,} calls a day, "
        f"{estimate.input_tokens:,} tokens in and {estimate.output_tokens:,} out"
    )
    return f"{title}\n{'=' * len(title)}"


def _bill(estimate: MonthlyEstimate) -> str:
    days = "1 day" if estimate.days == 1 else f"{estimate.days} days"
    rows = [
        ("Per call", money.format_usd(estimate.per_call_nanousd, decimals=6)),
        ("Per day", money.format_usd(estimate.per_day_nanousd)),
        ("Per month", f"{money.format_usd(estimate.per_month_nanousd)} ({days})"),
    ]
    return "\n".join(f"{label:<14}{value}" for label, value in rows)


def _drawn(title: str, levers: Sequence[Lever]) -> str:
    headings = ["Lever", "How", "Month", "Saves", ""]
    lines = [headings, *(_row(lever) for lever in levers)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join([title, *(_aligned(line, widths) for line in lines)])


def _row(lever: Lever) -> list[str]:
    return [
        _NAMES[lever.name],
        lever.detail,
        money.format_usd(lever.per_month_nanousd),
        money.format_usd(lever.saving_nanousd),
        f"{lever.saving_percent} %",
    ]


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = zip(line, widths, strict=True)
    padded = [
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(cells)
    ]
    return ("  " + "  ".join(padded)).rstrip()


def _advice(estimate: MonthlyEstimate) -> str:
    limit = money.format_usd(RECONSIDER_NANOUSD, decimals=0)
    advice = f"This is above {limit} a month: reconsider before you build it."
    best = estimate.best_lever
    if best is None:
        return f"{advice} No lever is left that would lower it: make fewer calls, or shorter ones."
    saving = money.format_usd(best.saving_nanousd)
    return (
        f"{advice}\nWhat would help most: {_NAMES[best.name]} ({best.detail}), which saves "
        f"{saving} a month."
    )


RENDERERS: Mapping[str, Callable[[MonthlyEstimate], str]] = {"table": to_table, "json": to_json}
"""The renderer of each format."""
