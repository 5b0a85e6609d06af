"""What cannot be put on record is refused by the name of its argument, before anything is done."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import AnonymousUser, Group
from pytest_django import Settings

import ai_budget
from ai_budget.exceptions import InvalidArgument
from ai_budget.models import CallLog, FeatureBudget, SpendWindow
from ai_budget.policy.limits import caller_scopes
from ai_budget.testing import AnthropicSimulator
from ai_budget.values import Charge
from tests.factories import UserFactory

pytestmark = pytest.mark.django_db

UNPRINTABLE = [
    "nul \0",
    "half \ud800",
    "half \udfff",
    "line\n",
    "line\r",
    "bell\x07",
    "\x85",
    "\u2028",
]


def refused(argument: str, **given: Any) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        ai_budget.ask("Hello", **{"feature": "chat", **given})
    assert caught.value.argument == argument
    assert str(caught.value).startswith(argument)
    return caught.value


@pytest.fixture(autouse=True)
def nothing_is_done(anthropic_api: AnthropicSimulator, settings: Settings) -> Iterator[None]:
    # Taken for a failure of the ledger, a mistake would open the gate.
    settings.AI_BUDGET = {**settings.AI_BUDGET, "ON_LEDGER_FAILURE": "allow"}
    yield
    assert anthropic_api.requests == []
    assert not CallLog.objects.exists()
    assert not SpendWindow.objects.exists()
    assert not FeatureBudget.objects.exists()


@pytest.mark.parametrize("text", UNPRINTABLE)
@pytest.mark.parametrize("argument", ["feature", "subject", "model", "speed", "inference_geo"])
def test_a_name_has_no_character_that_stores_refuse_or_logs_print(argument: str, text: str) -> None:
    refused(argument, **{argument: text})


@pytest.mark.parametrize("text", UNPRINTABLE)
def test_neither_has_a_tag(text: str) -> None:
    refused("The name of a tag", tags={text: "free"})
    refused("The tag 'plan'", tags={"plan": text})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("feature", "f" * 65),
        ("feature", 7),
        ("subject", "s" * 101),
        ("subject", "," * 51),
        ("subject", 7),
        ("subject", b"tenant"),
        ("model", "m" * 129),
        ("model", 7),
        ("speed", "f" * 17),
        ("inference_geo", "u" * 33),
        ("tags", ["plan"]),
        ("tags", {str(number): "" for number in range(33)}),
    ],
)
def test_a_name_is_a_text_and_fits(argument: str, value: Any) -> None:
    refused(argument, **{argument: value})


@pytest.mark.parametrize("tags", [{"plan": 3}, {"plan": None}, {"plan": "x" * 201}])
def test_the_value_of_a_tag_is_a_text_and_fits(tags: Mapping[str, Any]) -> None:
    refused("The tag 'plan'", tags=tags)


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("messages", {"prompt": "half \ud800"}),
        (
            "messages",
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]},
        ),
        ("system", {"system": "half \ud800"}),
        ("metadata", {"metadata": {"\ud800": "x"}}),
    ],
)
def test_half_of_a_character_is_not_sent(argument: str, given: dict[str, Any]) -> None:
    prompt = given.pop("prompt", "Hello")

    with pytest.raises(InvalidArgument) as caught:
        ai_budget.ask(prompt, feature="chat", **given)

    assert caught.value.argument == argument


def test_a_user_is_one_that_the_database_has() -> None:
    deleted = UserFactory.create()
    deleted.delete()
    not_saved, group = get_user_model()(), Group.objects.create(name="staff")
    of_other_types: list[Any] = [True, 1.0, Decimal(1), b"1", object(), [1], "ada"]

    for user in (deleted, not_saved, group, *of_other_types):
        refused("user", user=user)


def test_the_key_of_a_user_fits_in_its_column() -> None:
    if isinstance(get_user_model()._meta.pk.to_python("1"), int):
        refused("user", user=2**64)
        refused("user", user=str(-(2**64)))


@pytest.mark.parametrize("name", ["s" * 100, "," * 50, "s" * 60 + "," * 20])
def test_what_is_taken_fits_where_balances_are_kept(name: str) -> None:
    longest = SpendWindow._meta.get_field("scope").max_length
    scopes = caller_scopes(Charge(feature="f" * 64, subject=name))

    assert longest is not None
    assert max(len(scope) for scope, _ in scopes) <= longest


def test_nobody_and_visitors_are_no_user() -> None:
    from ai_budget.guard.charge import user_id_of

    assert user_id_of(None) is None
    assert user_id_of(AnonymousUser()) is None


def test_the_error_crosses_a_process() -> None:
    error = pickle.loads(pickle.dumps(InvalidArgument("subject", "is too long.")))  # noqa: S301

    assert (error.argument, str(error)) == ("subject", "subject is too long.")
