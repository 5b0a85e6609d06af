"""Run the suite once per database backend, and say plainly what was exercised and what was not.

    python -m tests.run [pytest arguments]

SQLite always runs; PostgreSQL and MariaDB run when a login succeeds (``tests.settings`` names the
variables that say where). Where Redis answers at ``REDIS_URL``, one more SQLite run repeats the
tests of the guard and of what stands on it with the ledger on Redis. Another repeats the model
tests with a custom user model and another DEFAULT_AUTO_FIELD. Celery's tests talk to that Redis,
and to the RabbitMQ at ``RABBITMQ_URL``. The runs go side by side, each
prints its output when it ends, and the last line adds them up. With ``CI=true`` a server that
cannot be reached is a failure. ``AI_BUDGET_TEST_BREADTH=stores`` leaves to SQLite what is not about
a store.

A test that cannot reach a database does the same whichever there is. Such tests run once, on
SQLite, and are neither run nor counted on PostgreSQL, on MariaDB and with the ledger on Redis.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.settings import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
REDIS_LEDGER_TESTS = [
    "tests/batches",
    "tests/guard",
    "tests/service",
    "tests/test_middleware.py",
    "tests/test_decorators.py",
]
STORE_TESTS = ["tests/ledger", "tests/models", "tests/review", "tests/whole"]
"""What PostgreSQL and MariaDB run with ``AI_BUDGET_TEST_BREADTH=stores``: what is about a store."""
ONE_STORE_TESTS = [
    "tests/conversation",
    "tests/example",
    "tests/pricing/test_bound.py",
    "tests/pricing/test_bound_holds.py",
    "tests/pricing/test_monthly.py",
    "tests/testing",
]
"""What PostgreSQL and MariaDB leave to SQLite: it reaches a database by what is tested there."""
USER_MODEL_TESTS = ["tests/models", "tests/admin", "tests/review", "tests/commands"]
ONLY_DATABASE = {"AI_BUDGET_TEST_ONLY": "database"}
"""The environment of a run that leaves what reaches no database to the first (``conftest``)."""
LEFT_OUT = "left to the run on SQLite alone: {} that reach no database"
RUN_TIMEOUT_SECONDS = 1200
NO_TESTS_COLLECTED = 5
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pytest process: what it is called, and the environment that makes it so."""

    name: str
    environment: Mapping[str, str]
    paths: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one run ended."""

    name: str
    ok: bool
    seconds: float
    output: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    left_out: int = 0
    skip_reasons: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run, and what will not and why."""

    runs: Sequence[Run]
    exercised: Sequence[str]
    unreachable: Mapping[str, str]
    unused: Mapping[str, str]


# What this machine has ---------------------------------------------------------------------------


def chromium() -> str | None:
    """The path of a Chromium, or None; ``AI_BUDGET_TEST_CHROMIUM`` names one that is elsewhere."""
    chosen = os.environ.get("AI_BUDGET_TEST_CHROMIUM")
    return chosen or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def postgresql_version() -> str:
    import psycopg

    server = BACKENDS["postgresql"]
    with psycopg.connect(
        host=server["HOST"],
        port=server["PORT"],
        user=server["USER"],
        password=server["PASSWORD"],
        dbname="postgres",
        connect_timeout=3,
    ) as connection:
        return f"PostgreSQL {connection.info.parameter_status('server_version')}".split(" (")[0]


def mariadb_version() -> str:
    import pymysql

    server = BACKENDS["mariadb"]
    with (
        pymysql.connect(
            host=server["HOST"],
            port=int(server["PORT"]),
            user=server["USER"],
            password=server["PASSWORD"],
            connect_timeout=3,
        ) as connection,
        connection.cursor() as cursor,
    ):
        # The greeting of the protocol names an older version, for the sake of old replicas.
        cursor.execute("SELECT VERSION()")
        (version,) = cursor.fetchone() or ("",)
    return f"{'MariaDB' if 'MariaDB' in version else 'MySQL'} {version.split('-')[0]}"


