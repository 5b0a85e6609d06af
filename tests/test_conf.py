"""One dict, read live; every key has a default, a type and a word of explanation."""

from __future__ import annotations

import inspect
from decimal import Decimal
from typing import Any, get_type_hints
from zoneinfo import ZoneInfo

import pytest
from django.test import override_settings

from ai_budget.conf import DEFAULTS, Settings, conf

KEYS = sorted(DEFAULTS)


def property_of(key: str) -> property:
    found = inspect.getattr_static(Settings, key)
    assert isinstance(found, property)
    return found


def test_every_property_is_a_key_and_every_key_a_property() -> None:
    properties = {name for name, value in vars(Settings).items() if isinstance(value, property)} - {
        "given"
    }

    assert properties == set(DEFAULTS)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_has_a_type(key: str) -> None:
    getter = property_of(key).fget
    assert getter is not None

    assert get_type_hints(getter)["return"] is not Any


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_documented(key: str) -> None:
    assert len((property_of(key).__doc__ or "").split()) >= 4


@pytest.mark.parametrize("key", sorted(set(DEFAULTS) - {"API_KEY", "TIME_ZONE"}))
def test_a_key_that_is_not_given_has_its_default(key: str) -> None:
    with override_settings(AI_BUDGET={}):
        assert getattr(conf, key) == DEFAULTS[key]


def test_a_project_without_the_setting_has_the_defaults(settings: Any) -> None:
    del settings.AI_BUDGET

    limit = conf.DAILY_LIMIT_USD

    assert limit == Decimal(10)


@pytest.mark.parametrize("key", sorted(set(DEFAULTS) - {"TIME_ZONE"}))
def test_a_key_that_is_given_wins(key: str) -> None:
    given = object()

    with override_settings(AI_BUDGET={key: given}):
        assert getattr(conf, key) is given


def test_none_is_a_value_and_not_the_default() -> None:
    with override_settings(AI_BUDGET={"DAILY_LIMIT_USD": None}):
        assert conf.DAILY_LIMIT_USD is None


def test_a_change_of_the_settings_is_seen_at_once() -> None:
    before = conf.DEFAULT_MODEL

    with override_settings(AI_BUDGET={"DEFAULT_MODEL": "claude-opus-5-5"}):
        during = conf.DEFAULT_MODEL

    assert (during, conf.DEFAULT_MODEL) == ("claude-opus-5-5", before)


def test_the_key_comes_from_the_environment_where_none_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "from the environment")

    with override_settings(AI_BUDGET={"API_KEY": None}):
        assert conf.API_KEY == "from the environment"


def test_a_given_key_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "from the environment")

    with override_settings(AI_BUDGET={"API_KEY": "given"}):
        assert conf.API_KEY == "given"


def test_without_any_key_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)

    with override_settings(AI_BUDGET={}):
        assert conf.API_KEY is None


def test_the_zone_is_djangos_where_none_is_given() -> None:
    with override_settings(AI_BUDGET={}, TIME_ZONE="Asia/Kathmandu"):
        zone = conf.TIME_ZONE

    assert zone == ZoneInfo("Asia/Kathmandu")


def test_a_given_zone_wins_over_djangos() -> None:
    with override_settings(AI_BUDGET={"TIME_ZONE": "Europe/Berlin"}, TIME_ZONE="Asia/Kathmandu"):
        zone = conf.TIME_ZONE

    assert zone == ZoneInfo("Europe/Berlin")
