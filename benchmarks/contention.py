"""Admissions on one hot feature, by one worker and by many, beside what the stores do bare.

    python -m benchmarks.contention [--workers 1,32] [--seconds 5]
        [--databases sqlite,postgresql,mariadb] [--redis redis://127.0.0.1:6379/9]
        [--trace rates.csv.gz] [--trace-rate 100]

An admission is whole: reserve, with the call's row in the journal, then settle. It takes from
four balances, the day and the month of a feature and of the site. Workers are threads, spread
over at most 8 processes (32 are 8 x 4); each asks again as soon as it is done, so its times are
those of a ledger that is never idle, and all that it waits is what a call would wait more.
Measured in turn, by the same workers, on one hot set of rows or keys:

- the driver's bare SQL: the pair of transactions of ``benchmarks.bare``, and one conditional
  UPDATE of one row, which is the least that can guard a limit;
- DatabaseLedger, and RedisLedger with its journal in the same database;
- RedisLedger's scripts alone, beside two minimal ones (check-and-add, subtract), and the moving
  window of ``limits`` (``pip install limits``: nothing else needs it).

Then a limit of 50 mean calls is used up, where each call reserves twice the mean: how much of
it is spent, what any worker ever saw taken over it, and what is still held when all have ended.
The same again with guarded clients and real HTTP, against the local API in a process of its
own, whose own bill is compared with what was booked.

A trace has the rates of many clients (``benchmarks.trace`` names its columns). It is compressed
to a minute, scaled to about ``--trace-rate`` requests a second, and replayed by 8 processes;
its clients stand in for users, each with a quota.

A line says what its ratio is meant to reach, if anything, and whether it does. SQLite has one
writer for all, so there RedisLedger's journal waits as long as DatabaseLedger does. The Redis
database that is named is emptied. The servers are found as ``tests.settings`` says.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from django.db import connection
from django.test import override_settings

from ai_budget import money
from benchmarks import admissions, bare
from benchmarks.admissions import FAR, MEAN, MODEL, Payer
from benchmarks.crew import Crew, crew, timed
from benchmarks.stage import (
    LocalApi,
    configure,
    empty_database,
    in_own_process,
    local_api,
    percentile,
)
from benchmarks.trace import arrivals

CALLS_IN_A_LIMIT = 50
REACHED_SHARE = 0.95
ROUNDS = 4
REPLAY_SECONDS = 60.0
REPLAY_WORKERS = 32


def main() -> None:
    options = _options()
    if options.database is None:
        for database in options.databases.split(","):
            in_own_process("benchmarks.contention", database, _given(options))
        return
    configure(options.database)
    with empty_database():
        bare.create_tables()
        for workers in map(int, options.workers.split(",")):
            with crew(workers, database=options.database) as hands:
                _contend(hands, options)
                _call(hands, options)
        if options.trace:
            with crew(REPLAY_WORKERS, database=options.database) as hands:
                _replay(hands, options)
    _empty_redis(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", default="1,32")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each line is measured")
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--redis", default="redis://127.0.0.1:6379/9", help="is emptied")
    parser.add_argument("--trace", help="a CSV file of client rates, maybe gzipped")
    parser.add_argument("--trace-rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--database", help=argparse.SUPPRESS)
    return parser.parse_args()


def _given(options: argparse.Namespace) -> list[str]:
    names = ("workers", "seconds", "redis", "trace", "trace_rate")
    given = {name: getattr(options, name) for name in names}
    return [
        f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None
    ]


def _ledgers(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the settings of each ledger, with nothing left in Redis of an earlier run."""
    _empty_redis(options)
    limits = {"DAILY_LIMIT_USD": money.to_usd(FAR), "MONTHLY_LIMIT_USD": money.to_usd(FAR)}
    return {
        "DatabaseLedger": {"LEDGER": "ai_budget.ledger.database.DatabaseLedger", **limits},
        "RedisLedger": {
            "LEDGER": "ai_budget.ledger.redis.RedisLedger",
            "LEDGER_REDIS_URL": options.redis,
            **limits,
        },
    }


def _empty_redis(options: argparse.Namespace) -> None:
    redis.Redis.from_url(options.redis).flushdb()


# Admissions


