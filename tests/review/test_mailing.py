"""The monthly report, as a task and as a message."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import django
import pytest
from django.core.mail import EmailMessage
from django.utils import translation
from pytest_django.fixtures import Settings

from ai_budget.review.mailing import message_of
from ai_budget.review.notifiers import admins
from ai_budget.review.report import cost_report
from ai_budget.review.spans import Span
from tests.factories import CallLogFactory
from tests.review.test_render import FULL

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def english() -> Iterator[None]:
    with translation.override("en"):
        yield


def test_a_message_has_the_table_and_the_page() -> None:
    message = message_of(FULL, to=["anna@example.com"])

    assert message.subject == "AI spend in 2026-10 (UTC)"
    assert message.body.startswith("AI spend in 2026-10 (UTC)\n====")
    ((name, page, kind),) = message.attachments
    assert (name, kind) == ("ai-spend-2026-10-01.html", "text/html")
    assert "<h2>By feature</h2>" in str(page)


def test_a_name_breaks_no_header(october: Span) -> None:
    CallLogFactory.create(tags={"a": "b\nBcc: x@example.com"})
    span = Span(since=october.since, until=october.until, tag=("a", "b\nBcc: x@example.com"))

    message = message_of(cost_report(span), to=["anna@example.com"])

    assert "\n" not in message.subject
    assert message.message()["Bcc"] is None


def test_the_addresses_of_admins(settings: Settings) -> None:
    settings.ADMINS = []
    assert admins() == []
    settings.ADMINS = [("Anna", "anna@example.com"), "ben@example.com"]
    assert admins() == ["anna@example.com", "ben@example.com"]


def test_the_task_sends_last_month_to_admins(
    settings: Settings, mailoutbox: list[EmailMessage], capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = _tasks()
    backend = "django.core.mail.backends.locmem.EmailBackend"
    settings.MAILERS = {"default": {"BACKEND": backend}}  # Django 6.1 and later
    pairs: list[Any] = [("Anna", "anna@example.com")]
    settings.ADMINS = pairs if django.VERSION < (6, 0) else ["anna@example.com"]
    CallLogFactory.create(reserved_at=datetime(2026, 9, 3, tzinfo=UTC), cost_nanousd=5 * 10**9)
    CallLogFactory.create(cost_nanousd=7 * 10**9)

    tasks.monthly_report()

    (message,) = mailoutbox
    assert message.to == ["anna@example.com"]
    assert message.subject == "AI spend in 2026-09 (UTC)"
    assert "Spend         $5.00\n" in message.body
    assert capsys.readouterr().out == ""


def test_without_admins_the_task_says_so(
    settings: Settings, mailoutbox: list[EmailMessage], caplog: pytest.LogCaptureFixture
) -> None:
    tasks = _tasks()
    settings.ADMINS = []

    tasks.monthly_report()

    assert mailoutbox == []
    assert "Nobody is in ADMINS" in caplog.text


def test_beat_knows_the_task_by_its_name() -> None:
    assert _tasks().monthly_report.name == "ai_budget.monthly_report"


def _tasks() -> Any:
    pytest.importorskip("celery")
    from ai_budget import tasks

    return tasks
