"""A cost report as text: tables for people, JSON and CSV for programs, and files to hand on.

Pure functions of the report. JSON and CSV carry exact dollars as decimal strings and keep their
keys; what is for people rounds, and speaks the language that is active. Names come from users:
tables show no control characters, CSV cells can be no formulas, and markup is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ai_budget.review.render.data import csv_lines, csv_rows, to_csv, to_data, to_json
from ai_budget.review.render.html import to_html
from ai_budget.review.render.markdown import to_markdown
from ai_budget.review.render.table import to_table
from ai_budget.review.report import Report

__all__ = [
    "RENDERERS",
    "csv_lines",
    "csv_rows",
    "to_csv",
    "to_data",
    "to_html",
    "to_json",
    "to_markdown",
    "to_table",
]


def _whole(renderer: Callable[[Report], str]) -> Callable[[Report], Iterable[str]]:
    return lambda report: (renderer(report),)


RENDERERS: Mapping[str, Callable[[Report], Iterable[str]]] = {
    "table": _whole(to_table),
    "json": _whole(to_json),
    "csv": csv_lines,
    "markdown": _whole(to_markdown),
    "html": _whole(to_html),
}
"""The renderer of each format, which gives its text in pieces."""
