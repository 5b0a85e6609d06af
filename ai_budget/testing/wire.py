"""A small HTTP/1.1 server on loopback: keep-alive, chunks, gzip, and deliberate failures."""

from __future__ import annotations

import contextlib
import gzip
import logging
import socket
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import BinaryIO

logger = logging.getLogger(__name__)

_REASONS = {status.value: status.phrase for status in HTTPStatus} | {529: "Overloaded"}
_LONGEST_LINE = 65_536
_MOST_HEADERS = 200
_BACKLOG = 512
_ACCEPT_RETRY = 0.02  # seconds
_LINGER = 1.0  # seconds
_GZIP_WINDOW = 31


class ClientGone(Exception):
    """The client closed its connection, or the server is stopping."""


class _Malformed(Exception):
    pass


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request as it was read. Header names are in lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    keep_alive: bool


class Exchange:
    """One request, and the ways to answer it. All of them raise ClientGone."""

    def __init__(self, request: HttpRequest, connection: socket.socket, *, compress: bool) -> None:
        self.request = request
        self.reusable = request.keep_alive
        self._connection = connection
        self._gzip = compress and _accepts_gzip(request.headers.get("accept-encoding", ""))
        self._compressor: zlib._Compress | None = None

    def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Sends a whole response."""
        body, encoding = self._encoded(body)
        self._write(self._head(status, {**headers, **encoding}, len(body)) + body)

    def send_half(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Promises the whole of `body`, sends its first half and hangs up."""
        body, encoding = self._encoded(body)
        head = self._head(status, {**headers, **encoding}, len(body))
        self._write(head + body[: len(body) // 2])
        self.hang_up()

    def start_stream(self, status: int, headers: Mapping[str, str]) -> None:
        """Sends the head of a chunked response."""
        encoding: dict[str, str] = {}
        if self._gzip:
            self._compressor = zlib.compressobj(level=1, wbits=_GZIP_WINDOW)
            encoding = {"content-encoding": "gzip", "vary": "Accept-Encoding"}
        self._write(self._head(status, {**headers, **encoding}, None))

    def send_chunk(self, data: bytes) -> None:
        """Sends `data` now, so that a reader can see all of it."""
        if self._compressor is not None:
            data = self._compressor.compress(data) + self._compressor.flush(zlib.Z_SYNC_FLUSH)
        self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self) -> None:
        """Ends a chunked response as HTTP wants it."""
        rest = self._compressor.flush() if self._compressor is not None else b""
        last = b"%x\r\n%b\r\n" % (len(rest), rest) if rest else b""
        self._write(last + b"0\r\n\r\n")

    def pause(self, seconds: float) -> None:
        """Waits, and raises ClientGone as soon as the client leaves."""
        if seconds <= 0:
            return
        until = time.monotonic() + seconds
        try:
            self._connection.settimeout(seconds)
            sent_something = self._connection.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return
        except OSError as error:
            raise ClientGone from error
        finally:
            self._connection.settimeout(None)
        if not sent_something:
            raise ClientGone
        # A client that sends its next request early is there, but can no longer be watched.
        time.sleep(max(0.0, until - time.monotonic()))

    def hang_up(self) -> None:
        """Closes the connection, whatever was promised."""
        self.reusable = False
        _shut(self._connection)

    def _encoded(self, body: bytes) -> tuple[bytes, dict[str, str]]:
        if not self._gzip:
            return body, {}
        encoding = {"content-encoding": "gzip", "vary": "Accept-Encoding"}
        return gzip.compress(body, compresslevel=1, mtime=0), encoding

    def _head(self, status: int, headers: Mapping[str, str], length: int | None) -> bytes:
        lines = [
            f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}",
            f"date: {formatdate(usegmt=True)}",
            *[f"{name}: {value}" for name, value in headers.items()],
            "transfer-encoding: chunked" if length is None else f"content-length: {length}",
            f"connection: {'keep-alive' if self.reusable else 'close'}",
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")

    def _write(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except OSError as error:
            raise ClientGone from error


class LoopbackServer:
    """Serves each connection in a daemon thread, and stops at once when told.

    handle: called with every Exchange, from many threads.
    Raises OSError if the port is taken.
    """

    def __init__(
        self,
        address: IPv4Address | IPv6Address,
        port: int,
        handle: Callable[[Exchange], None],
        *,
        compress: bool,
    ) -> None:
        self._handle = handle
        self._compress = compress
        self._changed = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._busy = 0
        self._stopping = False
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((str(address), port))
            self._listener.listen(_BACKLOG)
        except BaseException:
            self._listener.close()
            raise
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(
            target=self._accept, name="ai-budget-simulator", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Closes the port and every connection."""
        with self._changed:
            self._stopping = True
        # accept() is not woken by closing its socket, but by a caller.
        with socket.create_connection(self._listener.getsockname()[:2], timeout=5):
            pass
        self._thread.join()
        self._listener.close()
        with self._changed:
            for connection in self._connections:
                _shut(connection)
            self._changed.wait_for(lambda: not self._connections, timeout=5)

    def wait_until_idle(self, timeout: float) -> bool:
        """Waits until no request is being handled; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._busy == 0, timeout)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # too many open files, or a client that left at once
                time.sleep(_ACCEPT_RETRY)
                continue
            with self._changed:
                if self._stopping:
                    connection.close()
                    return
                self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        reader = connection.makefile("rb")
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError, ClientGone):
                while self._serve_one(connection, reader):
                    pass
        finally:
            _shut(connection)
            reader.close()
            connection.close()
            with self._changed:
                self._connections.discard(connection)
                self._changed.notify_all()

    def _serve_one(self, connection: socket.socket, reader: BinaryIO) -> bool:
        try:
            request = _read_request(connection, reader)
        except (_Malformed, ValueError):
            _refuse(connection)
            return False
        if request is None:
            return False
        exchange = Exchange(request, connection, compress=self._compress)
        with self._changed:
            self._busy += 1
        try:
            self._handle(exchange)
        finally:
            with self._changed:
                self._busy -= 1
                if self._busy == 0:
                    self._changed.notify_all()
        return exchange.reusable


def loopback_address(host: str) -> IPv4Address | IPv6Address:
    """The address that `host` names. Raises ValueError if others could reach it."""
    try:
        address = ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ValueError(f"{host!r} is not a loopback address") from None
    if not address.is_loopback:
        raise ValueError(f"{host!r} is not a loopback address")
    return address


def _accepts_gzip(accept_encoding: str) -> bool:
    for offer in accept_encoding.lower().split(","):
        name, _, quality = offer.replace(" ", "").partition(";q=")
        if name in ("gzip", "*"):
            return quality not in ("0", "0.0", "0.00", "0.000")
    return False


def _read_request(connection: socket.socket, reader: BinaryIO) -> HttpRequest | None:
    line = _read_line(reader)
    if not line:
        return None
    method, target, version = line.split(" ", 2)
    headers: dict[str, str] = {}
    for _ in range(_MOST_HEADERS):
        line = _read_line(reader)
        if not line:
            break
        name, colon, value = line.partition(":")
        if not colon:
            raise _Malformed
        name = name.lower()
        value = value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    else:
        raise _Malformed
    if headers.get("expect", "").lower() == "100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    path, _, query = target.partition("?")
    keep_alive = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    body = _read_body(reader, headers)
    return HttpRequest(method, path, query, headers, body, keep_alive)


def _read_line(reader: BinaryIO) -> str:
    line = reader.readline(_LONGEST_LINE)
    if len(line) == _LONGEST_LINE:
        raise _Malformed
    return line.decode("latin-1").rstrip("\r\n")


def _read_body(reader: BinaryIO, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return _read_exactly(reader, int(headers.get("content-length", 0)))
    chunks: list[bytes] = []
    while size := int(_read_line(reader).partition(";")[0], 16):
        chunks.append(_read_exactly(reader, size))
        _read_line(reader)
    while _read_line(reader):  # trailers
        pass
    return b"".join(chunks)


def _read_exactly(reader: BinaryIO, size: int) -> bytes:
    data = reader.read(size)
    if len(data) < size:
        raise ConnectionError("the request ended early")
    return data


def _refuse(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
    # Closing with unread bytes would reset the connection before the answer is read.
    connection.shutdown(socket.SHUT_WR)
    connection.settimeout(_LINGER)
    while connection.recv(_LONGEST_LINE):
        pass


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # already closed from the other side
        connection.shutdown(socket.SHUT_RDWR)