def _contend(hands: Crew, options: argparse.Namespace) -> None:
    """Measure admissions on one hot feature, and the bare stores beside them."""
    print(f"\n{connection.display_name}, {hands}, {options.seconds:g} s each")
    settings = _ledgers(options)
    hot = Payer(feature="hot")
    works = {
        "bare pair of transactions": Work(bare.pair, (MODEL,)),
        "bare conditional UPDATE": Work(bare.one_update),
        "DatabaseLedger": Work(admissions.admission, (hot,), settings["DatabaseLedger"]),
        "RedisLedger": Work(admissions.admission, (hot,), settings["RedisLedger"]),
        "RedisLedger's scripts": Work(admissions.scripts, (hot,), settings["RedisLedger"]),
        "bare pair of scripts": Work(bare.script_pair, (options.redis,)),
        "moving window of limits": Work(bare.moving_window, (options.redis,)),
    }
    pair, update, database, in_redis, scripts, bare_scripts, window = _in_turn(
        hands, works, options.seconds
    )
    pair.line()
    update.line((pair, None))
    database.line((pair, 0.5))
    in_redis.line((database, 2 if hands.workers > 1 else None))
    bare_scripts.line()
    scripts.line((bare_scripts, 0.5), (window, None))
    window.line((bare_scripts, None))
    # What the scripts took alone, no journal knows: Redis begins anew.
    for name, ledger in _ledgers(options).items():
        fifty = Payer(feature=f"fifty-{name}-{hands.workers}", limit=CALLS_IN_A_LIMIT * MEAN)
        most = max(hands.run(admissions.fill, fifty, settings=ledger))
        _print_left(name, ledger, [fifty], most=most)


