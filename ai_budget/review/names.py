"""How users are called who are known by their primary keys alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.contrib.auth import get_user_model
from django.utils.translation import gettext as _


def usernames(user_ids: Iterable[Any]) -> dict[Any, str]:
    """Return the names of those users that exist, in one query.

    They come from the default database: the ledger's connection may not see users.
    """
    model = get_user_model()
    users = model._base_manager.only(model.USERNAME_FIELD).in_bulk(set(user_ids))
    return {key: user.get_username() for key, user in users.items()}


def deleted_user(user_id: Any) -> str:
    """Return what stands for a user whose row is gone."""
    return _("user %(id)s (deleted)") % {"id": user_id}
