"""Runs the example site as processes of its own, and looks at it from outside."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import urlencode

from ai_budget.testing.simulator import AnthropicSimulator

ROOT = Path(__file__).resolve().parents[2]
READY = "Ctrl-C stops it."
PATIENCE = 60  # seconds, for a machine that is busy
FIRST_PORT = "8300"

Call = tuple[int, str, str, str]
"""A row of the log: id, feature, status, error."""


class Browser:
    """A reader signed in as ada, over plain HTTP."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._cookies: dict[str, str] = {}
        self._open: list[HTTPConnection | HTTPResponse] = []
        self.get("/sign-in/")
        welcome = self.post("/sign-in/", {"username": "ada", "password": "ada"})
        assert welcome.status == 302

    def get(self, path: str) -> HTTPResponse:
        return self._send("GET", path, None)

    def post(self, path: str, form: dict[str, str]) -> HTTPResponse:
        token = {"csrfmiddlewaretoken": self._cookies["csrftoken"]}
        return self._send("POST", path, urlencode(form | token))

    def _send(self, method: str, path: str, body: str | None) -> HTTPResponse:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in self._cookies.items())}
        if body is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        self._open += [response, connection]
        for cookie in response.headers.get_all("Set-Cookie") or ():
            name, _, value = cookie.partition(";")[0].partition("=")
            self._cookies[name] = value
        return response

    def close(self) -> None:
        """Leave, wherever an answer is."""
        while self._open:
            self._open.pop().close()


@contextmanager
def demo(database: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the demo up to its last line; end it by Ctrl-C."""
    if not options:
        options = ("--port", FIRST_PORT)
    process = start(["manage.py", "demo", *options], environment(database))
    try:
        yield process, read_until(process, READY)
    finally:
        stop(process)


@contextmanager
def serving(
    command: list[str],
    variables: dict[str, str],
    find_port: Callable[[subprocess.Popen[str]], int],
) -> Iterator[int]:
    process = start(command, variables)
    try:
        yield find_port(process)
    finally:
        stop(process)


def start(command: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
    if process.stdout is not None:
        process.stdout.close()
    process.wait()


def read_until(process: subprocess.Popen[str], last: str) -> str:
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if last in line:
            return read
    raise AssertionError(f"ended before it said {last!r}:\n{read}")


def site_port(output: str) -> int:
    found = re.search(r"Site   http://127\.0\.0\.1:(\d+)/", output)
    assert found
    return int(found[1])


def listening_port(output: str) -> int:
    return int(re.findall(r"http://127\.0\.0\.1:(\d+)", output)[-1])


def calls(database: Path) -> list[Call]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(
            "SELECT id, feature_id, status, error FROM ai_budget_calllog ORDER BY id"
        ).fetchall()


def wait_for_call(database: Path, *, after: int) -> Call:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        row = calls(database)[-1]
        if row[0] > after and row[2] != "reserved":
            return row
        time.sleep(0.05)
    raise AssertionError("the call was never booked")


def environment(database: Path, api: AnthropicSimulator | None = None) -> dict[str, str]:
    """The environment of a process that runs the example over a database of its own."""
    ours = ("DJANGO_SETTINGS_MODULE", "ANTHROPIC_API_KEY", "AI_BUDGET_SIMULATOR_URL")
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    variables |= {"EXAMPLE_DATABASE": str(database), "PYTHONUNBUFFERED": "1"}
    if api is not None:
        variables["AI_BUDGET_SIMULATOR_URL"] = api.base_url
    return variables
