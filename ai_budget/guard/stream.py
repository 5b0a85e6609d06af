"""Reads usage off the wire while an answer passes by, without holding it up.

Two framings carry the same events: server-sent events, and the frames of an AWS event stream
on Bedrock. Whatever cannot be read is passed on untouched; its call is booked at its bound.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from ai_budget import periods

ALLOWANCE_TOKENS = 512
"""Output that may have been on its way when a reader left: some seconds of generation."""

_AWS_PRELUDE = 12  # total length, headers' length, checksum
_AWS_CHECKSUM = 4
_LONGEST_FRAME = 64 * 1024 * 1024


@dataclass(slots=True)
class StreamedAnswer:
    """What has been seen of an answer so far."""

    usage: dict[str, Any] = field(default_factory=dict)
    begun: bool = False
    complete: bool = False
    final_usage: bool = False
    thinking: bool = False
    blocks: int = 0
    output_bytes: int = 0
    stop_reason: str = ""
    error: str = ""
    first_token_at: float | None = None
    tool_use_ids: list[str] = field(default_factory=list)

    def see(self, event: dict[str, Any]) -> None:
        """Take note of one event of the stream."""
        see = _EVENTS.get(str(event.get("type")))
        if see is not None:
            see(self, event)

    def _message_start(self, event: dict[str, Any]) -> None:
        self.begun = True
        self._merge((event.get("message") or {}).get("usage"))

    def _block_start(self, event: dict[str, Any]) -> None:
        block = event.get("content_block") or {}
        self.blocks += 1
        if block.get("type") in ("thinking", "redacted_thinking"):
            self.thinking = True
        if block.get("type") == "tool_use" and block.get("id"):
            self.tool_use_ids.append(str(block["id"]))

    def _block_delta(self, event: dict[str, Any]) -> None:
        if self.first_token_at is None:
            self.first_token_at = periods.monotonic()
        delta = event.get("delta") or {}
        for value in delta.values():
            if isinstance(value, str):
                self.output_bytes += len(value.encode("utf-8", "surrogatepass"))

    def _message_delta(self, event: dict[str, Any]) -> None:
        self.stop_reason = str((event.get("delta") or {}).get("stop_reason") or self.stop_reason)
        self.final_usage = bool(event.get("usage"))
        self._merge(event.get("usage"))

    def _message_stop(self, event: dict[str, Any]) -> None:
        self.complete = True

    def _error(self, event: dict[str, Any]) -> None:
        self.error = str((event.get("error") or {}).get("type") or "error")

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
    """Takes the bytes of a body as they pass."""

    def feed(self, data: bytes) -> None: ...


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


class FrameReader:
    """Reads the frames of an AWS event stream, each with an event in its payload.

    https://docs.aws.amazon.com/AmazonS3/latest/API/RESTSelectObjectAppendix.html
    """

    def __init__(self, answer: StreamedAnswer) -> None:
        self._answer = answer
        self._rest = b""

    def feed(self, data: bytes) -> None:
        self._rest += data
        while len(self._rest) >= _AWS_PRELUDE:
            total, headers = struct.unpack(">II", self._rest[:8])
            if not _AWS_PRELUDE + _AWS_CHECKSUM <= total <= _LONGEST_FRAME:
                self._rest = b""  # not a frame: the bound will be booked
                return
            if len(self._rest) < total:
                return
            payload = self._rest[_AWS_PRELUDE + headers : total - _AWS_CHECKSUM]
            self._rest = self._rest[total:]
            self._see(payload)

    def _see(self, payload: bytes) -> None:
        try:
            _see(self._answer, base64.b64decode(json.loads(payload)["bytes"]))
        except (ValueError, KeyError, TypeError, binascii.Error):
            return


class BodyReader:
    """Keeps a body of JSON that the caller reads by itself, piece by piece."""

    def __init__(self) -> None:
        self.body = bytearray()

    def feed(self, data: bytes) -> None:
        self.body += data


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
            self._decoder = None


_ZLIB = frozenset({"gzip", "x-gzip", "deflate"})


def decoded(reader: Reader, encoding: str) -> Reader:
    """Return a reader of the body as the server sent it."""
    return reader if encoding in ("", "identity") else Decompressing(reader, encoding)


def _see(answer: StreamedAnswer, data: bytes) -> None:
    try:
        event = json.loads(data)
    except ValueError:
        return
    if isinstance(event, dict):
        answer.see(event)


class _Tap:
    """What both kinds of tapped body share: everything that is asked of the body itself."""

    def __init__(self, body: Any, reader: Reader) -> None:
        self._body = body
        self._reader = reader
        self._failure = ""
        self._ended = False

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

            def close(self) -> None:
                try:
                    self._body.close()
                finally:
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

            async def aclose(self) -> None:
                try:
                    await self._body.aclose()
                finally:
                    await self._finish(self._ended, self._failure)

        _classes = Tapped, AsyncTapped
    return _classes


_classes: tuple[type[Any], type[Any]] | None = None
