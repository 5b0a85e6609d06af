"""Run the suite once per database backend, and say plainly what was exercised and what was not.

    python -m tests.run [pytest arguments]

SQLite always runs, with everything. PostgreSQL and MariaDB run what is about a store, where a login
succeeds (``tests.settings`` names the variables that say where). One more run repeats the guard and
the verbs with the ledger on Redis, where Redis answers at ``REDIS_URL``; another the models with a
custom user model. Tests of Celery talk to that Redis, and to the RabbitMQ at ``RABBITMQ_URL``. The
runs follow one another, each on all cores, and the last line adds them up. With ``CI=true`` a
server that cannot be reached is a failure.

``AI_BUDGET_TEST_DEPTH=deep``    everything on every backend, at length (``make test-deep``)
``AI_BUDGET_TEST_LEAVE_OUT``     what another run does, of ``redis,users,stores``; with the last
                                 PostgreSQL and MariaDB run ``FIRST_TESTS`` alone
``AI_BUDGET_TEST_WORKERS``       processes of a run; one for each core unless given

A test that cannot reach a database does the same whichever there is: it runs on SQLite alone.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.depth import DEEP
from tests.settings import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
FIRST_TESTS = [
    *(f"tests/ledger/test_{name}.py" for name in ("reserve", "settle", "buckets", "overdue")),
    "tests/models",
    "tests/review/test_sums.py",
    "tests/guard/test_rules.py",
]
"""What shows whether a driver, or a version of Django, speaks to a database as we think."""
STORE_TESTS = [
    "tests/ledger",
    "tests/models",
    *(f"tests/review/test_{name}.py" for name in ("sums", "rollups", "purging", "report", "focus")),
    *(f"tests/review/test_{name}.py" for name in ("callers", "balances", "alerts")),
    *(f"tests/whole/test_{name}.py" for name in ("changes", "clock")),
    "tests/contention/test_admission.py",
    "tests/contention/test_crashes.py",
    "tests/batches/test_transactions.py",
    "tests/commands/test_purge.py",
    "tests/commands/test_rebuild.py",
    "tests/guard/test_rules.py",
]
"""What is about a store: PostgreSQL and MariaDB run it, too."""
REDIS_LEDGER_TESTS = [
    *(
        f"tests/batches/test_{name}.py"
        for name in ("partial", "results", "steps", "submit", "transactions", "twice")
    ),
    *(
        f"tests/guard/test_{name}.py"
        for name in (
            *("answers", "batches_through_client", "cancellation", "counting", "failures"),
            *("ladder", "limits", "rates", "refusals", "settling", "streams", "waiting"),
        )
    ),
    "tests/service/test_ask.py",
    "tests/service/test_many.py",
    "tests/service/test_usage.py",
    "tests/test_middleware.py",
    "tests/test_decorators.py",
]
"""What asks the ledger for something, and so runs on the one in Redis, too."""
USER_MODEL_TESTS = [
    "tests/models",
    "tests/admin/test_calls.py",
    "tests/admin/test_permissions.py",
    "tests/admin/test_user_spend.py",
    "tests/review/test_callers.py",
    "tests/review/test_rollups.py",
    "tests/commands/test_purge.py",
]
ONLY_DATABASE = {"AI_BUDGET_TEST_ONLY": "database"}
"""The environment of a run that leaves what reaches no database to the first (``conftest``)."""
NO_TESTS_COLLECTED = 5
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of pytest: what it is called, and the environment that makes it so."""

    name: str
    environment: Mapping[str, str]
    paths: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one run ended."""

    name: str
    ok: bool
    seconds: float
    passed: int = 0
    failed: int = 0
    skipped: int = 0
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
    for_others = os.environ.get("AI_BUDGET_TEST_LEAVE_OUT", "").split(",")
    paths_given = any((ROOT / argument.split("::")[0]).exists() for argument in arguments)

    def is_there(name: str, version: Callable[[], str]) -> str | None:
        try:
            found = version()
        except Exception as error:
            unreachable[name] = first_line(error)
            return None
        exercised.append(found)
        return found

    def plan_part(name: str, part: str, run: Run) -> None:
        if paths_given or part in for_others:
            unused[name] = "paths were given" if paths_given else "another run has them"
        else:
            runs.append(run)

    everywhere = DEEP or paths_given
    databases: list[tuple[str, str, Callable[[], str]]] = [
        ("PostgreSQL", "postgresql", postgresql_version),
        ("MariaDB", "mariadb", mariadb_version),
    ]
    for name, backend, version in databases:
        found = is_there(name, version)
        if found is not None:
            environment = {"AI_BUDGET_TEST_DB": backend, **ONLY_DATABASE}
            paths = FIRST_TESTS if "stores" in for_others else STORE_TESTS
            paths = [] if everywhere else paths
            runs.append(Run(name=found, environment=environment, paths=paths))
    if not everywhere:
        unused["on PostgreSQL and MariaDB"] = "what is about no store: SQLite's run has it"

    if is_there("Redis", redis_version):
        on_redis = Run(
            name="SQLite, the ledger on Redis",
            environment={
                "AI_BUDGET_TEST_DB": "sqlite",
                "AI_BUDGET_TEST_LEDGER": "redis",
                **ONLY_DATABASE,
            },
            paths=["tests/batches", "tests/guard", "tests/service"] if DEEP else REDIS_LEDGER_TESTS,
        )
        plan_part("the guard's tests with the ledger on Redis", "redis", on_redis)
    is_there("RabbitMQ", rabbitmq_version)
    custom_users = Run(
        name="SQLite with a custom user model and AutoField",
        environment={
            "AI_BUDGET_TEST_DB": "sqlite",
            "AI_BUDGET_TEST_USER_MODEL": "custom",
            "AI_BUDGET_TEST_AUTO_FIELD": "django.db.models.AutoField",
        },
        paths=USER_MODEL_TESTS,
    )
    plan_part("the model tests with a custom user model", "users", custom_users)

    if not DEEP:
        unused["tests that take long"] = "`make test-deep` has them"
    if chromium() is None:
        unused["browser tests"] = "Chromium is not installed"
    return Plan(runs=runs, exercised=exercised, unreachable=unreachable, unused=unused)


# Running -----------------------------------------------------------------------------------------


def execute(run: Run, *, arguments: Sequence[str]) -> Result:
    """Run pytest once, in sight, and read its counts from its own report."""
    workers = os.environ.get("AI_BUDGET_TEST_WORKERS", "auto")
    environment = {
        **os.environ,
        **run.environment,
        "AI_BUDGET_TEST_DB_NAME": f"test_ai_budget_{os.getpid()}",
    }
    # Hundreds of processes start here: they may keep what they compiled.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            *(sys.executable, "-m", "pytest", f"--junitxml={report}"),
            *("--quiet", "--numprocesses", workers),
            *run.paths,
            *arguments,
        ]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        passed, failed, skipped, skip_reasons = counts(report)
    ok = code == 0 or (code == NO_TESTS_COLLECTED and bool(arguments))
    return Result(
        name=run.name,
        ok=ok,
        seconds=time.monotonic() - started,
        passed=passed,
        # A run that broke down before it could count is at least one failure.
        failed=failed if ok else max(failed, 1),
        skipped=skipped,
        skip_reasons=skip_reasons,
    )


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


# Reporting ---------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    planned = plan(arguments)
    done = []
    for number, run in enumerate(planned.runs, start=1):
        print(f"\n######## {run.name} (run {number} of {len(planned.runs)})\n", flush=True)
        done.append(execute(run, arguments=arguments))

    print("\n########\n")
    for result in done:
        print(
            f"{'ok    ' if result.ok else 'FAILED'}  {result.name}: {result.passed} passed,"
            f" {result.failed} failed, {result.skipped} skipped ({result.seconds:.0f} s)"
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
