"""Which Redis the ledger speaks to, and how long it waits for it."""

from __future__ import annotations

from typing import Any

import redis
from django.core.cache import caches
from django.core.exceptions import ImproperlyConfigured
from redis.backoff import NoBackoff
from redis.retry import Retry

from ai_budget.conf import conf

TIMEOUT_SECONDS = 1.0
"""How long one command waits, where neither the cache's options nor the address say."""


def connect() -> Any:
    """Return a client of the Redis that the settings name, with a pool of its own.

    Raises ``ImproperlyConfigured`` where they name none, and redis-py's errors where it has to
    be asked whether it is a cluster and does not answer.
    """
    url = conf.LEDGER_REDIS_URL
    return _of_cache() if url is None else _of_url(url)


def key_prefix() -> str:
    """Return what tells this site's keys from those of others in the same Redis."""
    return str(getattr(caches[conf.CACHE_ALIAS], "key_prefix", ""))


def _of_url(url: str) -> Any:
    url = url.replace("valkey://", "redis://", 1).replace("valkeys://", "rediss://", 1)
    client = redis.Redis.from_url(url, **_manners())
    if not client.info("cluster").get("cluster_enabled"):
        return client
    client.close()
    return redis.RedisCluster.from_url(url, **_timeouts())


def is_named() -> bool:
    """Say whether the settings name a Redis at all."""
    return conf.LEDGER_REDIS_URL is not None or _package_of_cache() is not None


def _package_of_cache() -> str | None:
    """Return which package speaks to Django's cache, if it is a Redis."""
    kinds = type(caches[conf.CACHE_ALIAS]).__mro__
    packages = ("django_redis", "django.core.cache.backends.redis")
    return next(
        (name for kind in kinds for name in packages if kind.__module__.startswith(name)), None
    )


def _of_cache() -> Any:
    """Return a client for the server of Django's cache, whichever package speaks to it."""
    alias = conf.CACHE_ALIAS
    package = _package_of_cache()
    if package is None:
        raise ImproperlyConfigured(
            f"The ledger on Redis finds none: the cache {alias!r} is another kind, and "
            "AI_BUDGET['LEDGER_REDIS_URL'] is not set."
        )
    if package == "django_redis":
        from django_redis import get_redis_connection  # type: ignore[import-untyped]

        client = get_redis_connection(alias, write=True)
    else:
        client = caches[alias]._cache.get_client(None, write=True)  # type: ignore[attr-defined]
    pool: Any = getattr(client, "connection_pool", None)
    if type(pool) not in (redis.ConnectionPool, redis.BlockingConnectionPool):
        return client  # Sentinel and clusters know best themselves
    options = {**_manners(), **{k: v for k, v in pool.connection_kwargs.items() if v is not None}}
    # A cache may wait for ever, or repeat itself for long; a gate may not.
    options["retry"] = _manners()["retry"]
    own = redis.ConnectionPool(connection_class=pool.connection_class, **options)
    return redis.Redis.from_pool(own)


def _timeouts() -> dict[str, Any]:
    return {"socket_timeout": TIMEOUT_SECONDS, "socket_connect_timeout": TIMEOUT_SECONDS}


def _manners() -> dict[str, Any]:
    # Every script may be repeated. A lost connection is made again once; who waited in vain
    # does not wait again.
    once = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
    return {**_timeouts(), "retry": once}
