"""Keys for digests, one for each purpose: what is kept in a cache tells nothing to who reads it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b

from django.conf import settings


def digest_key(purpose: str) -> bytes:
    """Return a key that only this project has, from its secret as it is now.

    ``purpose`` has at most 16 letters. Digests of two purposes have nothing to do with each other.
    """
    return _derived(settings.SECRET_KEY, purpose, _room)


@contextmanager
def apart() -> Iterator[None]:
    """Find nothing inside the block that was kept outside it, nor outside what was kept inside.

    For tests, of all threads of this process: a site's cache outlives them.
    """
    global _room
    before, _room = _room, secrets.token_bytes(16)
    try:
        yield
    finally:
        _room = before


_room = b""
"""What this process keeps apart from others by."""


@lru_cache(maxsize=64)
def _derived(secret: str | bytes, purpose: str, room: bytes) -> bytes:
    given = secret if isinstance(secret, bytes) else secret.encode("utf-8", "surrogatepass")
    return blake2b(given, digest_size=32, person=purpose.encode(), salt=room).digest()
