"""Readers who leave a real server in the middle of an answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from ai_budget.models import CallLog
from ai_budget.testing import AnthropicSimulator, Hang, Reply, override_budget
from tests.guard.books import assert_balanced, assert_exact, bill, only_row, wait_until

pytestmark = pytest.mark.django_db(transaction=True)

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30  # seconds, for a machine that is busy
STORY = "Once upon a time there was a budget that held. " * 30
SLOWLY = Reply(text=STORY, chunk_delay=0.05)
"""Some three seconds of it."""

COMMANDS = {
    "gunicorn": "gunicorn tests.servers.wsgi --bind fd://{fd} --workers 1 --graceful-timeout 1",
    "uvicorn": "uvicorn tests.servers.asgi:application --fd {fd} --log-level warning",
}
PAGES = {"gunicorn": "/tell/", "uvicorn": "/atell/"}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server process, and the page of its that streams."""

    name: str
    address: tuple[str, int]

    @property
    def page(self) -> str:
        return PAGES[self.name]

    def get(self, path: str) -> socket.socket:
        """Ask for a page, over a connection of one's own."""
        connection = socket.create_connection(self.address, timeout=PATIENCE)
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return connection


@pytest.fixture(scope="module")
def api() -> Iterator[AnthropicSimulator]:
    with AnthropicSimulator() as running:
        yield running


@pytest.fixture(autouse=True)
def empty(api: AnthropicSimulator) -> None:
    api.reset()


def started(
    name: str, api: AnthropicSimulator, django_db_setup: None, log: Path
) -> Iterator[Server]:
    """Run a server on a port that is open before it starts, so that nobody waits for it."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener, log.open("wb") as output:
        fd = listener.fileno()
        os.set_inheritable(fd, True)
        process = subprocess.Popen(
            [sys.executable, "-m", *COMMANDS[name].format(fd=fd).split()],
            cwd=ROOT,
            env={**os.environ, "AI_BUDGET_TEST_API": api.base_url},
            pass_fds=[fd],
            stdout=output,
            stderr=output,
        )
        try:
            yield Server(name=name, address=listener.getsockname())
        finally:
            process.terminate()
            process.wait(PATIENCE)


@pytest.fixture(scope="module", params=list(COMMANDS))
def server(
    request: pytest.FixtureRequest,
    api: AnthropicSimulator,
    django_db_setup: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("servers") / f"{request.param}.log"
    yield from started(request.param, api, django_db_setup, log)


@pytest.fixture(scope="module")
def uvicorn(
    api: AnthropicSimulator, django_db_setup: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("servers") / "uvicorn.log"
    yield from started("uvicorn", api, django_db_setup, log)


def read(connection: socket.socket, until: bytes) -> bytes:
    """Read until some bytes have come."""
    got = b""
    while until not in got:
        piece = connection.recv(4_096)
        assert piece, got
        got += piece
    return got


def test_a_story_that_is_read_to_its_end_is_exact(api: AnthropicSimulator, server: Server) -> None:
    api.enqueue(Reply(text=STORY))

    with closing(server.get(server.page)) as reader:
        read(reader, b"\r\n0\r\n\r\n")

    wait_until(lambda: only_row().status != CallLog.Status.RESERVED, PATIENCE)
    assert_exact(api)


def test_a_reader_who_leaves_ends_the_call_and_is_booked_in_part(
    api: AnthropicSimulator, server: Server
) -> None:
    api.enqueue(SLOWLY)

    with closing(server.get(server.page)) as reader:
        read(reader, b"Once upon a time")

    wait_until(lambda: only_row().status != CallLog.Status.RESERVED, PATIENCE)
    api.wait_until_idle()
    row = only_row()
    assert row.status == CallLog.Status.ESTIMATED
    assert bill(api)[0] <= (row.cost_nanousd or 0) < row.reserved_nanousd
    assert api.billed[0].usage["output_tokens"] < len(STORY) / 4  # it was not told to its end
    assert_balanced()


def test_readers_who_leave_at_once_are_all_booked(api: AnthropicSimulator, server: Server) -> None:
    api.default = SLOWLY
    readers = [server.get(server.page) for _ in range(3)]
    for reader in readers:
        with closing(reader):
            read(reader, b"Once upon a time")

    wait_until(lambda: CallLog.objects.filter(status="estimated").count() == 3, PATIENCE)
    assert_balanced()


def test_a_reader_who_leaves_before_the_answer_ends_the_call(
    api: AnthropicSimulator, uvicorn: Server
) -> None:
    api.enqueue(Hang(seconds=20))

    with closing(uvicorn.get("/answer/")):
        wait_until(lambda: api.requests, PATIENCE)

    wait_until(lambda: only_row().status != CallLog.Status.RESERVED, PATIENCE)
    api.wait_until_idle()
    row = only_row()
    assert (row.status, row.error) == ("estimated", "CancelledError")
    assert row.cost_nanousd == row.reserved_nanousd
    assert_balanced()


def test_a_refused_story_has_no_first_piece(api: AnthropicSimulator, server: Server) -> None:
    with (
        override_budget("tales", daily_limit_usd=0),
        closing(server.get(server.page)) as reader,
    ):
        while reader.recv(65_536):  # until the server gives up
            pass

    assert api.requests == []
    assert not CallLog.objects.exists()
