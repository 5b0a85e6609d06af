"""Reading events off the wire, however the network cuts them."""

from __future__ import annotations

import base64
import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_budget.guard.stream import (
    BodyReader,
    EventReader,
    FrameReader,
    Reader,
    StreamedAnswer,
    decoded,
)

START = {
    "type": "message_start",
    "message": {"usage": {"input_tokens": 12, "output_tokens": 1, "cache_creation": None}},
}
TEXT = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
DELTA = {
    "type": "content_block_delta",
    "index": 0,
    "delta": {"type": "text_delta", "text": "Grüße, 世界"},
}
END = {
    "type": "message_delta",
    "delta": {"stop_reason": "end_turn"},
    "usage": {"output_tokens": 9, "cache_creation_input_tokens": 7},
}
STOP = {"type": "message_stop"}
EVENTS: list[dict[str, Any]] = [START, TEXT, DELTA, END, STOP]


def server_sent(events: Iterable[Any], newline: str = "\n") -> bytes:
    lines = [
        f"event: {event['type']}{newline}data: {json.dumps(event, ensure_ascii=False)}{newline}"
        for event in events
    ]
    return "".join(f"{line}{newline}" for line in lines).encode()


def frame(payload: bytes, headers: bytes = b"") -> bytes:
    """One frame of an AWS event stream around a payload."""
    total = 12 + len(headers) + len(payload) + 4
    prelude = struct.pack(">II", total, len(headers))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + headers + payload
    return message + struct.pack(">I", zlib.crc32(message))


def header(name: str, value: str) -> bytes:
    """A header of a frame whose value is a text."""
    return struct.pack(
        f">B{len(name)}sBH{len(value)}s", len(name), name.encode(), 7, len(value), value.encode()
    )


CHUNK = header(":message-type", "event") + header(":event-type", "chunk")
EXCEPTION = header(":message-type", "exception") + header(":exception-type", "throttlingException")


def framed(events: Iterable[Any]) -> bytes:
    return b"".join(
        frame(json.dumps({"bytes": base64.b64encode(json.dumps(event).encode()).decode()}).encode())
        for event in events
    )


