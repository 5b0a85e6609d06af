"""Django middleware: who pays for a request's calls, and what its reader sees of a refusal."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import Context, copy_context
from typing import Any, cast

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import (
    FileResponse,
    HttpRequest,
    HttpResponse,
    JsonResponse,
    StreamingHttpResponse,
)
from django.http.response import HttpResponseBase
from django.shortcuts import render
from django.utils.cache import patch_vary_headers
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from ai_budget.exceptions import (
    AIBudgetError,
    BudgetExceeded,
    FeatureDisabled,
    LedgerUnavailable,
    LimitReached,
    QuotaExceeded,
    RateLimited,
)
from ai_budget.guard.charge import charge, current_level, exchange_levels
from ai_budget.scopes import OF_CALLERS

_LEDGER_RETRY_SECONDS = 30

_Handler = Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]


class BudgetMiddleware:
    """Charges ``request.user`` for the calls of a view and of the body that it streams.

    A limit that refuses becomes a 429 with ``Retry-After``, a paused feature or an unreachable
    ledger a 503: JSON for an API client, a small page for a browser. The answer to a reader
    never tells what the site or a feature spends; a user's own quota it does.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: _Handler) -> None:
        self.get_response = get_response
        self.is_async = iscoroutinefunction(get_response)
        if self.is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        if self.is_async:
            return self._call_async(request)
        with charge(user=_UserOf(request)):
            response = cast(HttpResponseBase, self.get_response(request))
            return _charge_body(response)

    async def _call_async(self, request: HttpRequest) -> HttpResponseBase:
        with charge(user=_UserOf(request)):
            response = await cast("Awaitable[HttpResponseBase]", self.get_response(request))
            return _charge_body(response)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Turn a refusal into its answer; other errors are not ours."""
        if isinstance(exception, AIBudgetError):
            return refused(request, exception)
        return None


class _UserOf:
    """The user of a request at the moment of a call: a view may recognise one by itself.

    So do the views of an API that takes tokens, and middleware that comes after this one.
    """

    def __init__(self, request: HttpRequest) -> None:
        self._request = request

    @property
    def is_authenticated(self) -> bool:
        user = getattr(self._request, "user", None)
        return user is not None and user.is_authenticated

    @property
    def pk(self) -> Any:
        return self._request.user.pk


def refused(request: HttpRequest, error: AIBudgetError) -> HttpResponse | None:
    """Return the answer to a reader for a refusal; None for errors that are the code's own."""
    if isinstance(error, LimitReached):
        status, retry_after = 429, error.retry_after
    elif isinstance(error, FeatureDisabled):
        status, retry_after = 503, None
    elif isinstance(error, LedgerUnavailable):
        status, retry_after = 503, _LEDGER_RETRY_SECONDS
    else:
        return None
    wanted = request.get_preferred_type(["application/json", "text/html"])
    response = (
        render(request, "ai_budget/refused.html", _page(error), status=status)
        if wanted == "text/html"
        else JsonResponse({"error": _details(error)}, status=status)
    )
    if retry_after is not None:
        response["Retry-After"] = str(retry_after)
    response["Cache-Control"] = "no-store"
    patch_vary_headers(response, ["Accept"])
    return response


def _page(error: AIBudgetError) -> dict[str, Any]:
    limit = error if isinstance(error, LimitReached) else None
    # What refills in a moment says so in its message.
    dated = limit is not None and limit.exhausted and not isinstance(limit, RateLimited)
    return {
        "message": _message(error),
        "resets_at": limit.resets_at if limit is not None and dated else None,
        "quota": limit if isinstance(limit, QuotaExceeded) else None,
    }


def _details(error: AIBudgetError) -> dict[str, Any]:
    details: dict[str, Any] = {"type": _type(error), "message": _message(error)}
    if isinstance(error, LimitReached):
        details["exhausted"] = error.exhausted
        details["retry_after"] = error.retry_after
        details["resets_at"] = error.resets_at.isoformat()
    if isinstance(error, LimitReached) and _is_of_caller(error):
        details["measure"] = error.measure
        details["limit"] = error.limit
        details["spent"] = error.spent
        details["held"] = error.held
    return details


def _is_of_caller(error: LimitReached) -> bool:
    """Say whether a limit is the reader's own; what others use is not told."""
    return isinstance(error, QuotaExceeded) or error.scope.startswith(_SCOPES_OF_CALLERS)


_SCOPES_OF_CALLERS = (*OF_CALLERS, "view:")


def _type(error: AIBudgetError) -> str:
    """Name the kind of refusal for programs; a project's own subclass is what it derives from."""
    return next(_TYPES[kind] for kind in type(error).__mro__ if kind in _TYPES)


_TYPES: dict[type, str] = {
    BudgetExceeded: "budget_exceeded",
    QuotaExceeded: "quota_exceeded",
    RateLimited: "rate_limited",
    LimitReached: "limit_reached",
    FeatureDisabled: "feature_disabled",
    LedgerUnavailable: "unavailable",
}


def _message(error: AIBudgetError) -> str:
    if isinstance(error, LimitReached) and not error.exhausted:
        return _("Many answers are being written at this moment. Please try again shortly.")
    if isinstance(error, RateLimited) and error.refusal.delay is not None:
        return ngettext(
            "Too many requests. Please try again in %(seconds)d second.",
            "Too many requests. Please try again in %(seconds)d seconds.",
            error.retry_after,
        ) % {"seconds": error.retry_after}
    if isinstance(error, QuotaExceeded):
        return _("You have used what is yours for now.")
    if isinstance(error, LimitReached):
        return _("This feature has reached its limit for now.")
    return _("This feature is switched off at the moment.")


def _charge_body(response: HttpResponseBase) -> HttpResponseBase:
    """Let a streamed body run with the charge of its request, which ends before the body does.

    A file makes no calls, and only as it is can the server send it by itself.
    """
    if isinstance(response, StreamingHttpResponse) and not isinstance(response, FileResponse):
        context = copy_context()
        body: Any = response.streaming_content
        response.streaming_content = (
            _run_async(context, body) if response.is_async else _run(context, body)
        )
    return response


def _run(context: Context, body: Iterator[bytes]) -> Iterator[bytes]:
    """Yield from an iterator, each step of it in the given context."""
    done = object()
    while (piece := context.run(next, body, done)) is not done:
        yield cast(bytes, piece)


async def _run_async(context: Context, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield from an async iterator, its charges in force for each step and gone between them.

    A task runs in the context of whoever made it, so the context itself cannot be entered.
    """
    level = context.run(current_level)
    try:
        while True:
            outer = exchange_levels(level)
            try:
                piece = await anext(body)
            except StopAsyncIteration:
                return
            finally:
                level = exchange_levels(outer)
            yield piece
    finally:
        close = getattr(body, "aclose", None)
        if close is not None:
            outer = exchange_levels(level)
            try:
                await close()
            finally:
                exchange_levels(outer)
