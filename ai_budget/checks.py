"""System checks: every mistake in the settings is named at start, with what to do about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from ai_budget import money
from ai_budget.conf import DEFAULTS, conf
from ai_budget.models.budgets import NAME_PATTERN
from ai_budget.review.notifiers import load
from ai_budget.scopes import SITE

_Check = Callable[[Any], bool]


def check_settings(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Report unknown keys and bad values of AI_BUDGET."""
    given = conf.given
    if not isinstance(given, dict):
        return [
            Error(
                "AI_BUDGET must be a dict.",
                hint='Write AI_BUDGET = {"DAILY_LIMIT_USD": "20", ...}.',
                id="ai_budget.E001",
            )
        ]
    return [
        *_unknown_keys(given),
        *_bad_values(given),
        *_no_site_limit(given),
        *_nobody_at_the_queue(),
        *_bad_notifiers(),
    ]


def check_database(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Report a ledger database that could lose or lock the record of a spend."""
    if not isinstance(conf.given, dict):
        return []  # check_settings says so
    alias = conf.LEDGER_DATABASE
    databases = settings.DATABASES
    if not isinstance(alias, str) or alias not in databases:
        return [
            Error(
                f"AI_BUDGET['LEDGER_DATABASE'] is {alias!r}, which is not in DATABASES.",
                hint="Name an alias of DATABASES.",
                id="ai_budget.E004",
            )
        ]
    return [
        *_atomic_requests(alias, databases),
        *_second_sqlite_alias(alias, databases),
        *_no_redis(),
        *_naive_datetimes(),
    ]


def _unknown_keys(given: dict[str, Any]) -> Iterator[CheckMessage]:
    for key in sorted(set(given) - set(DEFAULTS), key=str):
        yield Error(
            f"AI_BUDGET has an unknown key {key!r}.",
            hint=f"Known keys: {', '.join(DEFAULTS)}.",
            id="ai_budget.E002",
        )


def _bad_values(given: dict[str, Any]) -> Iterator[CheckMessage]:
    for key, value in given.items():
        rule = _RULES.get(key)
        if rule is not None and not rule[0](value):
            shown = "a value" if key in _SECRETS else repr(value)
            yield Error(
                f"AI_BUDGET[{key!r}] is {shown}, which cannot be used.",
                hint=f"It must be {rule[1]}.",
                id="ai_budget.E003",
            )


def _no_site_limit(given: dict[str, Any]) -> Iterator[CheckMessage]:
    if conf.DAILY_LIMIT_USD is None and conf.MONTHLY_LIMIT_USD is None:
        yield Warning(
            "The settings give the site no limit.",
            hint="Set AI_BUDGET['DAILY_LIMIT_USD'] or ['MONTHLY_LIMIT_USD'], or limit the "
            "budget * in admin and silence this check.",
            id="ai_budget.W001",
        )


def _nobody_at_the_queue() -> Iterator[CheckMessage]:
    if conf.QUEUE != "celery":
        return
    if find_spec("celery") is None:
        yield Error(
            "AI_BUDGET['QUEUE'] is 'celery', which is not installed.",
            hint="Install django-ai-budget[celery], or leave batches to ai_budget_tick with "
            "QUEUE = 'tick'.",
            id="ai_budget.E009",
        )
        return
    from celery import current_app  # only sites that use it import it

    if current_app.main == "default":
        yield Warning(
            "AI_BUDGET['QUEUE'] is 'celery', and the project has no Celery app: tasks would go to "
            "a broker on this machine that nobody reads from.",
            hint="Import the project's Celery app in the package of its settings.",
            id="ai_budget.W002",
        )


def _bad_notifiers() -> Iterator[CheckMessage]:
    if not _is_notifiers(conf.NOTIFIERS):
        return  # its rule says so
    for number, entry in enumerate(conf.NOTIFIERS):
        path = entry if isinstance(entry, str) else entry["BACKEND"]
        place = f"AI_BUDGET['NOTIFIERS'][{number}]"
        try:
            load(entry)
        except ImportError:
            yield Error(
                f"{place} names {path!r}, which cannot be imported.",
                hint="Give the dotted path of a function or a class, such as "
                "'ai_budget.review.notifiers.Email'.",
                id="ai_budget.E010",
            )
        except Exception as error:
            # Of another's error no text: it may quote an address with a token in it.
            told = isinstance(error, (TypeError, ImproperlyConfigured))
            yield Error(
                f"{place}, {path!r}, cannot be made with its OPTIONS.",
                hint=f"{str(error).rstrip('.')}." if told else f"It raised {type(error).__name__}.",
                id="ai_budget.E011",
            )


def _atomic_requests(alias: str, databases: dict[str, Any]) -> Iterator[CheckMessage]:
    if databases[alias].get("ATOMIC_REQUESTS"):
        yield Error(
            f"The ledger writes through the database alias {alias!r}, which has ATOMIC_REQUESTS: "
            "every paid call in a view would be refused with CallInsideTransaction.",
            hint="Add a second alias of the same database without ATOMIC_REQUESTS and name it "
            "in AI_BUDGET['LEDGER_DATABASE'].",
            id="ai_budget.E005",
        )


def _second_sqlite_alias(alias: str, databases: dict[str, Any]) -> Iterator[CheckMessage]:
    ledger = databases[alias]
    default = databases.get("default", {})
    if (
        alias != "default"
        and str(ledger.get("ENGINE", "")).endswith("sqlite3")
        and str(ledger.get("NAME")) == str(default.get("NAME"))
    ):
        yield Error(
            f"The ledger's alias {alias!r} is a second connection to the SQLite file of "
            "'default': each would wait for the other's lock.",
            hint="On SQLite leave LEDGER_DATABASE at 'default', and make paid calls outside "
            "transactions.",
            id="ai_budget.E006",
        )


def _no_redis() -> Iterator[CheckMessage]:
    if not _is_ledger(conf.LEDGER) or not import_string(conf.LEDGER).needs_redis:
        return
    from ai_budget.ledger import redis_client  # only sites that use it import it

    if _is_alias(conf.CACHE_ALIAS) and not redis_client.is_named():
        yield Error(
            "AI_BUDGET['LEDGER'] keeps its balances in Redis, and none is named.",
            hint="Set AI_BUDGET['LEDGER_REDIS_URL'], or make the cache "
            f"{conf.CACHE_ALIAS!r} one of Redis.",
            id="ai_budget.E008",
        )


def _naive_datetimes() -> Iterator[CheckMessage]:
    if not settings.USE_TZ:
        yield Error(
            "USE_TZ is False: the windows that limits count in have no naive bounds.",
            hint="Set USE_TZ = True. AI_BUDGET['TIME_ZONE'] says whose days and months count.",
            id="ai_budget.E007",
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_limit(value: Any) -> bool:
    try:
        return value is None or money.parse_usd(value) >= 0
    except (TypeError, ValueError):
        return False


def _is_zone(value: Any) -> bool:
    try:
        return value is None or bool(ZoneInfo(value))
    except (TypeError, ValueError, ZoneInfoNotFoundError, OSError):
        return False


def _is_feature(value: Any) -> bool:
    return (
        isinstance(value, str)
        and value != SITE
        and len(value) <= 64
        and bool(re.match(NAME_PATTERN, value))
    )


def _is_alias(value: Any) -> bool:
    return isinstance(value, str) and value in settings.CACHES


def _is_ledger(value: Any) -> bool:
    from ai_budget.ledger.base import Ledger  # not before a check asks: it takes its time

    try:
        found = import_string(value) if isinstance(value, str) else None
    except ImportError:
        return False
    return isinstance(found, type) and issubclass(found, Ledger)


def _optional(rule: _Check) -> _Check:
    return lambda value: value is None or rule(value)


def _one_of(*choices: Any) -> _Check:
    return lambda value: value in choices


def _each(rule: _Check) -> _Check:
    return lambda value: isinstance(value, (list, tuple)) and all(rule(item) for item in value)


def _is_notifier(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return _is_text(value)
    known = value.keys() <= {"BACKEND", "OPTIONS"}
    return (
        known and _is_text(value.get("BACKEND")) and isinstance(value.get("OPTIONS", {}), Mapping)
    )


_is_notifiers = _each(_is_notifier)


def _is_rising(value: Any) -> bool:
    return _each(_is_count)(value) and all(low < high for low, high in pairwise(value))


# An address may carry a password, and an entry an address.
_SECRETS = {"API_KEY", "BASE_URL", "LEDGER_REDIS_URL", "NOTIFIERS"}
_AMOUNT = "None or dollars as a Decimal, int or str of at most nine decimals, not negative"

_RULES: dict[str, tuple[_Check, str]] = {
    "API_KEY": (_optional(_is_text), "None or the key as text"),
    "BASE_URL": (_optional(_is_text), "None or an address such as https://api.anthropic.com"),
    "TIERS": (_each(_is_text), "a list of model names, the cheapest first"),
    "DEFAULT_MODEL": (_is_text, "a model's name"),
    "DEFAULT_MAX_TOKENS": (_is_count, "a number of tokens, at least 1"),
    "DEFAULT_FEATURE": (
        _is_feature,
        "a feature's name: at most 64 letters, digits, hyphens, underscores and dots",
    ),
    "UNKNOWN_FEATURE": (_one_of("create", "refuse"), '"create" or "refuse"'),
    "DAILY_LIMIT_USD": (_is_limit, _AMOUNT),
    "MONTHLY_LIMIT_USD": (_is_limit, _AMOUNT),
    "TIME_ZONE": (_is_zone, "None or a zone's name such as Europe/Berlin"),
    "INFERENCE_GEO": (_one_of(None, "us", "global"), 'None, "us" or "global"'),
    "ROUTING_LENGTHS": (_is_rising, "a list of token counts, each above the one before"),
    "CACHE_ALIAS": (_is_alias, "an alias of CACHES"),
    "CACHE_STOP_REASONS": (_each(_is_text), "a list of stop reasons of the API"),
    "CACHE_COMPRESS_ABOVE": (_optional(_is_count), "None or a number of bytes, at least 1"),
    "LEDGER": (_is_ledger, "the dotted path of a ledger class"),
    "LEDGER_DATABASE": (_is_text, "an alias of DATABASES"),
    "LEDGER_REDIS_URL": (_optional(_is_text), "None or an address such as redis://host:6379/0"),
    "ON_LEDGER_FAILURE": (_one_of("refuse", "allow"), '"refuse" or "allow"'),
    "UNPRICED_MODEL": (_one_of("refuse", "allow"), '"refuse" or "allow"'),
    "QUEUE": (_one_of("tick", "celery"), '"tick" or "celery"'),
    "LOG_PROMPTS": (lambda value: isinstance(value, bool), "True or False"),
    "LOG_PROMPTS_DAYS": (_is_count, "a number of days from 1 on"),
    "NOTIFIERS": (
        _is_notifiers,
        'a list of dotted paths, or of dicts with such a path as "BACKEND", and "OPTIONS"',
    ),
    "ALERT_THRESHOLDS": (_each(_is_count), "a list of percents"),
}