@dataclass(frozen=True, slots=True)
class Work:
    """What every worker repeats: how its step is made, of what, and under which settings."""

    make: Callable[..., bare.Step]
    given: tuple[Any, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


def _in_turn(hands: Crew, works: Mapping[str, Work], seconds: float) -> list[Rate]:
    """Measure each for so long, a part at a time, so that what disturbs one disturbs all."""
    runs: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            given = (work.make, work.given, seconds / ROUNDS)
            runs[name] += hands.run(timed, *given, settings=work.settings)
    return [Rate.of(name, each) for name, each in runs.items()]


def _print_left(
    name: str, settings: dict[str, Any], payers: Sequence[Payer], *, most: int = 0
) -> None:
    """Print what a run left in its limits, and whether it was ever over one of them."""
    with override_settings(AI_BUDGET=settings):
        left = admissions.left(payers)
    limit = payers[0].limit
    over = max(left.over, most - limit, 0)
    print(f"  {name:<26} a limit of {_usd(limit)} used by {_share(left.spent / limit)},", end="")
    print(f" overspend {_usd(over)}{_zero(over)},", end="")
    print(f" leaked {left.open_rows} reservations of {_usd(left.held)}", end="")
    print(_zero(left.open_rows or left.held), flush=True)


# Real calls


def _call(hands: Crew, options: argparse.Namespace) -> None:
    """Measure guarded calls beside bare ones, then let them use a limit up."""
    print(f"\n{connection.display_name}, {hands}, real HTTP calls to a local API")
    with local_api(history=None) as api:
        local = {"API_KEY": "local", "BASE_URL": api.base_url}
        ledgers = {name: {**ledger, **local} for name, ledger in _ledgers(options).items()}
        works = {"bare calls": Work(admissions.call, (api.base_url, ""))}
        for name, settings in ledgers.items():
            works[f"calls, {name}"] = Work(admissions.call, (api.base_url, "hot"), settings)
        plain, *guarded = _in_turn(hands, works, options.seconds)
        plain.line()
        for rate in guarded:
            added50, added99 = rate.p(50) - plain.p(50), rate.p(99) - plain.p(99)
            rate.line((plain, None), more=f"; added p50 {added50:.2f} ms, p99 {added99:.2f} ms")
        for name, settings in ledgers.items():
            _spend(hands, name, settings, api)


def _spend(hands: Crew, name: str, settings: dict[str, Any], api: LocalApi) -> None:
    """Use up a limit of mean calls; compare the API's own bill with the books and the limit."""
    import ai_budget
    from ai_budget.models import FeatureBudget

    feature = f"calls-{name}-{hands.workers}"
    before = [ai_budget.price(model, usage) for model, usage in api.billed()]
    limit = CALLS_IN_A_LIMIT * sum(before) // len(before)
    FeatureBudget.objects.create(name=feature, daily_limit_usd=money.to_usd(limit))
    refused = sum(hands.run(admissions.spend, api.base_url, feature, settings=settings))
    bill = sum(ai_budget.price(model, usage) for model, usage in api.billed()[len(before) :])
    payer = Payer(feature=feature, limit=limit)
    _print_left(f"{name}, calls", settings, [payer])
    with override_settings(AI_BUDGET=settings):
        booked = admissions.left([payer]).spent
    print(f"{'':29}the API's bill {_usd(bill)} <= booked {_usd(booked)} <= {_usd(limit)}:", end="")
    print(f" {'yes' if bill <= booked <= limit else 'NO'}; refused {refused} times", flush=True)


# A trace


def _replay(hands: Crew, options: argparse.Namespace) -> None:
    """Replay a trace's clients against each ledger."""
    found = arrivals(Path(options.trace), seconds=REPLAY_SECONDS, per_second=options.trace_rate)
    clients = {arrival.client for arrival in found}
    quota = 2 * len(found) // len(clients) * MEAN
    print(f"\n{connection.display_name}, {hands}, {len(found)} arrivals", end="")
    print(f" of {len(clients)} clients in {REPLAY_SECONDS:g} s")
    for name, ledger in _ledgers(options).items():
        feature, limit = f"trace-{name}", len(found) * MEAN // 4
        payers = {
            client: Payer(feature=feature, limit=limit, user=client, user_limit=quota)
            for client in clients
        }
        given = (found, payers, hands.workers, REPLAY_SECONDS)
        runs = hands.run(admissions.replay, *given, settings=ledger)
        times = [taken for run in runs for taken in run.milliseconds]
        outcomes = sum((run.outcomes for run in runs), Counter[str]())
        reached, asked = len(times) / REPLAY_SECONDS, len(found) / REPLAY_SECONDS
        print(f"  {name:<26} {reached:.0f} decisions/s of {asked:.0f}/s asked", end="")
        print(f" = {reached / asked:.2f}, p50 {percentile(times, 50):.2f} ms,", end="")
        print(f" p99 {percentile(times, 99):.2f} ms from when each was due;", end="")
        print(f" {outcomes['admitted']} admitted, {outcomes['refused']} refused")
        _print_left(name, ledger, list(payers.values()))


# Numbers


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How often something was done a second by all workers, and the milliseconds each took."""

    name: str
    a_second: float
    times: list[float]

    @classmethod
    def of(cls, name: str, runs: Sequence[tuple[float, list[float]]]) -> Rate:
        a_second = sum(len(times) / seconds for seconds, times in runs) / ROUNDS
        return cls(name=name, a_second=a_second, times=[one for _, times in runs for one in times])

    def p(self, percent: int) -> float:
        return percentile(self.times, percent)

    def line(self, *compared: tuple[Rate, float | None], more: str = "") -> None:
        """Print it with its ratio to others, and what each ratio is to reach."""
        ratios = "".join(
            f"; {_reaching(self.a_second / other.a_second, reach)} x {other.name}"
            for other, reach in compared
        )
        print(f"  {self.name:<30} {self.a_second:9,.0f}/s  p50 {self.p(50):8.2f} ms", end="")
        print(f"  p99 {self.p(99):8.2f} ms{ratios}{more}", flush=True)


def _reaching(value: float, reach: float | None) -> str:
    if reach is None:
        return f"{value:.2f}"
    return f"{value:.2f} ({'reaches' if value >= reach else 'MISSES'} {reach:g})"


def _share(value: float) -> str:
    return f"{value:.1%} ({'reaches' if value >= REACHED_SHARE else 'MISSES'} {REACHED_SHARE:.0%})"


def _zero(value: int) -> str:
    return " (MUST BE 0)" if value else ""


def _usd(nanousd: int) -> str:
    return money.format_usd(nanousd, decimals=6)


if __name__ == "__main__":
    main()
