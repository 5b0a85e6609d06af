"""Batches without Celery: neither installed nor asked for."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.management import call_command

from ai_budget.testing import AnthropicSimulator
from tests.batches.done import (
    assert_done_once,
    forget_handed,
    is_finished,
    make_due,
    status_of,
    submit,
)
from tests.run import ROOT

CELERY = ("celery", "kombu", "ai_budget.tasks")


@pytest.fixture
def no_celery(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have Celery not be installed."""
    for name in list(sys.modules):
        if name.startswith(CELERY):
            monkeypatch.delitem(sys.modules, name)
    for name in ("celery", "kombu"):
        monkeypatch.setitem(sys.modules, name, None)
    forget_handed()
    yield
    forget_handed()


@pytest.mark.django_db(transaction=True)
def test_the_tick_alone_does_all_of_it(no_celery: None, api: AnthropicSimulator) -> None:
    batch = submit()
    assert status_of(batch) == "waiting"

    call_command("ai_budget_tick")
    assert status_of(batch) == "sent"
    make_due()
    call_command("ai_budget_tick")

    assert is_finished(batch)
    assert_done_once(batch, api)


@pytest.mark.django_db(transaction=True)
def test_where_it_is_asked_for_and_missing_the_tick_does_it(
    no_celery: None,
    api: AnthropicSimulator,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "QUEUE": "celery"}

    with caplog.at_level(logging.ERROR, "ai_budget"):
        batch = submit()

    assert "ModuleNotFoundError" in caplog.text
    call_command("ai_budget_tick")
    assert status_of(batch) == "sent"


def test_a_site_that_does_not_ask_for_it_does_not_load_it() -> None:
    script = (
        "import django, sys; django.setup();"
        "import ai_budget.batches, ai_budget.admin;"
        f"print(sorted(name for name in sys.modules if name.startswith({CELERY!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == "[]"
