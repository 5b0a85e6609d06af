"""Reads usage off the wire while an answer passes by, without holding it up.

Two framings carry the same events: server-sent events, and the frames of an AWS event stream
on Bedrock. Whatever cannot be read is passed on untouched; its call is booked at its bound.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from ai_budget import periods
from ai_budget.guard.events import Assembly

ALLOWANCE_TOKENS = 512
"""Output that may have been on its way when a reader left: some seconds of generation."""

_AWS_PRELUDE = 12  # total length, headers' length, checksum
_AWS_CHECKSUM = 4
_LONGEST_FRAME = 64 * 1024 * 1024


@dataclass(slots=True)
class StreamedAnswer:
    """What has been seen of an answer so far.

    ``unreadable`` says that something passed which could not be read: there may be more than
    was seen. ``assembly`` puts the message together, where somebody else waits for it.
    """

    model: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    begun: bool = False
    ended: bool = False
    final_usage: bool = False
    unreadable: bool = False
    thinking: bool = False
    blocks: int = 0
    output_bytes: int = 0
    stop_reason: str = ""
    error: str = ""
    first_token_at: float | None = None
    tool_use_ids: list[str] = field(default_factory=list)
    assembly: Assembly | None = None

    @property
    def message(self) -> dict[str, Any] | None:
        """The whole message, if it was put together and nothing of it is missing."""
        return None if self.assembly is None or self.unreadable else self.assembly.message

    @property
    def complete(self) -> bool:
        """Whether all of it was seen, and what it used."""
        return self.ended and self.final_usage

    @property
    def shown_tokens(self) -> int:
        """Return the most tokens that what was shown can have been: bytes are at least as many."""
        reported = self.usage.get("output_tokens")
        return max(reported if isinstance(reported, int) else 0, self.output_bytes)

    def see(self, event: dict[str, Any]) -> None:
        """Take note of one event of the stream."""
        see = _EVENTS.get(str(event.get("type")))
        if see is not None:
            see(self, event)
        if self.assembly is not None:
            self.assembly.see(event)

    def _message_start(self, event: dict[str, Any]) -> None:
        message = event.get("message") or {}
        self.model = str(message.get("model") or "")
        self._merge(message.get("usage"))
        self.begun = "input_tokens" in self.usage

    def _block_start(self, event: dict[str, Any]) -> None:
        block = event.get("content_block") or {}
        self.blocks += 1
        self._count(block)
        if block.get("type") in ("thinking", "redacted_thinking"):
            self.thinking = True
        if block.get("type") == "tool_use" and block.get("id"):
            self.tool_use_ids.append(str(block["id"]))

    def _block_delta(self, event: dict[str, Any]) -> None:
        if self.first_token_at is None:
            self.first_token_at = periods.monotonic()
        self._count(event.get("delta") or {})

    def _message_delta(self, event: dict[str, Any]) -> None:
        self.stop_reason = str((event.get("delta") or {}).get("stop_reason") or self.stop_reason)
        usage = event.get("usage") or {}
        self._merge(usage)
        self.final_usage = usage.get("output_tokens") is not None

    def _message_stop(self, event: dict[str, Any]) -> None:
        self.ended = True

    def _error(self, event: dict[str, Any]) -> None:
        self.error = str((event.get("error") or {}).get("type") or "error")

    def _count(self, part: dict[str, Any]) -> None:
        """Count the bytes of new output, which no usage that came before includes."""
        self.final_usage = False
        for value in part.values():
            if isinstance(value, str):
                self.output_bytes += len(value.encode("utf-8", "surrogatepass"))

    def _merge(self, usage: Any) -> None:
        """Lay later counts over earlier ones; they are cumulative."""
        if isinstance(usage, dict):
            self.usage.update({key: value for key, value in usage.items() if value is not None})


_EVENTS: dict[str, Callable[[StreamedAnswer, dict[str, Any]], None]] = {
    "message_start": StreamedAnswer._message_start,
    "content_block_start": StreamedAnswer._block_start,
    "content_block_delta": StreamedAnswer._block_delta,
    "message_delta": StreamedAnswer._message_delta,
    "message_stop": StreamedAnswer._message_stop,
    "error": StreamedAnswer._error,
}


class Reader(Protocol):
    """Takes the bytes of a body as they pass; never raises, for they go on to the caller."""

    def feed(self, data: bytes) -> None: ...

    def give_up(self) -> None:
        """Take note that the rest cannot be read."""


class EventReader:
    """Reads server-sent events."""

    def __init__(self, answer: StreamedAnswer) -> None:
        self._answer = answer
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                _see(self._answer, line[5:])

    def give_up(self) -> None:
        self._answer.unreadable = True


class FrameReader:
    """Reads the frames of an AWS event stream, each with an event in its payload.

    https://docs.aws.amazon.com/AmazonS3/latest/API/RESTSelectObjectAppendix.html
    """

    def __init__(self, answer: StreamedAnswer) -> None:
        self._answer = answer
        self._rest = b""
        self._lost = False

    def feed(self, data: bytes) -> None:
        if self._lost:
            return
        self._rest += data
        while len(self._rest) >= _AWS_PRELUDE:
            total, headers = struct.unpack(">II", self._rest[:8])
            if not _AWS_PRELUDE + _AWS_CHECKSUM + headers <= total <= _LONGEST_FRAME:
                self.give_up()  # not a frame, and nothing says where the next one begins
                return
            if len(self._rest) < total:
                return
            payload = self._rest[_AWS_PRELUDE + headers : total - _AWS_CHECKSUM]
            self._rest = self._rest[total:]
            self._see(payload)

    def give_up(self) -> None:
        self._lost, self._rest = True, b""
        self._answer.unreadable = True

    def _see(self, payload: bytes) -> None:
        try:
            content = json.loads(payload)
            event = base64.b64decode(content["bytes"]) if "bytes" in content else None
        except (ValueError, TypeError, RecursionError):
            self._answer.unreadable = True
            return
        if event is None:
            self._answer.error = "exception of the platform"
        else:
            _see(self._answer, event)


class BodyReader:
    """Keeps a body of JSON that the caller reads by itself, piece by piece."""

    def __init__(self) -> None:
        self.body = bytearray()

    def feed(self, data: bytes) -> None:
        self.body += data

    def give_up(self) -> None:
        """Nothing to note: half a body of JSON is none."""


class Decompressing:
    """Reads a body that was compressed although identity was asked for."""

    def __init__(self, reader: Reader, encoding: str) -> None:
        self._reader = reader
        self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding in _ZLIB else None

    def feed(self, data: bytes) -> None:
        if self._decoder is None:
            return
        try:
            self._reader.feed(self._decoder.decompress(data))
        except zlib.error:
            self.give_up()

    def give_up(self) -> None:
        self._decoder = None
        self._reader.give_up()


_ZLIB = frozenset({"gzip", "x-gzip", "deflate"})


def decoded(reader: Reader, encoding: str) -> Reader:
    """Return a reader of the body as the server sent it."""
    return reader if encoding in ("", "identity") else Decompressing(reader, encoding)


def _see(answer: StreamedAnswer, data: bytes) -> None:
    try:
        answer.see(json.loads(data))
    except (ValueError, TypeError, AttributeError, RecursionError):
        # Not an event as they are documented: the caller gets it, and what it cost is open.
        answer.unreadable = True


class _Tap:
    """What both kinds of tapped body share: everything that is asked of the body itself."""

    def __init__(self, body: Any, reader: Reader) -> None:
        self._body = body
        self._reader = reader
        self._failure = ""
        self._ended = False
        self._finished = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


def tap_classes() -> tuple[type[Any], type[Any]]:
    """Return the tapped bodies, sync and async, as the HTTP library's own streams.

    Made on first use, because the library is not imported before.
    """
    global _classes
    if _classes is None:
        import httpx2

        class Tapped(_Tap, httpx2.SyncByteStream):
            def __init__(
                self, body: Any, reader: Reader, finish: Callable[[bool, str], None]
            ) -> None:
                super().__init__(body, reader)
                self._finish = finish

            def __iter__(self) -> Iterator[bytes]:
                try:
                    for chunk in self._body:
                        self._reader.feed(chunk)
                        yield chunk
                    self._ended = True
                except Exception as error:
                    self._failure = type(error).__name__
                    raise
                # The SDK's span of the request ends with the body, and is to say what it cost.
                self._finish(True, "")
                self._finished = True

            def close(self) -> None:
                try:
                    self._body.close()
                finally:
                    if not self._finished:
                        self._finish(self._ended, self._failure)

        class AsyncTapped(_Tap, httpx2.AsyncByteStream):
            def __init__(
                self, body: Any, reader: Reader, finish: Callable[[bool, str], Any]
            ) -> None:
                super().__init__(body, reader)
                self._finish = finish

            async def __aiter__(self) -> AsyncIterator[bytes]:
                try:
                    async for chunk in self._body:
                        self._reader.feed(chunk)
                        yield chunk
                    self._ended = True
                except Exception as error:
                    self._failure = type(error).__name__
                    raise
                await self._finish(True, "")
                self._finished = True

            async def aclose(self) -> None:
                try:
                    await self._body.aclose()
                finally:
                    if not self._finished:
                        await self._finish(self._ended, self._failure)

        _classes = Tapped, AsyncTapped
    return _classes


_classes: tuple[type[Any], type[Any]] | None = None