def redis_version() -> str:
    import redis

    with redis.Redis.from_url(
        os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"), socket_connect_timeout=3
    ) as client:
        return f"Redis {client.info('server')['redis_version']}"


def rabbitmq_version() -> str:
    from kombu import Connection

    with Connection(
        os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672//"), connect_timeout=3
    ) as broker:
        broker.ensure_connection(max_retries=0, timeout=3)
        told: Any = broker.connection.server_properties
        return f"RabbitMQ {told['version']}"


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def plan(arguments: Sequence[str]) -> Plan:
    """Look for the servers and decide what runs; ``arguments`` that name paths narrow it."""
    exercised = [f"SQLite {sqlite3.sqlite_version}"]
    runs = [Run(name=exercised[0], environment={"AI_BUDGET_TEST_DB": "sqlite"})]
    unreachable: dict[str, str] = {}
    unused: dict[str, str] = {}

    paths_given = any((ROOT / argument.split("::")[0]).exists() for argument in arguments)
    stores_alone = os.environ.get("AI_BUDGET_TEST_BREADTH") == "stores" and not paths_given
    store_tests = STORE_TESTS if stores_alone else []
    if stores_alone:
        unused["the tests of pages and verbs on PostgreSQL and MariaDB"] = "only their stores' were"
    left_to_sqlite = [] if paths_given else ONE_STORE_TESTS
    if left_to_sqlite:
        unused["on PostgreSQL and MariaDB"] = f"{', '.join(left_to_sqlite)}: SQLite's run has them"
    databases: list[tuple[str, str, Callable[[], str]]] = [
        ("PostgreSQL", "postgresql", postgresql_version),
        ("MariaDB", "mariadb", mariadb_version),
    ]
    for name, backend, version in databases:
        try:
            found = version()
        except Exception as error:
            unreachable[name] = first_line(error)
        else:
            exercised.append(found)
            environment = {"AI_BUDGET_TEST_DB": backend, **ONLY_DATABASE}
            paths = store_tests or [f"--ignore={path}" for path in left_to_sqlite]
            runs.append(Run(name=found, environment=environment, paths=paths))

    variants = {
        "the model tests with a custom user model": Run(
            name="SQLite with a custom user model and AutoField",
            environment={
                "AI_BUDGET_TEST_DB": "sqlite",
                "AI_BUDGET_TEST_USER_MODEL": "custom",
                "AI_BUDGET_TEST_AUTO_FIELD": "django.db.models.AutoField",
            },
            paths=USER_MODEL_TESTS,
        )
    }
    try:
        exercised.append(redis_version())
    except Exception as error:
        unreachable["Redis"] = first_line(error)
    else:
        variants["the guard's tests with the ledger on Redis"] = Run(
            name="SQLite, the ledger on Redis",
            environment={
                "AI_BUDGET_TEST_DB": "sqlite",
                "AI_BUDGET_TEST_LEDGER": "redis",
                **ONLY_DATABASE,
            },
            paths=REDIS_LEDGER_TESTS,
        )
    try:
        exercised.append(rabbitmq_version())
    except Exception as error:
        unreachable["RabbitMQ"] = first_line(error)
    if stores_alone:
        unused["the model tests with a custom user model"] = "they are about no store"
        del variants["the model tests with a custom user model"]
    on_redis = "the guard's tests with the ledger on Redis"
    if os.environ.get("AI_BUDGET_TEST_BREADTH") == "databases" and on_redis in variants:
        unused[on_redis] = "another run has them"
        del variants[on_redis]
    if paths_given:
        unused.update(dict.fromkeys(variants, "paths were given"))
    else:
        runs += variants.values()

    if chromium() is None:
        unused["browser tests"] = "Chromium is not installed"
    return Plan(runs=runs, exercised=exercised, unreachable=unreachable, unused=unused)


# Running -----------------------------------------------------------------------------------------


