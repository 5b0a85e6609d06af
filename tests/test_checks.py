"""Every mistake in the settings is named at start, with what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from django.conf import settings as django_settings
from django.core import checks
from django.core.checks import CheckMessage
from django.test import override_settings

from ai_budget.checks import check_database, check_settings
from ai_budget.conf import DEFAULTS

SQLITE = "django.db.backends.sqlite3"
POSTGRESQL = "django.db.backends.postgresql"
SLACK = "ai_budget.review.notifiers.Slack"
SLACK_THAT_WORKS = {"BACKEND": SLACK, "OPTIONS": {"url": "https://hooks.example.com/T0/B0"}}


def found(given: Any) -> list[CheckMessage]:
    """All that both checks say of a value of AI_BUDGET."""
    with override_settings(AI_BUDGET=given):
        return [*check_settings(None), *check_database(None)]


def ids(messages: Sequence[CheckMessage]) -> list[str | None]:
    return [message.id for message in messages]


def found_with(
    monkeypatch: pytest.MonkeyPatch, databases: dict[str, dict[str, Any]], ledger: str
) -> list[CheckMessage]:
    """The same with other databases, which nobody connects to."""
    monkeypatch.setattr(django_settings, "DATABASES", databases)
    return found({"LEDGER_DATABASE": ledger})


@pytest.fixture
def celery_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project has a Celery app of its own."""
    monkeypatch.setattr("celery.current_app", SimpleNamespace(main="shop"))


# A clean project ---------------------------------------------------------------------------------


def test_the_defaults_are_clean() -> None:
    assert found({}) == []


def test_the_defaults_written_out_are_clean() -> None:
    assert found(dict(DEFAULTS)) == []


@pytest.mark.usefixtures("celery_app")
def test_a_project_with_every_key_is_clean() -> None:
    given = {
        "API_KEY": "sk-ant-key",
        "BASE_URL": "http://localhost:8765",
        "TIERS": ["claude-haiku-5-5", "claude-opus-5-5"],
        "DEFAULT_MODEL": "claude-opus-5-5",
        "DEFAULT_MAX_TOKENS": 1,
        "DEFAULT_FEATURE": "chat.v2_beta-1",
        "UNKNOWN_FEATURE": "refuse",
        "DAILY_LIMIT_USD": "0.000000001",
        "MONTHLY_LIMIT_USD": 0,
        "TIME_ZONE": "Europe/Berlin",
        "INFERENCE_GEO": "us",
        "ROUTING_LENGTHS": [500, 5_000],
        "CACHE_ALIAS": "default",
        "CACHE_STOP_REASONS": ["end_turn", "max_tokens"],
        "CACHE_COMPRESS_ABOVE": 2_048,
        "LEDGER": "ai_budget.ledger.database.DatabaseLedger",
        "LEDGER_DATABASE": "default",
        "LEDGER_REDIS_URL": "redis://localhost:6379/0",
        "ON_LEDGER_FAILURE": "allow",
        "UNPRICED_MODEL": "allow",
        "QUEUE": "celery",
        "LOG_PROMPTS": True,
        "LOG_PROMPTS_DAYS": 7,
        "NOTIFIERS": [
            "tests.review.test_notifiers.pager",
            SLACK_THAT_WORKS,
        ],
        "ALERT_THRESHOLDS": [50, 120],
    }
    assert set(given) == set(DEFAULTS)

    assert found(given) == []


@pytest.mark.django_db
def test_both_checks_run_with_djangos_own() -> None:
    with override_settings(AI_BUDGET={"MODEL": "x", "LEDGER_DATABASE": "elsewhere"}):
        messages = checks.run_checks()

    assert {"ai_budget.E002", "ai_budget.E004"} <= set(ids(messages))


@pytest.mark.django_db
def test_the_tests_own_project_is_clean() -> None:
    assert [message for message in checks.run_checks() if "ai_budget" in (message.id or "")] == []


# E001: not a dict --------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, 5, "20", ["DAILY_LIMIT_USD"], [("API_KEY", "sk-ant-1")]])
def test_e001_the_setting_is_no_dict(given: Any) -> None:
    assert ids(found(given)) == ["ai_budget.E001"]


# E002: unknown keys ------------------------------------------------------------------------------


def test_e002_a_misspelt_key() -> None:
    (message,) = found({"DAILY_LIMIT": "20"})

    assert message.id == "ai_budget.E002"
    assert "'DAILY_LIMIT'" in message.msg
    assert "DAILY_LIMIT_USD" in str(message.hint)


