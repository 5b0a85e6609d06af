"""A Redis of the test run's own, which may be flushed, frozen, killed and brought back."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

BINARY = shutil.which("redis-server") or shutil.which("valkey-server")


class RedisServer:
    """One process on a port of its own; ``data`` is where its snapshot is kept."""

    def __init__(self, data: Path, *options: str) -> None:
        self.data = data
        self._options = options
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=5)

    def start(self) -> None:
        """Start it, with the snapshot that is in its folder, and wait until it answers."""
        assert BINARY is not None
        options = {"port": self.port, "dir": self.data, "save": "", "bind": "127.0.0.1"}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        self._process = subprocess.Popen(
            [BINARY, *arguments, *self._options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 20
        with self.client() as client:
            while True:
                with suppress(redis.ConnectionError):
                    if client.ping():
                        return
                if time.monotonic() > end or self._process.poll() is not None:
                    raise RuntimeError("redis-server did not start")
                time.sleep(0.01)

    def do(self, *command: Any) -> Any:
        """Send one command over a connection of its own."""
        with self.client() as client:
            return client.execute_command(*command)

    def flush(self) -> None:
        self.do("FLUSHALL")

    def save(self) -> None:
        """Write a snapshot, which the next start will bring back."""
        self.do("SAVE")

    def kill(self) -> None:
        """End it as a power cut would."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def restart_from_snapshot(self) -> None:
        """Bring it back as it is at this moment, as another server: as a failover does."""
        self.save()
        self.restart()

    def forget(self, pattern: str) -> None:
        """Evict some keys."""
        with self.client() as client:
            for key in client.scan_iter(match=pattern):
                client.delete(key)

    def freeze(self) -> None:
        """Let it hang: connections stay, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def drop_clients(self) -> None:
        """Close every connection that is there."""
        self.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def forget_snapshot(self) -> None:
        (self.data / "dump.rdb").unlink(missing_ok=True)

    def make_ready(self) -> None:
        """Have it run, empty, whatever a test did to it."""
        if self._process is not None:
            self.thaw()
        self.forget_snapshot()
        if self._process is None or self._process.poll() is not None:
            self.start()
        self.flush()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self) -> None:
        self.thaw()
        self.kill()
