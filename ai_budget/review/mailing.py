"""A report as an e-mail: what a terminal shows as its text, and a page with charts beside it."""

from __future__ import annotations

from collections.abc import Sequence

from django.core.mail import EmailMessage

from ai_budget.review.render.html import to_html
from ai_budget.review.render.sections import title_of
from ai_budget.review.render.table import to_table
from ai_budget.review.report import Report


def message_of(report: Report, *, to: Sequence[str]) -> EmailMessage:
    """Return a report as a message, not sent yet.

    The page is a file beside the text: few programs for mail show charts inside of it.
    """
    message = EmailMessage(subject=" ".join(title_of(report).split()), body=to_table(report), to=to)
    message.attach(f"ai-spend-{_stretch(report)}.html", to_html(report), "text/html")
    return message


def _stretch(report: Report) -> str:
    return f"{report.since:%Y-%m-%d}"
