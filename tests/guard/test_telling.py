"""Listeners are told by whoever knows, and none of them changes anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.dispatch import Signal

import ai_budget
from ai_budget import signals
from ai_budget.guard.attempt import OpenAttempt
from ai_budget.guard.opening import Opening
from ai_budget.guard.telling import tell
from ai_budget.testing import AnthropicSimulator, override_budget

pytestmark = pytest.mark.django_db

LADDER = [(1, "claude-haiku-5-5")]


@pytest.fixture
def senders() -> Iterator[dict[Signal, list[Any]]]:
    """Who sent each of the guard's signals."""
    heard: dict[Signal, list[Any]] = {
        signals.call_settled: [],
        signals.call_refused: [],
        signals.call_downgraded: [],
    }

    def listen(signal: Signal, sender: Any, **kwargs: Any) -> None:
        heard[signal].append(sender)

    for signal in heard:
        signal.connect(listen)
    yield heard
    for signal in heard:
        signal.disconnect(listen)


def test_a_signal_names_what_sent_it(
    api: AnthropicSimulator, senders: dict[Signal, list[Any]]
) -> None:
    with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
        for _ in range(2):
            ai_budget.ask("Hello " * 4_000, feature="chat", model="claude-opus-5-5")
    with override_budget("chat", daily_limit_usd=0), pytest.raises(ai_budget.BudgetExceeded):
        ai_budget.ask("Hello", feature="chat")

    assert senders == {
        signals.call_settled: [OpenAttempt, OpenAttempt],
        signals.call_refused: [Opening],
        signals.call_downgraded: [OpenAttempt],
    }


def test_a_listeners_mistake_keeps_no_other_from_hearing(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []
    signal = Signal()

    def fail(**kwargs: Any) -> None:
        raise ValueError("hunter2")

    def listen(**kwargs: Any) -> None:
        heard.append(kwargs["word"])

    signal.connect(fail)
    signal.connect(listen)

    tell(signal, sender=Opening, word="hello")

    assert heard == ["hello"]
    (logged,) = [record.getMessage() for record in caplog.records if record.name == "ai_budget"]
    assert logged.endswith("failed: ValueError")
