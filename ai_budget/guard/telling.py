"""Telling listeners what became of a call, which none of them can change."""

from __future__ import annotations

import logging
from typing import Any

from django.dispatch import Signal

from ai_budget.guard.charge import outside_calls

log = logging.getLogger("ai_budget")


def tell(signal: Signal, *, sender: type[Any], **values: Any) -> None:
    """Tell who listens; a listener's mistake is logged and changes nothing.

    What a listener asks Claude itself is a call of its own.
    """
    with outside_calls():
        results = signal.send_robust(sender=sender, **values)
    for receiver, result in results:
        if isinstance(result, Exception):
            log.error("The receiver %r failed: %s", receiver, type(result).__name__)