def pieces(body: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    return [body[start:end] for start, end in itertools.pairwise(edges)]


def read(make: Callable[[StreamedAnswer], Reader], parts: Iterable[bytes]) -> StreamedAnswer:
    answer = StreamedAnswer()
    reader = make(answer)
    for part in parts:
        reader.feed(part)
    answer.first_token_at = None  # the only part that no two readings share
    return answer


WHOLE = StreamedAnswer(
    usage={"input_tokens": 12, "output_tokens": 9, "cache_creation_input_tokens": 7},
    begun=True,
    ended=True,
    final_usage=True,
    blocks=1,
    output_bytes=len("text") + len("text_delta") + len("Grüße, 世界".encode()),
    stop_reason="end_turn",
)
CUTS = st.lists(st.integers(min_value=0, max_value=10_000), max_size=30)


@given(cuts=CUTS, newline=st.sampled_from(["\n", "\r\n"]))
def test_events_are_read_wherever_the_network_cuts_them(cuts: list[int], newline: str) -> None:
    assert read(EventReader, pieces(server_sent(EVENTS, newline), cuts)) == WHOLE


@given(cuts=CUTS)
def test_frames_are_read_wherever_the_network_cuts_them(cuts: list[int]) -> None:
    assert read(FrameReader, pieces(framed(EVENTS), cuts)) == WHOLE


@given(cuts=CUTS, encoding=st.sampled_from(["gzip", "x-gzip", "deflate"]))
def test_compressed_events_are_read_wherever_the_network_cuts_them(
    cuts: list[int], encoding: str
) -> None:
    compressor = zlib.compressobj(wbits=15 if encoding == "deflate" else 31)
    body = compressor.compress(server_sent(EVENTS)) + compressor.flush()

    def make(answer: StreamedAnswer) -> Reader:
        return decoded(EventReader(answer), encoding)

    assert read(make, pieces(body, cuts)) == WHOLE


def test_single_bytes_are_enough() -> None:
    body = framed(EVENTS)
    assert read(FrameReader, pieces(body, range(len(body)))) == WHOLE


def test_frames_carry_headers_before_their_payload() -> None:
    payload = json.dumps({"bytes": base64.b64encode(json.dumps(START).encode()).decode()})

    answer = read(FrameReader, [frame(payload.encode(), CHUNK)])

    assert answer.begun


def test_an_exception_frame_is_an_error_of_the_stream() -> None:
    answer = read(
        FrameReader, [framed([START, TEXT]), frame(b'{"message":"Too many requests"}', EXCEPTION)]
    )

    assert answer.error == "exception of the platform"
    assert not answer.complete


@pytest.mark.parametrize(
    "junk",
    [
        struct.pack(">III", 5, 0, 0) + b"x" * 40,
        struct.pack(">III", 2**31, 0, 0) + b"x" * 40,
        struct.pack(">III", 40, 2**20, 0) + b"x" * 40,
        b"HTTP/1.1 500 Internal Server Error\r\n\r\n",
    ],
    ids=["shorter than a frame", "longer than any", "headers longer than it", "no frame at all"],
)
def test_after_what_is_no_frame_nothing_more_is_believed(junk: bytes) -> None:
    answer = read(FrameReader, [framed([START, TEXT, DELTA]), junk, framed([END, STOP])])

    assert answer.begun
    assert answer.unreadable
    assert not answer.complete


def test_a_frame_that_holds_no_event_is_noted() -> None:
    assert read(FrameReader, [frame(b"not json")]).unreadable
    assert read(FrameReader, [frame(b'{"bytes": 7}')]).unreadable


@pytest.mark.parametrize(
    "line",
    [
        b"data: {broken\n",
        b"data: [1, 2]\n",
        b'data: {"type": "message_delta", "usage": 5}\n',
        b'data: {"type": "message_start", "message": [1]}\n',
        b'data: {"type": "content_block_delta", "delta": "text"}\n',
        b'data: {"type": "content_block_start", "content_block": 4}\n',
        b'data: {"type": "error", "error": "what"}\n',
        b"data: " + b"[" * 200_000 + b"\n",
    ],
)
def test_an_event_of_an_unknown_shape_is_noted_and_harms_nobody(line: bytes) -> None:
    answer = read(EventReader, [server_sent([START]), line])

    assert answer.begun
    assert answer.unreadable


def test_unknown_events_and_comments_are_passed_over() -> None:
    body = b": a comment\n\nevent: new\ndata: {}\nid: 4\nretry: 10\n\n" + server_sent(EVENTS)

    assert read(EventReader, [body]) == WHOLE


def test_a_stream_without_final_usage_is_not_complete() -> None:
    bare_end = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}

    answer = read(EventReader, [server_sent([START, TEXT, DELTA, bare_end, STOP])])

    assert answer.ended
    assert not answer.complete


def test_output_after_a_message_delta_makes_its_usage_less_than_final() -> None:
    answer = read(EventReader, [server_sent([START, TEXT, DELTA, END, TEXT, DELTA])])

    assert not answer.final_usage
    assert answer.shown_tokens >= 9 + len("Grüße, 世界".encode())


def test_a_start_without_input_tokens_is_no_beginning() -> None:
    assert not read(EventReader, [server_sent([{"type": "message_start", "message": {}}])]).begun


def test_tool_calls_are_remembered_and_their_names_counted() -> None:
    tool = {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {}}
    answer = read(
        EventReader, [server_sent([{"type": "content_block_start", "content_block": tool}])]
    )

    assert answer.tool_use_ids == ["toolu_1"]
    assert answer.output_bytes == len("tool_use" + "toolu_1" + "look_up")


def test_a_broken_compression_gives_up_what_follows() -> None:
    answer = StreamedAnswer()
    reader = decoded(EventReader(answer), "gzip")

    reader.feed(b"this is not gzip")
    reader.feed(server_sent(EVENTS))

    assert answer == StreamedAnswer(unreadable=True)


def test_a_body_in_an_unknown_encoding_is_left_unread() -> None:
    body = BodyReader()
    reader = decoded(body, "br")

    reader.feed(b"{}")
    reader.give_up()

    assert body.body == b""
