"""A streamed answer as the body of a response: lines of JSON, for ``ask.js``.

Each line is an object with one key: ``text`` (a piece of the answer), ``receipt`` (HTML, once
the answer is complete) or ``error`` (a sentence; the connection to the API broke).
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
)
from typing import TYPE_CHECKING, Any

from asgiref.sync import async_to_sync, sync_to_async
from django.http import HttpRequest, StreamingHttpResponse
from django.template.loader import render_to_string

import ai_budget
from ai_budget.periods import Period
from example_project.desk.usage import allowance

if TYPE_CHECKING:
    from ai_budget.service import AsyncStreamedText, StreamedText

log = logging.getLogger(__name__)

BROKEN = "The answer broke off here. What it cost until now is on your usage page."


def open_sync(request: HttpRequest, question: str, *, system: str) -> SyncBody:
    """Start the answer, for a WSGI server. Raises what a refused call raises."""
    return SyncBody(request.user, ai_budget.stream(question, **_call(request.user, system)))


async def open_async(request: HttpRequest, question: str, *, system: str) -> AsyncBody:
    """Start the answer, for an ASGI server. Raises what a refused call raises."""
    user = await request.auser()
    return await AsyncBody(user).open(ai_budget.astream(question, **_call(user, system)))


def response(body: SyncBody | AsyncBody) -> StreamingHttpResponse:
    """Send each line at once: nothing on the way may keep or collect them."""
    return StreamingHttpResponse(
        body,
        content_type="application/x-ndjson",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


class SyncBody:
    """The lines of an answer, for WSGI servers.

    The server calls ``close`` when all is sent or the reader has left. That ends the call
    upstream, even if no line was ever read: a bare generator that never started would not.
    """

    def __init__(self, user: Any, opening: AbstractContextManager[StreamedText]) -> None:
        self._call = ExitStack()
        self._answer = self._call.enter_context(opening)
        self._user = user
        self._lines = self._write()

    def __iter__(self) -> Iterator[bytes]:
        return self._lines

    def close(self) -> None:
        self._lines.close()
        self._call.close()

    def _write(self) -> Generator[bytes, None, None]:
        try:
            with self._call:
                for text in self._answer:
                    yield _line(text=text)
            yield _line(receipt=_receipt(self._user, self._answer))
        except Exception:
            # The status is sent already: whatever broke, saying so is all that can be done.
            log.exception("a streamed answer broke off")
            yield _line(error=BROKEN)


class AsyncBody:
    """The same lines for ASGI servers, which cancel the request when the reader leaves."""

    def __init__(self, user: Any) -> None:
        self._call = AsyncExitStack()
        self._user = user
        self._lines = self._write()

    async def open(self, opening: AbstractAsyncContextManager[AsyncStreamedText]) -> AsyncBody:
        self._answer = await self._call.enter_async_context(opening)
        return self

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._lines

    def close(self) -> None:
        """Django calls this in a thread beside the event loop that the stream belongs to."""
        async_to_sync(self._aclose)()

    async def _aclose(self) -> None:
        await self._lines.aclose()
        await self._call.aclose()

    async def _write(self) -> AsyncGenerator[bytes, None]:
        try:
            async with self._call:
                async for text in self._answer:
                    yield _line(text=text)
            yield _line(receipt=await sync_to_async(_receipt)(self._user, self._answer))
        except Exception:
            log.exception("a streamed answer broke off")
            yield _line(error=BROKEN)


def _call(user: Any, system: str) -> dict[str, Any]:
    return {"feature": "chat", "user": user, "system": system}


def _line(**entry: str) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _receipt(user: Any, answer: Any) -> str:
    context = {"answer": answer, "today": allowance(user, Period.DAY)}
    return render_to_string("desk/_receipt.html", context)