def execute(run: Run, *, number: int, arguments: Sequence[str], reports: Path) -> Result:
    """Run pytest once and read its counts from its own report."""
    report = reports / f"{number}.xml"
    command = [
        *(sys.executable, "-m", "pytest", f"--junitxml={report}"),
        *("--override-ini", f"cache_dir=.pytest_cache/{number}"),
        f"--color={'yes' if sys.stdout.isatty() else 'no'}",
        *run.paths,
        *arguments,
    ]
    environment = {
        **os.environ,
        **run.environment,
        "AI_BUDGET_TEST_DB_NAME": f"test_ai_budget_{os.getpid()}_{number}",
    }
    started = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            output = f"{stop(process)}\nStopped after {RUN_TIMEOUT_SECONDS} seconds.\n"
    ok = process.returncode == 0 or (process.returncode == NO_TESTS_COLLECTED and bool(arguments))
    passed, failed, skipped, skip_reasons = counts(report)
    return Result(
        name=run.name,
        ok=ok,
        seconds=time.monotonic() - started,
        output=output,
        passed=passed,
        # A run that broke down before it could count is at least one failure.
        failed=failed if ok else max(failed, 1),
        skipped=skipped,
        left_out=left_out(output),
        skip_reasons=skip_reasons,
    )


def stop(process: subprocess.Popen[str]) -> str:
    """Interrupt a hanging pytest, so that it says where it hung and drops its database."""
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    return output


def counts(report: Path) -> tuple[int, int, int, Counter[str]]:
    """Passed, failed, skipped and why, of one JUnit report."""
    if not report.exists():
        return 0, 0, 0, Counter()
    passed = failed = skipped = 0
    reasons: Counter[str] = Counter()
    root = ElementTree.parse(report).getroot()  # noqa: S314 - pytest wrote it a moment ago
    for suite in root.iter("testsuite"):
        suite_failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        suite_skipped = int(suite.get("skipped", 0))
        passed += int(suite.get("tests", 0)) - suite_failed - suite_skipped
        failed += suite_failed
        skipped += suite_skipped
    for skip in root.iter("skipped"):
        reasons[skip.get("message", "no reason given")] += 1
    return passed, failed, skipped, reasons


def left_out(output: str) -> int:
    """How many tests a run says that it left to the one on SQLite."""
    found = re.search(LEFT_OUT.format(r"(\d+)"), output)
    return int(found[1]) if found else 0


def results(runs: Sequence[Run], arguments: Sequence[str]) -> Iterator[Result]:
    """Run everything side by side; yield each result as it comes."""
    with (
        tempfile.TemporaryDirectory() as reports,
        ThreadPoolExecutor(max_workers=len(runs)) as pool,
    ):
        pending = [
            pool.submit(execute, run, number=n, arguments=arguments, reports=Path(reports))
            for n, run in enumerate(runs)
        ]
        for future in as_completed(pending):
            yield future.result()


# Reporting ---------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    # What a shell starts in the background ignores Ctrl-C, which some tests press, and `stop`.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    planned = plan(arguments)
    print(f"Running on {', '.join(run.name for run in planned.runs)} ...", flush=True)

    done = []
    for result in results(planned.runs, arguments):
        done.append(result)
        print(f"\n######## {result.name} ({result.seconds:.0f} s)\n\n{result.output}", flush=True)

    print("########\n")
    for result in done:
        print(
            f"{'ok    ' if result.ok else 'FAILED'}  {result.name}: {result.passed} passed,"
            f" {result.failed} failed, {result.skipped} skipped"
            + (f"; {LEFT_OUT.format(result.left_out)}" if result.left_out else "")
        )
    for reason, number in sum((r.skip_reasons for r in done), Counter[str]()).most_common():
        print(f"Skipped {number} x: {reason}")

    print(f"\nBackends exercised: {', '.join(planned.exercised)}")
    for name, reason in {**planned.unreachable, **planned.unused}.items():
        print(f"Left out: {name} ({reason})")

    failed = sum(result.failed for result in done)
    if planned.unreachable and os.environ.get("CI") == "true":
        failed += len(planned.unreachable)
        print(f"FAILED: CI must reach {', '.join(planned.unreachable)}")

    passed, skipped = (sum(r.passed for r in done), sum(r.skipped for r in done))
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
