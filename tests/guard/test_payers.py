"""Who pays is checked before anything is reserved."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from django.contrib.auth import get_user_model

import ai_budget
from ai_budget.models import CallLog
from ai_budget.testing import AnthropicSimulator

pytestmark = pytest.mark.django_db


def test_a_user_may_be_named_by_a_key_in_any_spelling(anthropic_api: AnthropicSimulator) -> None:
    user = get_user_model().objects.create(username="ada")

    ai_budget.ask("Hello", feature="chat", user=_in_another_spelling(user.pk))

    assert CallLog.objects.get().user_id == user.pk


def _in_another_spelling(key: Any) -> str:
    return str(key).upper() if isinstance(key, uuid.UUID) else f"0{key}"


@pytest.mark.parametrize(
    ("payer", "error"),
    [({"subject": "s" * 101}, ValueError), ({"tags": {"plan": 3}}, TypeError)],
    ids=["subject", "tags"],
)
def test_what_the_journal_cannot_keep_is_refused(
    anthropic_api: AnthropicSimulator, payer: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        ai_budget.ask("Hello", feature="chat", **payer)

    assert not CallLog.objects.exists()
    assert anthropic_api.requests == []
