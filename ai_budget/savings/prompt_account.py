"""What a feature may still risk on writes to the prompt cache: an account in Django's cache.

Every call pays 1 % of what it would have cost without caching into it, and what its reads saved;
the most that a write can cost more than plain input is taken out before it is sent, and what it
did not cost is given back. So the premiums paid are never more than the savings made and 1 % of
the spend, whatever comes or does not come again.

This holds where the cache's ``incr`` is atomic: Redis, memcached and LocMem (one account for each
process). Those on files and in the database read and write in two steps: there two calls at the
same moment may both take what is there for one. An account that is lost begins again at nothing.
"""

from __future__ import annotations

from django.core.cache import BaseCache

from ai_budget.savings.prompt_prefixes import keyed_digest

ALLOWANCE_DIVISOR = 100
"""One percent of what calls would have cost may be lost."""

NOTHING = 2**52
"""The number that stands for an empty account: memcached counts no further down than zero, and
django-redis counts in a script, whose numbers are exact up to 2**53."""

_KEY = "ai_budget:prompt:account:"


class Account:
    """One feature's account, in nano-dollars. Raises what the cache raises."""

    def __init__(self, cache: BaseCache, feature: str) -> None:
        self._cache = cache
        self.key = _KEY + keyed_digest("account", feature)

    def balance(self, found: object) -> int:
        """Return what is there, given what the cache has under ``key``."""
        return found - NOTHING if isinstance(found, int) else 0

    def take(self, nanousd: int) -> bool:
        """Take an amount out if there is as much; at no moment can two take the same."""
        try:
            left = self._cache.incr(self.key, -nanousd)
        except ValueError:  # no account yet
            return False
        if left >= NOTHING:
            return True
        self._cache.incr(self.key, nanousd)
        return False

    def give(self, nanousd: int) -> None:
        """Pay in an amount; a negative one is a write that cost more than was taken for it."""
        if not nanousd:
            return
        try:
            self._cache.incr(self.key, nanousd)
        except ValueError:
            self._cache.add(self.key, NOTHING, None)
            self._cache.incr(self.key, nanousd)
