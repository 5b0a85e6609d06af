"""The one setting, ``AI_BUDGET``: a dict, read live, every key typed and documented here.

Nothing is copied at import, so ``override_settings`` works. Reading a key never validates it:
``ai_budget.checks`` does that once, at start, with a hint for each mistake.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Any, cast
from zoneinfo import ZoneInfo

from django.conf import settings as django_settings

DEFAULTS: Mapping[str, Any] = {
    "API_KEY": None,
    "BASE_URL": None,
    "TIERS": ("claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5"),
    "DEFAULT_MODEL": "claude-haiku-5-5",
    "DEFAULT_MAX_TOKENS": 1024,
    "DEFAULT_FEATURE": "default",
    "UNKNOWN_FEATURE": "create",
    "DAILY_LIMIT_USD": Decimal(10),
    "MONTHLY_LIMIT_USD": Decimal(100),
    "TIME_ZONE": None,
    "INFERENCE_GEO": None,
    "ROUTING_LENGTHS": (1_000, 8_000),
    "CACHE_ALIAS": "default",
    "CACHE_STOP_REASONS": ("end_turn", "stop_sequence"),
    "CACHE_COMPRESS_ABOVE": None,
    "LEDGER": "ai_budget.ledger.database.DatabaseLedger",
    "LEDGER_DATABASE": "default",
    "LEDGER_REDIS_URL": None,
    "ON_LEDGER_FAILURE": "refuse",
    "UNPRICED_MODEL": "refuse",
    "QUEUE": "tick",
    "LOG_PROMPTS": False,
    "LOG_PROMPTS_DAYS": 30,
    "NOTIFIERS": ("ai_budget.review.notifiers.Email",),
    "ALERT_THRESHOLDS": (50, 80, 100, 120),
}


class Settings:
    """Django's ``AI_BUDGET`` with its defaults, one property a key."""

    def __init__(self) -> None:
        self._defaults = DEFAULTS

    @contextmanager
    def default(self, **values: Any) -> Iterator[None]:
        """Give keys another default inside the block, for tests that set but some of them."""
        before, self._defaults = self._defaults, {**self._defaults, **values}
        try:
            yield
        finally:
            self._defaults = before

    @property
    def given(self) -> Mapping[str, Any]:
        """The dict as the project wrote it."""
        return cast("Mapping[str, Any]", getattr(django_settings, "AI_BUDGET", {}))

    def _get(self, key: str) -> Any:
        given = self.given
        return given[key] if key in given else self._defaults[key]

    @property
    def API_KEY(self) -> str | None:
        """The key of the Anthropic API. Default: the environment's ANTHROPIC_API_KEY."""
        return cast("str | None", self._get("API_KEY") or os.environ.get("ANTHROPIC_API_KEY"))

    @property
    def BASE_URL(self) -> str | None:
        """Where the API is; None for api.anthropic.com."""
        return cast("str | None", self._get("BASE_URL"))

    @property
    def TIERS(self) -> Sequence[str]:
        """Models that routing chooses from, the cheapest first."""
        return cast("Sequence[str]", self._get("TIERS"))

    @property
    def DEFAULT_MODEL(self) -> str:
        """The model of features that name none."""
        return cast(str, self._get("DEFAULT_MODEL"))

    @property
    def DEFAULT_MAX_TOKENS(self) -> int:
        """The cap on output tokens of features that name none."""
        return cast(int, self._get("DEFAULT_MAX_TOKENS"))

    @property
    def DEFAULT_FEATURE(self) -> str:
        """The feature that calls outside any charge are booked to."""
        return cast(str, self._get("DEFAULT_FEATURE"))

    @property
    def UNKNOWN_FEATURE(self) -> str:
        """ "create" a budget with the defaults for a new feature name, or "refuse" its calls."""
        return cast(str, self._get("UNKNOWN_FEATURE"))

    @property
    def DAILY_LIMIT_USD(self) -> Decimal | int | str | None:
        """The site's daily limit where the budget "*" sets none; None for no limit."""
        return cast("Decimal | int | str | None", self._get("DAILY_LIMIT_USD"))

    @property
    def MONTHLY_LIMIT_USD(self) -> Decimal | int | str | None:
        """The site's monthly limit where the budget "*" sets none; None for no limit."""
        return cast("Decimal | int | str | None", self._get("MONTHLY_LIMIT_USD"))

    @property
    def TIME_ZONE(self) -> ZoneInfo:
        """The zone whose days and months limits count in. Default: Django's TIME_ZONE."""
        return ZoneInfo(self._get("TIME_ZONE") or django_settings.TIME_ZONE)

    @property
    def INFERENCE_GEO(self) -> str | None:
        """The workspace's default inference geography, "us" or "global".

        Where it is not declared, calls that name none are reserved at the dearer.
        """
        return cast("str | None", self._get("INFERENCE_GEO"))

    @property
    def ROUTING_LENGTHS(self) -> Sequence[int]:
        """Tokens of a prompt up to which each of TIERS answers, where routing is by length.

        The messages' tokens; system prompt and tools do not count. What is longer than all of
        them goes to the feature's own model.
        """
        return cast("Sequence[int]", self._get("ROUTING_LENGTHS"))

    @property
    def CACHE_ALIAS(self) -> str:
        """Django's cache that answers are kept in."""
        return cast(str, self._get("CACHE_ALIAS"))

    @property
    def CACHE_STOP_REASONS(self) -> Sequence[str]:
        """How an answer has to end to be kept: whole, by default.

        Add "max_tokens" for answers that were cut, "tool_use" for calls of tools, "refusal".
        """
        return cast("Sequence[str]", self._get("CACHE_STOP_REASONS"))

    @property
    def CACHE_COMPRESS_ABOVE(self) -> int | None:
        """Bytes from which on an answer is compressed before it is kept; None for never."""
        return cast("int | None", self._get("CACHE_COMPRESS_ABOVE"))

    @property
    def LEDGER(self) -> str:
        """The dotted path of the ledger."""
        return cast(str, self._get("LEDGER"))

    @property
    def LEDGER_DATABASE(self) -> str:
        """The database alias that the ledger writes through.

        A second alias of the same database keeps the record of a spend when the caller's
        transaction rolls back. Not on SQLite, where it would lock against the first.
        """
        return cast(str, self._get("LEDGER_DATABASE"))

    @property
    def LEDGER_REDIS_URL(self) -> str | None:
        """The Redis of the Redis ledger, where it is not the one of Django's cache.

        A server or a cluster; ``redis://``, ``rediss://``, ``unix://`` or ``valkey://``.
        """
        return cast("str | None", self._get("LEDGER_REDIS_URL"))

    @property
    def ON_LEDGER_FAILURE(self) -> str:
        """ "refuse" calls while Redis does not answer, or "allow" them, outside any promise.

        The same holds while balances are filled from the journal for longer than some seconds.
        What is let through is written to the journal, and counted when Redis is back. Views
        that are ``limited`` are let through whenever the ledger does not answer.
        """
        return cast(str, self._get("ON_LEDGER_FAILURE"))

    @property
    def UNPRICED_MODEL(self) -> str:
        """ "refuse" models without a known price, or "allow" them at the dearest known rate."""
        return cast(str, self._get("UNPRICED_MODEL"))

    @property
    def QUEUE(self) -> str:
        """Who sends batches and reads their results: "tick" (``ai_budget_tick``) or "celery"."""
        return cast(str, self._get("QUEUE"))

    @property
    def LOG_PROMPTS(self) -> bool:
        """Whether to keep the text of prompts and answers: those of batches, for now.

        What a batch is to send is kept until it is answered, whatever this says.
        """
        return cast(bool, self._get("LOG_PROMPTS"))

    @property
    def LOG_PROMPTS_DAYS(self) -> int:
        """For how many days texts are kept, and the requests of a batch that failed."""
        return cast(int, self._get("LOG_PROMPTS_DAYS"))

    @property
    def NOTIFIERS(self) -> Sequence[str | Mapping[str, Any]]:
        """Who delivers alerts: dotted paths of functions or classes that are called with one.

        Or dicts with such a path as BACKEND, and OPTIONS: keywords that it is given, too. An
        empty list delivers none; ``alert_raised`` is sent all the same.
        """
        return cast("Sequence[str | Mapping[str, Any]]", self._get("NOTIFIERS"))

    @property
    def ALERT_THRESHOLDS(self) -> Sequence[int]:
        """Percents of a plan or limit at which an alert is due; of a limit, those up to 100."""
        return cast("Sequence[int]", self._get("ALERT_THRESHOLDS"))


conf = Settings()