def test_e002_each_unknown_key_has_its_own_error() -> None:
    assert ids(found({"B": 1, "A": 1, 7: 1})) == ["ai_budget.E002"] * 3


# E003: bad values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("API_KEY", ""),
        ("API_KEY", b"sk-ant-key"),
        ("BASE_URL", ""),
        ("BASE_URL", 8765),
        ("TIERS", "claude-haiku-5-5"),
        ("TIERS", [""]),
        ("DEFAULT_MODEL", ""),
        ("DEFAULT_MODEL", None),
        ("DEFAULT_MAX_TOKENS", 0),
        ("DEFAULT_MAX_TOKENS", True),
        ("DEFAULT_MAX_TOKENS", "1024"),
        ("DEFAULT_FEATURE", ""),
        ("DEFAULT_FEATURE", "*"),
        ("DEFAULT_FEATURE", "my feature"),
        ("DEFAULT_FEATURE", "f" * 65),
        ("DEFAULT_FEATURE", "chat\n"),
        ("UNKNOWN_FEATURE", "ignore"),
        ("UNKNOWN_FEATURE", []),
        ("DAILY_LIMIT_USD", 0.1),
        ("DAILY_LIMIT_USD", -1),
        ("DAILY_LIMIT_USD", "0.0000000001"),
        ("DAILY_LIMIT_USD", "ten"),
        ("DAILY_LIMIT_USD", ""),
        ("DAILY_LIMIT_USD", True),
        ("DAILY_LIMIT_USD", Decimal("NaN")),
        ("MONTHLY_LIMIT_USD", Decimal("Infinity")),
        ("MONTHLY_LIMIT_USD", "10000000000"),
        ("TIME_ZONE", "Berlin"),
        ("TIME_ZONE", "../etc/passwd"),
        ("TIME_ZONE", "Europe"),
        ("TIME_ZONE", 2),
        ("INFERENCE_GEO", "eu"),
        ("ROUTING_LENGTHS", [2_000, 1_000]),
        ("ROUTING_LENGTHS", [0]),
        ("ROUTING_LENGTHS", 1_000),
        ("CACHE_STOP_REASONS", "end_turn"),
        ("CACHE_COMPRESS_ABOVE", 0),
        ("CACHE_ALIAS", "answers"),
        ("CACHE_ALIAS", None),
        ("CACHE_ALIAS", ["default"]),
        ("LEDGER", None),
        ("LEDGER", "DatabaseLedger"),
        ("LEDGER", "ai_budget.ledger.nowhere.Ledger"),
        ("LEDGER", "ai_budget.ledger.database.Missing"),
        ("LEDGER", "ai_budget.conf.conf"),
        ("LEDGER", "collections.OrderedDict"),
        ("LEDGER_REDIS_URL", ""),
        ("ON_LEDGER_FAILURE", "ignore"),
        ("UNPRICED_MODEL", True),
        ("QUEUE", "rq"),
        ("LOG_PROMPTS", "no"),
        ("LOG_PROMPTS", None),
        ("LOG_PROMPTS_DAYS", 0),
        ("NOTIFIERS", "shop.alerts.mail"),
        ("NOTIFIERS", [print]),
        ("NOTIFIERS", [{"OPTIONS": {}}]),
        ("NOTIFIERS", [{"BACKEND": 7}]),
        ("NOTIFIERS", [{"BACKEND": SLACK, "OPTION": {}}]),
        ("NOTIFIERS", [{"BACKEND": SLACK, "OPTIONS": "https://hooks.example.com"}]),
        ("ALERT_THRESHOLDS", 80),
        ("ALERT_THRESHOLDS", ["80"]),
        ("ALERT_THRESHOLDS", [0]),
    ],
)
def test_e003_a_value_that_cannot_be_used(key: str, value: Any) -> None:
    (message,) = found({key: value})

    assert message.id == "ai_budget.E003"
    assert f"AI_BUDGET[{key!r}]" in message.msg
    assert str(message.hint).startswith("It must be ")


def test_e003_shows_the_value() -> None:
    (message,) = found({"TIME_ZONE": "Berlin"})

    assert "'Berlin'" in message.msg


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("API_KEY", ["sk-ant-secret"]),
        ("BASE_URL", ["https://me:secret@proxy.example.com"]),
        ("LEDGER_REDIS_URL", ["redis://:secret@cache.example.com:6379/0"]),
        ("NOTIFIERS", ["", {"OPTIONS": {"url": "https://hooks.example.com/secret"}}]),
    ],
)
def test_e003_never_shows_a_secret(key: str, value: Any) -> None:
    (message,) = found({key: value})

    assert "secret" not in f"{message.msg} {message.hint}"


