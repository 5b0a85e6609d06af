"""Guarded clients: the SDK's own, with the guard as their innermost middleware."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from django.core.exceptions import ImproperlyConfigured

from ai_budget.conf import conf
from ai_budget.guard.charge import Payer

if TYPE_CHECKING:
    from anthropic import Anthropic, AsyncAnthropic

Client = TypeVar("Client")

_PLATFORMS = (
    ("anthropic.lib.bedrock", "bedrock"),
    ("anthropic.lib.vertex", "vertex"),
    ("anthropic.lib.google_cloud", "vertex"),
    ("anthropic.lib.foundry", "foundry"),
)


def client(
    *,
    feature: str | None = None,
    user: Any = None,
    subject: str | None = None,
    tags: Mapping[str, str] | None = None,
    **options: Any,
) -> Anthropic:
    """Return a guarded ``anthropic.Anthropic`` by the settings, to hand to any library.

    What is said here about who pays wins over the charges around its calls. ``options`` go to
    the SDK's constructor. Raises ``ImproperlyConfigured`` without a key.
    """
    import anthropic

    payer = Payer(feature=feature, user=user, subject=subject, tags=tags or {})
    bare = anthropic.Anthropic(**_settings(options)) if options else _shared(*_key())
    guarded: Anthropic = _guarded(bare, payer)
    return guarded


def async_client(
    *,
    feature: str | None = None,
    user: Any = None,
    subject: str | None = None,
    tags: Mapping[str, str] | None = None,
    **options: Any,
) -> AsyncAnthropic:
    """Return a guarded ``anthropic.AsyncAnthropic``. See ``client``."""
    import anthropic

    payer = Payer(feature=feature, user=user, subject=subject, tags=tags or {})
    bare = anthropic.AsyncAnthropic(**_settings(options)) if options else _shared_async()
    guarded: AsyncAnthropic = _guarded(bare, payer)
    return guarded


def guard(
    client: Client,
    *,
    feature: str | None = None,
    user: Any = None,
    subject: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Client:
    """Return a guarded copy of a client of the SDK, sharing its connections.

    Takes ``Anthropic`` and ``AsyncAnthropic`` and the clients for Bedrock, Vertex and Foundry.
    Guard a client last: middleware that is added later runs inside the guard, and
    ``with_options(middleware=[])`` takes the guard off. Guarding twice replaces the first.
    """
    if not hasattr(client, "with_middleware") or isinstance(client, type):
        raise TypeError(
            f"guard() takes a client of the anthropic SDK, not {type(client).__name__}."
        )
    payer = Payer(feature=feature, user=user, subject=subject, tags=tags or {})
    return cast(Client, _guarded(client, payer))


def _guarded(client: Any, payer: Payer) -> Any:
    from ai_budget.guard.middleware import BudgetGuard

    provider, region = platform_of(client)
    others = [one for one in client.middleware if not isinstance(one, BudgetGuard)]
    guard = BudgetGuard(payer, provider=provider, region=region)
    return client.with_options(middleware=[*others, guard])


def bare() -> Anthropic:
    """Return the settings' own client without a guard, for what was reserved before.

    Raises ``ImproperlyConfigured`` without a key.
    """
    shared: Anthropic = _shared(*_key())
    return shared


def platform_of(client: Any) -> tuple[str, str]:
    """Return the provider whose prices a client pays, and the region it is in."""
    modules = [base.__module__ for base in type(client).__mro__]
    for prefix, provider in _PLATFORMS:
        if any(module.startswith(prefix) for module in modules):
            return provider, str(getattr(client, "aws_region", None) or _region(client) or "")
    return "anthropic", ""


def _region(client: Any) -> Any:
    return getattr(client, "region", None) or getattr(client, "location", None)


_CREDENTIALS = frozenset({"api_key", "auth_token", "credentials", "config", "profile"})
"""Options of the SDK that say who calls, where the settings need not."""


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings' options for the SDK, under the ones that are given."""
    if options.keys() & _CREDENTIALS:
        return {"base_url": conf.BASE_URL, **options}
    key, base_url = _key()
    return {"api_key": key, "base_url": base_url, **options}


def _key() -> tuple[str, str | None]:
    key = conf.API_KEY
    if not key:
        raise ImproperlyConfigured(
            "There is no key for the Anthropic API: set AI_BUDGET['API_KEY'] or the "
            "environment's ANTHROPIC_API_KEY. For development without one, run "
            "'manage.py ai_budget_simulator' and set AI_BUDGET['BASE_URL'] to its address."
        )
    return key, conf.BASE_URL


@lru_cache(maxsize=8)
def _shared(key: str, base_url: str | None) -> Any:
    """Return the process's client, so that connections are kept between calls."""
    import anthropic

    return anthropic.Anthropic(api_key=key, base_url=base_url)


class _LoopClient:
    """A client that is closed with its loop, for nobody else can close what it holds."""

    def __init__(self, key: str, base_url: str | None) -> None:
        import anthropic

        self.client = anthropic.AsyncAnthropic(api_key=key, base_url=base_url)
        self._end = self._close_with(asyncio.get_running_loop())
        # Up to its yield: from there on it is one of the generators that a loop closes as it ends.
        with suppress(StopIteration):
            self._end.__anext__().send(None)

    async def _close_with(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            _of_loops.pop(loop, None)
            await self.client.close()


_of_loops: dict[asyncio.AbstractEventLoop, dict[Any, _LoopClient]] = {}


def _shared_async() -> Any:
    """Return the client of the running event loop, to which its connections belong."""
    import anthropic

    key, base_url = _key()
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return anthropic.AsyncAnthropic(api_key=key, base_url=base_url)
    if loop not in _of_loops:
        _forget_closed_loops()
    clients = _of_loops.setdefault(loop, {})
    if (key, base_url) not in clients:
        clients[key, base_url] = _LoopClient(key, base_url)
    return clients[key, base_url].client


def _forget_closed_loops() -> None:
    """Drop the clients of loops that ended without closing their generators."""
    for loop in list(_of_loops):
        if loop.is_closed():
            _of_loops.pop(loop, None)


def forget_clients() -> None:
    """Close nothing, but make new clients from now on, as a fork needs."""
    _shared.cache_clear()
    _of_loops.clear()


if hasattr(os, "register_at_fork"):
    # A connection must not be used from two processes.
    os.register_at_fork(after_in_child=forget_clients)
