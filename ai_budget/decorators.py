"""``limited``: so many requests to a view, for each user or address."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from inspect import isawaitable
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, TypeVar, cast

from asgiref.sync import iscoroutinefunction, sync_to_async
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from ai_budget.exceptions import LedgerUnavailable, RateLimited
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.connection import lets_pass
from ai_budget.middleware import refused
from ai_budget.values import Bucket, Measure

_View = TypeVar("_View", bound=Callable[..., Any])
_RATE = re.compile(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,4})?([smhd])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_LONGEST_SECONDS = 86_400
_NETWORK_BITS = 64


def limited(
    rate: str, *, feature: str | None = None, by: Callable[[HttpRequest], str] | None = None
) -> Callable[[_View], _View]:
    """Let each user make so many requests to a view: ``@ai_budget.limited("20/m")``.

    ``rate`` is "N/s", "N/m", "N/h" or "N/d", or over several of these such as "20/15m", a day
    at most; it refills evenly. Raises ``ValueError`` at import where it is none of them. Views
    of the same ``feature`` are counted together, others each by itself. What is over the rate
    is answered as ``BudgetMiddleware`` answers: 429 with ``Retry-After``. Where the ledger does
    not answer the view is not reached either, unless ``AI_BUDGET["ON_LEDGER_FAILURE"]`` is
    "allow".

    With the ledger in the database, a view inside a transaction (``ATOMIC_REQUESTS``, or
    ``atomic()`` around it) wants ``AI_BUDGET["LEDGER_DATABASE"]`` to name a second alias, as paid
    calls do. Without one the request is counted in that transaction: the bucket's row is locked
    until the view ends, and a view that fails gives its request back.

    Counted by the user, and visitors by REMOTE_ADDR, the address that connected: an IPv6
    network of /64 as one, for it is one customer's. Behind a proxy that is the proxy's own, and
    all visitors share one rate: such a site sets REMOTE_ADDR itself, from a header that its
    proxy overwrites. X-Forwarded-For is not read, because anybody can write it and so be a new
    visitor each time. ``by`` names who asks in another way: it takes the request and returns a
    text, for instance of an API key.

    It takes sync and async views, and classes by
    ``method_decorator(limited("20/m"), name="dispatch")``.
    """
    amount, seconds = _parsed(rate)

    def decorate(view: _View) -> _View:
        name = feature or _name(view)

        def take(request: HttpRequest) -> HttpResponseBase | None:
            bucket = Bucket(
                # Several rates of one feature do not fill each other's buckets.
                scope=f"view:{name}:{amount}:{_who(request, by)}",
                measure=Measure.REQUESTS,
                amount=amount,
                seconds=seconds,
            )
            return _take(request, bucket)

        async def limit_async(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            response = await sync_to_async(take)(request)
            if response is not None:
                return response
            answer = view(request, *args, **kwargs)
            return cast(HttpResponseBase, await answer if isawaitable(answer) else answer)

        def limit(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            response = take(request)
            if response is not None:
                return response
            return cast(HttpResponseBase, view(request, *args, **kwargs))

        wrapper = limit_async if _is_async(view) else limit
        return cast(_View, functools.wraps(view)(wrapper))

    return decorate


def _is_async(view: Callable[..., Any]) -> bool:
    """Say whether Django awaits what a view returns: so it does of a class with async methods."""
    return iscoroutinefunction(view) or getattr(_instance_of(view), "view_is_async", False)


def _name(view: Callable[..., Any]) -> str:
    """Name a view by its own place, and one that is made of a class by the class."""
    instance = _instance_of(view)
    made_of = getattr(view, "view_class", None) if instance is None else type(instance)
    if made_of is not None:
        return f"{made_of.__module__}.{made_of.__qualname__}.{view.__name__}"
    return f"{view.__module__}.{getattr(view, '__qualname__', type(view).__qualname__)}"


def _instance_of(view: Callable[..., Any]) -> Any:
    """Return whose method a view is: ``method_decorator`` gives a partial of it."""
    return getattr(getattr(view, "func", view), "__self__", None)


def _parsed(rate: str) -> tuple[int, int]:
    """Return how many requests in how many seconds."""
    found = _RATE.fullmatch(rate) if isinstance(rate, str) else None
    if found is None:
        raise ValueError(
            f"{rate!r} is no rate: write a number of requests and a time, such as "
            "'20/m', '5/s', '1000/d' or '20/15m'."
        )
    amount, times, unit = found.groups()
    seconds = int(times or 1) * _SECONDS[unit]
    if seconds > _LONGEST_SECONDS:
        raise ValueError(f"{rate!r} is over more than a day.")
    return int(amount), seconds


def _take(request: HttpRequest, bucket: Bucket) -> HttpResponseBase | None:
    """Take one request from a bucket; return the answer to one that may not go on."""
    ledger = ledgers.current()
    try:
        ledger.take([bucket], at=ledger.now())
    except RateLimited as error:
        return refused(request, error)
    except LedgerUnavailable as error:
        return None if lets_pass(error) else refused(request, error)
    return None


def _who(request: HttpRequest, by: Callable[[HttpRequest], str] | None) -> str:
    if by is not None:
        return f"by:{by(request)}"
    user = getattr(request, "user", None)
    if user is not None and user.is_authenticated:
        return f"user:{user.pk}"
    return f"address:{_network(request.META.get('REMOTE_ADDR', ''))}"


def _network(address: str) -> str:
    """Return what one visitor connects from; what is no address is one visitor for all."""
    try:
        # Where a link is named it says nothing about who it is.
        known = ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    if not isinstance(known, IPv6Address):
        return str(known)
    if known.ipv4_mapped is not None:
        return str(known.ipv4_mapped)
    return str(ip_network((int(known), _NETWORK_BITS), strict=False))