def test_a_secret_under_a_misspelt_key_is_not_shown() -> None:
    (message,) = found({"APIKEY": "sk-ant-secret"})

    assert "secret" not in f"{message.msg} {message.hint}"


def test_a_secret_in_a_setting_that_is_no_dict_is_not_shown() -> None:
    (message,) = found([("API_KEY", "sk-ant-secret")])

    assert "secret" not in f"{message.msg} {message.hint}"


# E004 to E007: the ledger's database -------------------------------------------------------------


@pytest.mark.parametrize("alias", ["elsewhere", "Default"])
def test_e004_an_alias_that_is_not_there(alias: str) -> None:
    (message,) = found({"LEDGER_DATABASE": alias})

    assert message.id == "ai_budget.E004"
    assert repr(alias) in message.msg


@pytest.mark.parametrize("alias", [None, "", ["default"]])
def test_e004_an_alias_that_is_no_name_is_a_bad_value_too(alias: Any) -> None:
    assert ids(found({"LEDGER_DATABASE": alias})) == ["ai_budget.E003", "ai_budget.E004"]


def test_e005_the_ledgers_alias_has_atomic_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    databases = {"default": {"ENGINE": POSTGRESQL, "NAME": "shop", "ATOMIC_REQUESTS": True}}

    (message,) = found_with(monkeypatch, databases, "default")

    assert message.id == "ai_budget.E005"
    assert "LEDGER_DATABASE" in str(message.hint)


def test_a_second_alias_without_atomic_requests_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    databases: dict[str, dict[str, Any]] = {
        "default": {"ENGINE": POSTGRESQL, "NAME": "shop", "ATOMIC_REQUESTS": True},
        "ledger": {"ENGINE": POSTGRESQL, "NAME": "shop"},
    }

    assert found_with(monkeypatch, databases, "ledger") == []


@pytest.mark.parametrize("name", ["/srv/shop.sqlite3", Path("/srv/shop.sqlite3")])
def test_e006_a_second_alias_of_one_sqlite_file(
    monkeypatch: pytest.MonkeyPatch, name: str | Path
) -> None:
    databases: dict[str, dict[str, Any]] = {
        "default": {"ENGINE": SQLITE, "NAME": Path("/srv/shop.sqlite3")},
        "ledger": {"ENGINE": SQLITE, "NAME": name},
    }

    (message,) = found_with(monkeypatch, databases, "ledger")

    assert message.id == "ai_budget.E006"
    assert "'default'" in str(message.hint)


def test_a_sqlite_file_of_its_own_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    databases = {
        "default": {"ENGINE": SQLITE, "NAME": "/srv/shop.sqlite3"},
        "ledger": {"ENGINE": SQLITE, "NAME": "/srv/ledger.sqlite3"},
    }

    assert found_with(monkeypatch, databases, "ledger") == []


def test_e007_datetimes_without_a_zone() -> None:
    with override_settings(USE_TZ=False):
        messages = found({})

    assert ids(messages) == ["ai_budget.E007"]


# E008: a ledger on Redis without one -------------------------------------------------------------

REDIS_LEDGER = "ai_budget.ledger.redis.RedisLedger"


@pytest.mark.parametrize(
    "backend", ["locmem.LocMemCache", "filebased.FileBasedCache", "dummy.DummyCache"]
)
def test_e008_a_ledger_on_redis_without_a_redis(backend: str) -> None:
    cache = {"BACKEND": f"django.core.cache.backends.{backend}", "LOCATION": "unused"}
    with override_settings(CACHES={"default": cache}):
        (message,) = found({"LEDGER": REDIS_LEDGER})

    assert message.id == "ai_budget.E008"
    assert "LEDGER_REDIS_URL" in str(message.hint)


@pytest.mark.parametrize(
    "backend", ["django.core.cache.backends.redis.RedisCache", "django_redis.cache.RedisCache"]
)
def test_the_redis_of_the_cache_is_enough(backend: str) -> None:
    cache = {"BACKEND": backend, "LOCATION": "redis://127.0.0.1:9/0"}
    with override_settings(CACHES={"default": cache}):
        assert found({"LEDGER": REDIS_LEDGER}) == []


def test_an_address_of_redis_is_enough() -> None:
    assert found({"LEDGER": REDIS_LEDGER, "LEDGER_REDIS_URL": "redis://127.0.0.1:9/0"}) == []


# W001: no limit at all ---------------------------------------------------------------------------


def test_w001_the_settings_give_the_site_no_limit() -> None:
    (message,) = found({"DAILY_LIMIT_USD": None, "MONTHLY_LIMIT_USD": None})

    assert (message.id, message.level) == ("ai_budget.W001", checks.WARNING)


