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
