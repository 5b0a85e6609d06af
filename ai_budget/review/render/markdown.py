"""A cost report as Markdown, for a ticket, a wiki or a merge request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from django.utils.translation import gettext as _

from ai_budget.review.render.sections import Section, nothing, sections, summary, title_of
from ai_budget.review.report import Report
from ai_budget.review.wording import sentence

_SPECIAL = re.compile(r"([\\`*_\[\]|~#<>])")
_SPACE = re.compile(r"\s+")


def to_markdown(report: Report) -> str:
    """Return the report with a heading and a table for each section."""
    if report.is_empty:
        return f"{_escaped(nothing(report))}\n"
    blocks = [f"# {_escaped(title_of(report))}", _table(["", ""], summary(report), names=1)]
    if report.attention:
        items = "\n".join(f"- {_escaped(sentence(it))}" for it in report.attention)
        blocks.append(f"## {_('Needs attention')}\n\n{items}")
    blocks += ["\n\n".join(_section(section)) for section in sections(report)]
    return "\n\n".join(blocks) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## {_escaped(section.title)}"
    yield _table(section.headings, section.rows, names=section.names)
    if section.note:
        yield _escaped(section.note)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, names: int) -> str:
    edges = ["---" if index < names else "---:" for index in range(len(headings))]
    return "\n".join(
        [_row(map(_escaped, headings)), _row(edges), *(_row(map(_escaped, row)) for row in rows)]
    )


def _row(cells: Sequence[str] | Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Keep a text from being read as markup, and on one line."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    plain = _SPACE.sub(" ", shown).strip().replace("&", "&amp;")
    return _SPECIAL.sub(r"\\\1", plain)