@pytest.mark.parametrize("key", ["DAILY_LIMIT_USD", "MONTHLY_LIMIT_USD"])
def test_one_limit_is_enough(key: str) -> None:
    assert found({"DAILY_LIMIT_USD": None, "MONTHLY_LIMIT_USD": None, key: 0}) == []


# E009 and W002: a queue that nobody serves -------------------------------------------------------


def test_e009_celery_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ai_budget.checks.find_spec", lambda name: None)

    (message,) = found({"QUEUE": "celery"})

    assert (message.id, message.level) == ("ai_budget.E009", checks.ERROR)


def test_w002_the_project_has_no_celery_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery.current_app", Celery("default", set_as_current=False))

    (message,) = found({"QUEUE": "celery"})

    assert (message.id, message.level) == ("ai_budget.W002", checks.WARNING)


@pytest.mark.usefixtures("celery_app")
def test_a_celery_app_is_enough() -> None:
    assert found({"QUEUE": "celery"}) == []


def test_the_tick_needs_no_celery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ai_budget.checks.find_spec", lambda name: None)

    assert found({"QUEUE": "tick"}) == []


# E010 and E011: who delivers alerts --------------------------------------------------------------


@pytest.mark.parametrize("entry", ["shop.alerts.mail", {"BACKEND": "shop.alerts.Mail"}])
def test_e010_a_notifier_that_cannot_be_imported(entry: Any) -> None:
    (message,) = found({"NOTIFIERS": [SLACK_THAT_WORKS, entry]})

    assert (message.id, message.level) == ("ai_budget.E010", checks.ERROR)
    assert "['NOTIFIERS'][1]" in message.msg
    assert "shop.alerts" in message.msg


@pytest.mark.parametrize(
    "entry",
    [
        "tests.review.test_notifiers.HERE",
        SLACK,
        {"BACKEND": SLACK, "OPTIONS": {"uri": "https://hooks.example.com/secret"}},
        {"BACKEND": SLACK, "OPTIONS": {"url": "http://hooks.example.com/secret"}},
        {"BACKEND": SLACK, "OPTIONS": {"url": "https://a.example", "timeout": "secret"}},
        {"BACKEND": "ai_budget.review.notifiers.Email", "OPTIONS": {"recipients": "secret"}},
        {"BACKEND": "tests.test_checks.Fussy", "OPTIONS": {"url": "secret"}},
    ],
)
def test_e011_options_that_a_notifier_does_not_take(entry: Any) -> None:
    (message,) = found({"NOTIFIERS": [entry]})

    assert (message.id, message.level) == ("ai_budget.E011", checks.ERROR)
    assert "secret" not in f"{message.msg} {message.hint}"


class Fussy:
    """A notifier that quotes what it was given."""

    def __init__(self, *, url: str) -> None:
        raise ValueError(f"{url} is no address")


def test_a_site_may_have_no_notifiers() -> None:
    assert found({"NOTIFIERS": []}) == []


# All of them -------------------------------------------------------------------------------------


def found_without_celery(monkeypatch: pytest.MonkeyPatch) -> list[CheckMessage]:
    with monkeypatch.context() as patch:
        patch.setattr("ai_budget.checks.find_spec", lambda name: None)
        return found({"QUEUE": "celery"})


def test_every_message_has_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery.current_app", Celery("default", set_as_current=False))
    databases: dict[str, dict[str, Any]] = {
        "default": {"ENGINE": SQLITE, "NAME": "shop"},
        "ledger": {"ENGINE": SQLITE, "NAME": "shop", "ATOMIC_REQUESTS": True},
    }
    monkeypatch.setattr(django_settings, "DATABASES", databases)
    with override_settings(USE_TZ=False):
        messages = [
            *found([]),
            *found({"LEDGER_DATABASE": "elsewhere"}),
            *found({"LEDGER": REDIS_LEDGER}),
            *found({"QUEUE": "celery"}),
            *found({"NOTIFIERS": ["shop.alerts.mail", SLACK]}),
            *found_without_celery(monkeypatch),
            *found(
                {
                    "NAME": 1,
                    "TIERS": None,
                    "LEDGER_DATABASE": "ledger",
                    "DAILY_LIMIT_USD": None,
                    "MONTHLY_LIMIT_USD": None,
                }
            ),
        ]

    assert {message.id for message in messages} == {
        *(f"ai_budget.E{number:03}" for number in range(1, 12)),
        "ai_budget.W001",
        "ai_budget.W002",
    }
    assert all(message.hint for message in messages)
