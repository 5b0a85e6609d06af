"""Caches that are like others, or fail as others do."""

from __future__ import annotations

from typing import Any

from django.core.cache.backends.base import BaseCache
from django.core.cache.backends.locmem import LocMemCache


class Elsewhere(LocMemCache):
    """Treated as every cache is that is not in this process's own memory."""


class Down(BaseCache):
    """A cache whose server does not answer."""

    def __init__(self, server: str, params: dict[str, Any]) -> None:
        super().__init__(params)

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise ConnectionError("redis://:a-password@cache:6379 does not answer")

    add = get = set = touch = delete = get_many = set_many = delete_many = _fail


class Silent(Down):
    """A cache whose server does not answer, and which has been told to hide it."""

    def _hide(self, *_: Any, **__: Any) -> Any:
        return None

    add = get = set = touch = delete = set_many = delete_many = _hide

    def get_many(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}
