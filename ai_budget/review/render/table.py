"""A cost report as aligned columns, for a terminal."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence

from django.utils.translation import gettext as _

from ai_budget.review.render.sections import Section, nothing, sections, summary, title_of
from ai_budget.review.report import Report
from ai_budget.review.wording import sentence

_WIDTH = 100
_WIDEST = 32
_WIDEST_OF = {2: 22, 3: 26}
_BESIDE_MANY = 24
_MANY = 8


def to_table(report: Report) -> str:
    """Return the report as aligned columns that fit a terminal of a hundred."""
    if report.is_empty:
        return f"{_shown(nothing(report))}\n"
    title = _shown(title_of(report))
    blocks = [f"{title}\n{'=' * _width(title)}", _summary(report)]
    if report.attention:
        blocks.append(_attention(report))
    blocks += [_drawn(section) for section in sections(report)]
    return "\n\n".join(blocks) + "\n"


def _summary(report: Report) -> str:
    rows = summary(report)
    width = max(14, *(_width(label) + 2 for label, _value in rows))
    return "\n".join(f"{label}{' ' * (width - _width(label))}{value}" for label, value in rows)


def _attention(report: Report) -> str:
    lines = [_("Needs attention")]
    for concern in report.attention:
        lines += textwrap.wrap(
            _shown(sentence(concern)), _WIDTH, initial_indent="  - ", subsequent_indent="    "
        )
    return "\n".join(lines)


def _drawn(section: Section) -> str:
    widest = _BESIDE_MANY if len(section.headings) > _MANY else _WIDEST
    widest = _WIDEST_OF.get(section.names, widest)
    rows = [
        [*(_fitted(name, widest) for name in row[: section.names]), *row[section.names :]]
        for row in section.rows
    ]
    lines = [list(section.headings), *rows]
    widths = [max(_width(cell) for cell in column) for column in zip(*lines, strict=True)]
    drawn = [section.title, *(_aligned(line, widths, section.names) for line in lines)]
    if section.note:
        drawn += textwrap.wrap(section.note, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(drawn)


def _aligned(line: Sequence[str], widths: Sequence[int], names: int) -> str:
    text = ""
    for index, (cell, width) in enumerate(zip(line, widths, strict=True)):
        padding = " " * (width - _width(cell))
        text += "  " + (cell + padding if index < names else padding + cell)
    return text.rstrip()


def _fitted(name: str, widest: int) -> str:
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
