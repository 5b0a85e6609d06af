"""The example site under real servers, each a process of its own over one SQLite file."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from ai_budget.testing.simulator import AnthropicSimulator
from ai_budget.testing.steps import Reply
from tests.example.processes import (
    FIRST_PORT,
    PATIENCE,
    READY,
    ROOT,
    Browser,
    calls,
    demo,
    environment,
    listening_port,
    read_until,
    serving,
    site_port,
    wait_for_call,
)


def test_the_demo_shows_one_guarded_call_the_addresses_and_the_logins(first_demo: str) -> None:
    assert re.search(r"Seeded a month of spend: [\d,]+ calls for \$\d+\.\d\d\.", first_demo)
    assert "local stand-in" in first_demo
    assert re.search(r"  A: From the ordinary accidents\.", first_demo)
    assert re.search(r"  Cost   \$0\.00\d+ for \d+ tokens read and \d+ written by", first_demo)
    assert re.search(r"  Left   \$[\d.]+ of \$1\.20 today for the feature", first_demo)
    assert re.search(r"  Site   http://127\.0\.0\.1:\d+/ .*ada / ada", first_demo)
    assert re.search(r"  Admin  http://127\.0\.0\.1:\d+/admin/ .*admin / admin", first_demo)


def test_a_second_demo_loses_nothing_seeds_nothing_and_passes_a_taken_port_over(
    first_demo: str, database: Path
) -> None:
    before = calls(database)

    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with demo(database, "--port", str(port)) as (process, output):
            assert calls(database)[: len(before)] == before
            assert f"Port {port} is taken; this is on port" in output
            assert site_port(output) != port
            Browser(site_port(output)).close()

    assert "Found the spend so far" in output
    assert len(calls(database)) == len(before) + 1
    assert process.returncode == 0


def test_an_address_of_another_machine_is_one_line_of_error(
    first_demo: str, database: Path
) -> None:
    failed = subprocess.run(
        [sys.executable, "manage.py", "demo", "--host", "192.0.2.1"],
        cwd=ROOT,
        env=environment(database),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )

    assert failed.returncode == 1
    assert failed.stderr.startswith("CommandError: Cannot listen on 192.0.2.1:8000")
    assert failed.stderr.count("\n") == 1


def _demo_port(process: subprocess.Popen[str]) -> int:
    return site_port(read_until(process, READY))


def _gunicorn_port(process: subprocess.Popen[str]) -> int:
    return listening_port(read_until(process, "Listening at"))


def _uvicorn_port(process: subprocess.Popen[str]) -> int:
    return listening_port(read_until(process, "Uvicorn running on"))


SERVERS = {
    "demo": (["manage.py", "demo", "--port", FIRST_PORT], _demo_port),
    "gunicorn": (
        ["-m", "gunicorn", "--bind=127.0.0.1:0", "--threads=4", "example_project.wsgi"],
        _gunicorn_port,
    ),
    "uvicorn": (
        ["-m", "uvicorn", "--port=0", "example_project.asgi:application"],
        _uvicorn_port,
    ),
}


@pytest.mark.parametrize(
    "name", ["demo", "uvicorn", pytest.param("gunicorn", marks=pytest.mark.deep)]
)
def test_the_upstream_call_ends_when_the_reader_leaves(
    name: str, first_demo: str, database: Path, api: AnthropicSimulator
) -> None:
    command, find_port = SERVERS[name]
    with (
        serving(command, environment(database, api), find_port) as port,
        closing(Browser(port)) as browser,
    ):
        last = calls(database)[-1][0]
        api.default = Reply(text="word " * 700, chunk_delay=0.1)

        response = browser.post("/ask/stream/", {"question": "How long?"})
        assert response.readline().startswith(b'{"text":')
        browser.close()

        api.wait_until_idle()
        row = wait_for_call(database, after=last)
        assert row[1:] == ("chat", "estimated", "closed early")
        assert api.billed[-1].usage["output_tokens"] < 400
