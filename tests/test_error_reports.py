"""Django's reports of an error show neither secrets of the settings nor prompts in our frames."""

from __future__ import annotations

import asyncio
import io
import sys
from typing import Any

import django
import pytest
from django.conf import settings as django_settings
from django.core import mail
from django.core.management import call_command
from django.test import AsyncRequestFactory, Client, RequestFactory, override_settings
from django.urls import path
from django.views.debug import ExceptionReporter
from pytest_django import Settings

import ai_budget
from ai_budget.conf import conf
from ai_budget.masking import Masked
from ai_budget.testing import AnthropicSimulator, Fail
from tests import urls as urls_of_the_suite

pytestmark = pytest.mark.django_db

SECRETS = {
    "API_KEY": "sk-ant-secret",
    "BASE_URL": "http://someone:basepassword@127.0.0.1:9",
    "LEDGER_REDIS_URL": "redis://:hunter2@127.0.0.1:9/0",
    "NOTIFIERS": [
        "ai_budget.review.notifiers.Email",
        {
            "BACKEND": "ai_budget.review.notifiers.Slack",
            "OPTIONS": {"url": "https://hooks.example/T0/B0/slacksecret"},
        },
        {
            "BACKEND": "ai_budget.review.notifiers.Webhook",
            "OPTIONS": {
                "url": "https://alerts.example/?token=querysecret",
                "headers": {"X-Own": "headersecret"},
            },
        },
    ],
    "MISSPELT": ("tuplesecret", {"deep": ["listsecret"]}),
}
WORDS = [
    *("sk-ant-secret", "basepassword", "hunter2", "slacksecret", "querysecret", "headersecret"),
    *("tuplesecret", "listsecret"),
]
PROMPT = "The diagnosis of Mrs. Miller"
MODEL = "claude-haiku-5-5"


def failing(request: Any) -> Any:
    given = conf.NOTIFIERS, conf.API_KEY, conf.LEDGER_REDIS_URL
    raise RuntimeError(f"{len(given)} values are in this frame")


def asking(request: Any) -> Any:
    ai_budget.ask(PROMPT, feature="chat", system=[{"type": "text", "text": PROMPT}])


urlpatterns = [path("failing/", failing), path("asking/", asking), *urls_of_the_suite.urlpatterns]


@pytest.fixture
def secrets(settings: Settings) -> None:
    # Django 5.2 takes pairs alone, 6.0 calls them outdated.
    settings.ADMINS = [("ops", "ops@example.com")] if django.VERSION < (6,) else ["ops@example.com"]
    settings.MAILERS = {"default": {"BACKEND": "django.core.mail.backends.locmem.EmailBackend"}}
    settings.ROOT_URLCONF = __name__
    settings.AI_BUDGET = {**settings.AI_BUDGET, **SECRETS}


@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.usefixtures("secrets")
def test_no_report_of_a_failing_view_shows_a_secret(debug: bool) -> None:
    browser = Client(raise_request_exception=False)
    with override_settings(DEBUG=debug):
        page = browser.get("/failing/").content.decode()

    (mailed,) = mail.outbox or [mail.EmailMessage()]
    html = "".join(str(content) for content, _ in getattr(mailed, "alternatives", []))
    report = page if debug else mailed.body + html
    assert "RuntimeError" in report
    assert "ai_budget.review.notifiers.Slack" in report
    assert [word for word in WORDS if word in page + mailed.body + html] == []


@pytest.mark.usefixtures("secrets")
def test_neither_does_diffsettings() -> None:
    out = io.StringIO()
    call_command("diffsettings", all=True, stdout=out)

    assert "ai_budget.review.notifiers.Slack" in out.getvalue()
    assert [word for word in WORDS if word in out.getvalue()] == []


@pytest.mark.usefixtures("secrets")
def test_to_code_they_are_what_they_were() -> None:
    assert conf.API_KEY == "sk-ant-secret"
    assert f"{conf.LEDGER_REDIS_URL}" == SECRETS["LEDGER_REDIS_URL"]
    assert conf.NOTIFIERS[2]["OPTIONS"] == SECRETS["NOTIFIERS"][2]["OPTIONS"]  # type: ignore[index]
    assert isinstance(django_settings.AI_BUDGET["MISSPELT"], tuple)
    assert str(Masked("text")) == "text"


def report_of(ask: Any, factory: Any) -> str:
    """The reports of what it raises, as they are mailed: as text and as a page."""
    try:
        ask()
    except Exception:
        reporter = ExceptionReporter(factory.get("/"), *sys.exc_info())
        with override_settings(DEBUG=False):
            text, html = reporter.get_traceback_text(), reporter.get_traceback_html()
        assert "ai_budget/guard/" in html
        return text + html
    raise AssertionError("nothing was raised")


def frames_of_ours(html: str) -> str:
    """What is shown of the variables in frames of ai_budget's own functions."""
    frames = html.split('<li class="frame ')
    return "".join(frame for frame in frames[1:] if "/ai_budget/" in frame.split("<table")[0])


REFUSED: dict[str, Any] = {"feature": "chat", "max_tokens": "many"}


def test_a_refused_prompt_is_in_no_frame_of_ours(anthropic_api: AnthropicSimulator) -> None:
    report = report_of(lambda: ai_budget.ask(PROMPT, **REFUSED), RequestFactory())

    assert PROMPT not in report


def test_neither_is_one_that_the_api_fails_for(anthropic_api: AnthropicSimulator) -> None:
    anthropic_api.default = Fail(status=400)

    report = report_of(lambda: ai_budget.ask(PROMPT, feature="chat"), RequestFactory())

    assert PROMPT not in report


@pytest.mark.django_db(transaction=True)
def test_neither_is_one_of_an_async_call(anthropic_api: AnthropicSimulator) -> None:
    async def ask() -> None:
        await ai_budget.aask(PROMPT, **REFUSED)

    report = report_of(lambda: asyncio.run(ask()), AsyncRequestFactory())

    assert PROMPT not in frames_of_ours(report)
