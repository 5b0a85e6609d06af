from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from django.contrib.auth.models import Permission
from django.test import Client

from ai_budget import periods
from tests.factories import UserFactory

NOW = datetime(2026, 10, 15, 12, tzinfo=UTC)

SignIn = Callable[..., Client]


@pytest.fixture(autouse=True)
def clock() -> Iterator[None]:
    with periods.override_clock(lambda: NOW):
        yield


@pytest.fixture
def superuser(db: None) -> Any:
    return UserFactory.create(username="root", is_staff=True, is_superuser=True)


@pytest.fixture
def root(superuser: Any) -> Client:
    client = Client()
    client.force_login(superuser)
    return client


@pytest.fixture
def staff(db: None) -> SignIn:
    """Sign in a member of staff who has these permissions and no others."""

    def sign_in(*codenames: str) -> Client:
        user: Any = UserFactory.create(is_staff=True)
        permissions = Permission.objects.filter(codename__in=codenames)
        assert permissions.count() == len(codenames)
        user.user_permissions.set(permissions)
        client = Client()
        client.force_login(user)
        return client

    return sign_in
