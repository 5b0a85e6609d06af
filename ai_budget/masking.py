"""Settings that may be secret mask themselves, wherever they are shown.

Django masks a setting by its own key and the keys of the dicts in it: of ``AI_BUDGET`` it would
show the address of a webhook and the password of a Redis. So the texts themselves are replaced by
ones that are the same to all code, and show stars in reports of errors and in ``diffsettings``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from django.conf import settings as django_settings

SHOWN = frozenset(
    {
        "TIERS",
        "DEFAULT_MODEL",
        "DEFAULT_FEATURE",
        "UNKNOWN_FEATURE",
        "DAILY_LIMIT_USD",
        "MONTHLY_LIMIT_USD",
        "TIME_ZONE",
        "INFERENCE_GEO",
        "CACHE_ALIAS",
        "CACHE_STOP_REASONS",
        "LEDGER",
        "LEDGER_DATABASE",
        "ON_LEDGER_FAILURE",
        "UNPRICED_MODEL",
        "QUEUE",
        "BACKEND",
    }
)
"""Keys whose texts are no secrets: all others may be, a misspelt one too."""


_PATH = re.compile(r"[a-z_]\w*(?:\.[A-Za-z_]\w*)+")
"""The dotted path of a notifier, which a misspelt one has to be found by."""


class Masked(str):
    """A text that shows nothing of itself but in use."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'********************'"


def masked(value: Any) -> Any:
    """Return a value with all texts in it masked, but for those of keys that are no secrets."""
    if isinstance(value, str):
        return value if _PATH.fullmatch(value) else Masked(value)
    if isinstance(value, Mapping):
        return {key: inner if key in SHOWN else masked(inner) for key, inner in dict(value).items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(masked(inner) for inner in value)
    return value


def mask_settings(**kwargs: Any) -> None:
    """Mask ``AI_BUDGET`` as Django has it now; connected to ``setting_changed``, too."""
    if kwargs.get("setting", "AI_BUDGET") != "AI_BUDGET":
        return
    given = getattr(django_settings, "AI_BUDGET", None)
    if isinstance(given, Mapping):
        django_settings.AI_BUDGET = masked(given)
