"""Keys for digests, one for each purpose: what is kept in a cache tells nothing to who reads it."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

from django.conf import settings


def digest_key(purpose: str) -> bytes:
    """Return a key that only this project has, from its secret as it is now.

    ``purpose`` has at most 16 letters. Digests of two purposes have nothing to do with each other.
    """
    return _derived(settings.SECRET_KEY, purpose)


@lru_cache(maxsize=64)
def _derived(secret: str | bytes, purpose: str) -> bytes:
    given = secret if isinstance(secret, bytes) else secret.encode("utf-8", "surrogatepass")
    return blake2b(given, digest_size=32, person=purpose.encode()).digest()
