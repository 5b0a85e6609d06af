"""The ledger on Redis: whichever client speaks to it, and whatever Redis has lost meanwhile.

What every ledger has in common is tested for it, too, in a run of the suite of its own.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connection, connections, transaction
from django.test import override_settings

from ai_budget import periods
from ai_budget.exceptions import (
    BudgetExceeded,
    LedgerUnavailable,
    QuotaExceeded,
    RateLimited,
)
from ai_budget.ledger import base as ledgers
from ai_budget.ledger import connection as connecting
from ai_budget.ledger import journal as journals
from ai_budget.ledger.redis import UNCHECKED, RedisLedger
from ai_budget.ledger.redis_hashes import Hash, compare
from ai_budget.models import CallLog, SpendWindow
from ai_budget.policy.limits import Quota
from ai_budget.testing import freeze
from ai_budget.values import (
    Amounts,
    BalanceKey,
    Balances,
    Bucket,
    Charge,
    Level,
    Limit,
    Measure,
    Settlement,
    Status,
)
from tests.contention.redis_server import BINARY, RedisServer
from tests.ledger.given import (
    CHAT,
    NOON,
    RELEASED,
    attempt,
    estimated,
    limit,
    limits_of,
    reserve,
    row,
    settle,
    settled,
)

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.skipif(BINARY is None, reason="there is no redis-server to start"),
]

REDIS_LEDGER = "ai_budget.ledger.redis.RedisLedger"
LOCMEM = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    one = RedisServer(tmp_path_factory.mktemp("redis"))
    yield one
    one.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A cluster of one node that has all slots."""
    one = RedisServer(tmp_path_factory.mktemp("cluster"), "--cluster-enabled", "yes")
    one.start()
    one.do("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    while b"cluster_state:ok" not in one.do("CLUSTER", "INFO"):
        time.sleep(0.02)
    yield one
    one.stop()


@pytest.fixture(autouse=True)
def running(server: RedisServer) -> None:
    server.make_ready()


def using(caches: dict[str, Any] | None = None, **ai_budget: Any) -> override_settings:
    return override_settings(
        CACHES=caches or {"default": LOCMEM}, AI_BUDGET={"LEDGER": REDIS_LEDGER, **ai_budget}
    )


@pytest.fixture
def ledger(server: RedisServer) -> Iterator[RedisLedger]:
    with using(LEDGER_REDIS_URL=server.url):
        yield the_ledger()


def the_ledger() -> RedisLedger:
    found = ledgers.current()
    assert isinstance(found, RedisLedger)
    return found


def day_key(scope: str = "feature:chat") -> BalanceKey:
    return limit(None, scope).key


def kept(scope: str = "feature:chat") -> Balances:
    return ledgers.current().balances([day_key(scope)]).get(day_key(scope), Balances())


def no_differences() -> bool:
    return ledgers.current().differences(NOON.date().replace(day=1)) == []


@pytest.fixture(autouse=True)
def noon() -> Iterator[None]:
    with freeze(NOON):
        yield


# Every way to reach it ----------------------------------------------------------------------------


def django_redis(url: str, **options: Any) -> dict[str, Any]:
    cache = {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": url, "KEY_PREFIX": "shop"}
    return {"default": {**cache, "OPTIONS": options}}


def djangos_own(url: str) -> dict[str, Any]:
    cache = "django.core.cache.backends.redis.RedisCache"
    return {"default": {"BACKEND": cache, "LOCATION": url, "KEY_PREFIX": "shop"}}


@pytest.fixture(
    params=["address", "resp2", "resp3", "valkey", "decoding", "django-redis", "django", "cluster"]
)
def any_client(request: pytest.FixtureRequest, server: RedisServer) -> Iterator[RedisLedger]:
    kinds: dict[str, override_settings] = {
        "address": using(LEDGER_REDIS_URL=server.url),
        "resp2": using(LEDGER_REDIS_URL=f"{server.url}?protocol=2"),
        "resp3": using(LEDGER_REDIS_URL=f"{server.url}?protocol=3"),
        "valkey": using(LEDGER_REDIS_URL=server.url.replace("redis:", "valkey:")),
        "decoding": using(LEDGER_REDIS_URL=f"{server.url}?decode_responses=true"),
        "django-redis": using(django_redis(server.url)),
        "django": using(djangos_own(server.url)),
    }
    if request.param == "cluster":
        node = request.getfixturevalue("cluster")
        node.flush()
        kinds["cluster"] = using(LEDGER_REDIS_URL=node.url)
    with kinds[request.param]:
        yield the_ledger()


def test_through_every_client_a_limit_admits_what_fits_and_no_more(
    any_client: RedisLedger,
) -> None:
    limits = limits_of(CHAT, daily=25)
    first = reserve(limits, 10)
    reserve(limits, 10)
    with pytest.raises(BudgetExceeded) as refused:
        reserve(limits, 10)
    assert (refused.value.limit, refused.value.held, refused.value.spent) == (25, 20, 0)
    assert refused.value.saturated
    settle(first, settled(3))
    reserve(limits, 10)
    assert kept() == Balances(spent_nanousd=3, held_nanousd=20, calls=3)
    assert CallLog.objects.count() == 3
    assert no_differences()


def test_through_every_client_buckets_are_taken_with_the_money(any_client: RedisLedger) -> None:
    bucket = Bucket(scope="feature:chat", measure=Measure.TOKENS, amount=100)
    reserve([*limits_of(CHAT), bucket], 10, tokens=60)
    with pytest.raises(RateLimited) as refused:
        reserve([*limits_of(CHAT), bucket], 10, tokens=60)
    assert refused.value.refusal.delay == 12.0  # 20 of 100 a minute
    assert kept() == Balances(held_nanousd=10, calls=1)


def test_an_admission_that_is_said_twice_takes_once(ledger: RedisLedger) -> None:
    bucket = Bucket(scope="feature:chat", measure=Measure.REQUESTS, amount=2)
    limits: list[Limit | Bucket] = [*limits_of(CHAT, daily=15), bucket]
    real = ledger._run

    def twice(name: str, keys: Any, args: Any) -> Any:
        real(name, keys, args)
        return real(name, keys, args)

    reserve(limits_of(CHAT), 0)
    ledger._run = twice  # type: ignore[method-assign]
    reservation = reserve(limits, 10)
    assert kept().held_nanousd == 10
    reserve([*limits_of(CHAT), bucket], 1)
    settle(reservation, settled(4))
    assert kept() == Balances(spent_nanousd=4, held_nanousd=1, calls=3)
    with pytest.raises(RateLimited):
        reserve(limits, 1)


def test_through_every_client_a_view_is_limited(any_client: RedisLedger) -> None:
    bucket = Bucket(scope="view:x", measure=Measure.REQUESTS, amount=2, seconds=10)
    any_client.take([bucket], at=NOON)
    any_client.take([bucket], at=NOON)
    with pytest.raises(RateLimited):
        any_client.take([bucket], at=NOON)
    later = NOON + timedelta(seconds=5)
    with freeze(later):
        any_client.take([bucket], at=later)
        with pytest.raises(RateLimited):
            any_client.take([bucket], at=later)


def test_through_every_client_the_tick_shows_balances_and_refusals(
    any_client: RedisLedger,
) -> None:
    settle(reserve(limits_of(CHAT), 10), settled(4))
    reserve(limits_of(CHAT), 10)
    any_client.count_refusal([day_key()])
    any_client.count_refusal([day_key()])
    any_client.tidy()
    any_client.tidy()
    window = SpendWindow.objects.get(scope="feature:chat", period="day")
    assert (window.spent_nanousd, window.held_nanousd, window.calls) == (4, 10, 2)
    assert window.refused == 2


def test_through_every_client_balances_are_mended(any_client: RedisLedger) -> None:
    reserve(limits_of(CHAT), 10)
    key = f"{any_client.prefix}:day:{NOON.date()}"
    any_client.client.hincrby(key, "s feature:chat", 5)
    (difference,) = any_client.differences(NOON.date())
    assert difference.key == day_key()
    any_client.rebuild(NOON.date())
    assert any_client.differences(NOON.date()) == []
    assert kept() == Balances(held_nanousd=10, calls=1)


def test_its_keys_are_apart_from_those_of_another_site(server: RedisServer) -> None:
    with using(django_redis(server.url)):
        reserve(limits_of(CHAT, daily=10), 10)
    other = django_redis(server.url)
    other["default"]["KEY_PREFIX"] = "blog"
    CallLog.objects.all().delete()
    with using(other):
        reserve(limits_of(CHAT, daily=10), 10)
    with server.client() as client:
        assert all(key.startswith(b"{ai_budget:") for key in client.scan_iter())


def test_a_cache_that_may_wait_for_ever_does_not_make_the_ledger_wait(
    server: RedisServer,
) -> None:
    with using(djangos_own(server.url)):
        options = the_ledger().client.connection_pool.connection_kwargs
        assert options["socket_timeout"] == options["socket_connect_timeout"] == 1.0
    with using(django_redis(server.url.replace("/0", "/1"), SOCKET_TIMEOUT=0.25)):
        options = the_ledger().client.connection_pool.connection_kwargs
        assert options["socket_timeout"] == 0.25


def test_without_a_redis_it_says_what_to_set() -> None:
    with using(), pytest.raises(ImproperlyConfigured, match="LEDGER_REDIS_URL"):
        reserve(limits_of(CHAT), 10)


# The arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [2**53, 2**53 + 1, 2**60 + 7])
def test_amounts_are_exact_beyond_what_a_float_holds(ledger: RedisLedger, most: int) -> None:
    limits = limits_of(CHAT, daily=most)
    settle(reserve(limits, most - 3), settled(most - 3))
    reserve(limits, 2)
    with pytest.raises(BudgetExceeded):
        reserve(limits, 2)
    reserve(limits, 1)
    assert kept().taken_nanousd == most
    with pytest.raises(BudgetExceeded):
        reserve(limits, 1)


@pytest.mark.parametrize("amount", [0, 9])
def test_a_call_above_the_whole_limit_is_refused(ledger: RedisLedger, amount: int) -> None:
    with pytest.raises(BudgetExceeded) as refused:
        reserve(limits_of(CHAT, daily=amount), 10)
    assert refused.value.exhausted
    assert refused.value.refusal.delay is None


def test_calls_of_a_user_are_counted_and_given_back(ledger: RedisLedger) -> None:
    user = Charge(feature="chat", user_id=7)
    limits = limits_of(user, quota=Quota(daily_calls=1))
    first = reserve(limits, 10, charge=user)
    with pytest.raises(QuotaExceeded):
        reserve(limits, 10, charge=user)
    settle(first, RELEASED)
    reserve(limits, 10, charge=user)


@pytest.mark.parametrize("subject", ["a\nb", "ü,feature:chat", "'\"\\", "☃" * 30, "a b #?"])
def test_a_subject_may_be_any_text(ledger: RedisLedger, subject: str) -> None:
    charge = Charge(feature="chat", subject=subject)
    limits = limits_of(charge, quota=Quota(daily_limit=25))
    settle(reserve(limits, 10, charge=charge), settled(4))
    server_lost_everything(ledger)
    reserve(limits, 10, charge=charge)
    with pytest.raises(QuotaExceeded):
        reserve(limits, 12, charge=charge)
    assert no_differences()


def test_shadow_mode_records_and_admits(ledger: RedisLedger) -> None:
    limits = [limit(5, enforce=False), limit(None, "*")]
    reservation = reserve(limits, 10)
    assert row(reservation).decision == "would refuse: feature:chat day"
    assert kept().held_nanousd == 10


def test_a_bucket_in_shadow_mode_builds_up_no_debt(ledger: RedisLedger) -> None:
    shadow = Bucket(scope="feature:chat", measure=Measure.REQUESTS, amount=1, enforce=False)
    for _ in range(5):
        reserve([limit(None), shadow], 1)
    later = NOON + timedelta(minutes=1)
    with freeze(later):
        reserve([limit(None), replace(shadow, enforce=True)], 1, at=later)


def test_a_bucket_beyond_what_lua_counts_lets_no_money_pass(ledger: RedisLedger) -> None:
    huge = Bucket(scope="*", measure=Measure.TOKENS, amount=10**11)
    limits: list[Limit | Bucket] = [*limits_of(CHAT, daily=100), huge]
    level = Level(measure=Measure.TOKENS, remaining=1000)
    settle(reserve(limits, 10, tokens=5), settled(10, tokens=5, levels=(level,)))
    for _ in range(30):
        with suppress(BudgetExceeded, RateLimited):
            reserve(limits, 10, tokens=500)
    assert kept().taken_nanousd <= 100
    assert sum(row.reserved_nanousd for row in CallLog.objects.all()) <= 100


def test_unused_tokens_come_back_and_levels_are_learned(ledger: RedisLedger) -> None:
    tokens = Bucket(scope="*", measure=Measure.TOKENS, amount=1000)
    first = reserve([limit(None, "*"), tokens], 1, tokens=900)
    with pytest.raises(RateLimited):
        reserve([limit(None, "*"), tokens], 1, tokens=200)
    settle(first, settled(1, tokens=100))
    second = reserve([limit(None, "*"), tokens], 1, tokens=900)
    level = Level(measure=Measure.TOKENS, remaining=50)
    settle(second, settled(1, tokens=0, levels=(level,)))
    with pytest.raises(RateLimited) as refused:
        reserve([limit(None, "*"), tokens], 1, tokens=51)
    assert refused.value.spent == 950


def test_a_bucket_refills_by_the_servers_clock(ledger: RedisLedger) -> None:
    bucket = Bucket(scope="view:x", measure=Measure.REQUESTS, amount=100, seconds=1)
    with periods_as_they_are():
        for _ in range(100):
            ledger.take([bucket], at=ledger.now())
        end = time.monotonic() + 5
        while time.monotonic() < end:  # ten milliseconds bring one back
            with suppress(RateLimited):
                ledger.take([bucket], at=ledger.now())
                return
        pytest.fail("it did not refill")


def periods_as_they_are() -> Any:
    return periods.override_clock(periods._system_clock)


def test_now_is_the_servers(ledger: RedisLedger, server: RedisServer) -> None:
    with periods_as_they_are():
        seconds, _ = server.do("TIME")
        assert abs(ledger.now().timestamp() - int(seconds)) < 2


# What Redis may lose ------------------------------------------------------------------------------


def server_lost_everything(ledger: RedisLedger) -> None:
    ledger.client.flushall()


def one_day_was_evicted(ledger: RedisLedger) -> None:
    assert ledger.client.delete(f"{ledger.prefix}:day:{NOON.date()}") == 1


def the_month_was_evicted(ledger: RedisLedger) -> None:
    assert ledger.client.delete(f"{ledger.prefix}:month:{NOON.date().replace(day=1)}") == 1


def the_marker_is_of_another_run(ledger: RedisLedger) -> None:
    for key in ledger.client.scan_iter(match="*:20*"):
        ledger.client.hset(key, "run", "0" * 40)
        ledger.client.hincrby(key, "t feature:chat", -1000)


@pytest.mark.parametrize(
    "lose",
    [
        server_lost_everything,
        one_day_was_evicted,
        the_month_was_evicted,
        the_marker_is_of_another_run,
    ],
)
def test_what_is_lost_is_filled_from_the_journal_before_the_next_call(
    ledger: RedisLedger, lose: Any
) -> None:
    limits = [*limits_of(CHAT, daily=100), limit(100, period=periods.Period.MONTH)]
    settle(reserve(limits, 30), settled(20))
    settle(reserve(limits, 30), estimated(30))
    settle(reserve(limits, 30), RELEASED)
    flying = reserve(limits, 40)
    lose(ledger)
    with pytest.raises(BudgetExceeded):
        reserve(limits, 11)
    reserve(limits, 10)
    assert kept() == Balances(spent_nanousd=50, held_nanousd=50, calls=4)
    settle(flying, settled(1))
    assert kept() == Balances(spent_nanousd=51, held_nanousd=10, calls=4)
    assert no_differences()


def test_an_old_snapshot_that_comes_back_does_not_count(
    ledger: RedisLedger, server: RedisServer
) -> None:
    limits = limits_of(CHAT, daily=100)
    settle(reserve(limits, 10), settled(10))
    server.save()
    settle(reserve(limits, 80), settled(80))
    server.restart()
    assert server.do("DBSIZE") > 0
    with pytest.raises(BudgetExceeded):
        reserve(limits, 11)
    reserve(limits, 10)
    assert no_differences()


def test_a_row_that_was_written_but_not_yet_admitted_does_not_pass_the_limit(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers stand between journal and script while the balances are filled anew."""
    limits = limits_of(CHAT, daily=10)
    reserve(limits_of(CHAT), 0)
    waiting = Charge(feature="chat")
    one, two = (attempt(waiting) for _ in range(2))
    rows: list[int] = []
    real = RedisLedger._take

    def take(self: RedisLedger, asked: Any, amounts: Amounts, of: Any, *, row: str) -> str:
        if row and len(rows) < 1:
            rows.append(int(row))
            # The other one comes just here, finds room, and is as far; then all is lost.
            with pytest.raises(BudgetExceeded):
                self.reserve(limits, Amounts(nanousd=10), two)
        if row and of is two:
            ledger.client.flushall()
        return real(self, asked, amounts, of, row=row)

    monkeypatch.setattr(RedisLedger, "_take", take)
    ledger.reserve(limits, Amounts(nanousd=10), one)
    assert kept().held_nanousd == 10
    assert CallLog.objects.filter(status=Status.RESERVED, reserved_nanousd=10).count() == 1
    assert no_differences()


def test_a_settlement_while_the_balances_are_filled_is_not_lost(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = limits_of(CHAT, daily=100)
    flying = reserve(limits, 40)
    server_lost_everything(ledger)
    real = RedisLedger._finish

    def finish(self: RedisLedger, window: Any, token: str) -> bool:
        if row(flying).status == Status.RESERVED:
            # The journal was read; its row closes before the hash counts.
            settle(flying, settled(7))
        return real(self, window, token)

    monkeypatch.setattr(RedisLedger, "_finish", finish)
    reserve(limits, 1)
    assert kept() == Balances(spent_nanousd=7, held_nanousd=1, calls=2)
    assert no_differences()


def test_a_claim_whose_worker_died_is_taken_over(ledger: RedisLedger) -> None:
    reserve(limits_of(CHAT), 10)
    server_lost_everything(ledger)
    for key in ("day:2026-05-04", "month:2026-05-01"):
        run = ledger.client.info("server")["run_id"]
        ledger.client.hset(f"{ledger.prefix}:{key}", "loading", f"dead {run} 1")
    assert kept() == Balances(held_nanousd=10, calls=1)


def test_a_worker_that_takes_long_keeps_its_claim(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ai_budget.ledger.redis.CLAIM_SECONDS", 0.9)
    reserve(limits_of(CHAT), 10)
    server_lost_everything(ledger)
    states: list[str] = []
    window = Hash(periods.Period.DAY, NOON.date())
    real = journals.entries

    def slowly(*args: Any, **kwargs: Any) -> Any:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            states.append(ledger._claim(window, "another", "missing", give_up=0))
            time.sleep(0.02)
        return real(*args, **kwargs)

    monkeypatch.setattr(journals, "entries", slowly)
    ledger._load(window, give_up=time.monotonic() + 30)
    assert set(states) == {"wait"}
    assert kept() == Balances(held_nanousd=10, calls=1)


def test_a_claim_that_is_held_makes_others_wait_and_give_up(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ai_budget.ledger.redis.PATIENCE_SECONDS", 0.1)
    reserve(limits_of(CHAT), 10)
    server_lost_everything(ledger)
    run = ledger.client.info("server")["run_id"]
    seconds, _ = ledger.client.time()
    claim = f"busy {run} {seconds * 1000}"
    ledger.client.hset(f"{ledger.prefix}:day:2026-05-04", "loading", claim)
    with pytest.raises(LedgerUnavailable, match="being filled"):
        reserve(limits_of(CHAT), 10)
    assert [row.status for row in CallLog.objects.order_by("id")] == ["reserved", "released"]


def unheard(self: RedisLedger, *args: Any, row: str, real: Any = RedisLedger._take) -> str:
    """Take as ever, and lose the answer."""
    shadowed: str = real(self, *args, row=row)
    if row:
        raise LedgerUnavailable("the answer was lost")
    return shadowed


# What a worker leaves behind ----------------------------------------------------------------------


def test_a_row_that_was_never_admitted_is_released_by_the_tick(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve(limits_of(CHAT), 5)

    class Killed(BaseException): ...

    real = RedisLedger._take

    def killed(self: RedisLedger, *args: Any, row: str) -> str:
        if row:
            raise Killed
        return real(self, *args, row=row)

    with monkeypatch.context() as patched:
        patched.setattr(RedisLedger, "_take", killed)
        with pytest.raises(Killed):
            reserve(limits_of(CHAT), 10)
    with freeze(NOON + timedelta(hours=1)):
        assert ledger.settle_overdue() == 2
        assert no_differences()
    first, second = CallLog.objects.order_by("id")
    assert (first.status, first.cost_nanousd) == (Status.ESTIMATED, 5)
    assert (second.status, second.cost_nanousd) == (Status.RELEASED, 0)
    assert kept() == Balances(spent_nanousd=5, calls=1)


def test_what_is_held_for_a_closed_row_is_given_back_by_the_tick(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservations = [reserve(limits_of(CHAT), 10) for _ in range(3)]

    def lost(*args: Any) -> None:
        raise LedgerUnavailable("the connection broke")

    with monkeypatch.context() as patched:
        patched.setattr(RedisLedger, "_give_back", lost)
        settle(reservations[0], settled(4))
        settle(reservations[1], RELEASED)
    CallLog.objects.filter(pk=reservations[2].id)._raw_delete(CallLog.objects.db)
    assert kept().held_nanousd == 30
    ledger.tidy()
    assert kept() == Balances(spent_nanousd=4, calls=1)
    assert no_differences()


def test_a_late_settlement_corrects_the_estimate(ledger: RedisLedger) -> None:
    reservation = reserve(limits_of(CHAT), 10)
    with freeze(NOON + timedelta(hours=1)):
        assert ledger.settle_overdue() == 1
        assert kept() == Balances(spent_nanousd=10, calls=1)
        settle(reservation, settled(3))
        settle(reservation, settled(3))
        assert kept() == Balances(spent_nanousd=3, calls=1)
        assert no_differences()


def test_a_worker_that_slept_between_journal_and_script_sends_nothing(
    ledger: RedisLedger,
) -> None:
    with pytest.raises(LedgerUnavailable, match="slept"):
        reserve(limits_of(CHAT), 10, deadline=NOON)
    assert kept() == Balances()
    assert CallLog.objects.get().status == Status.RELEASED


# Without it -----------------------------------------------------------------------------------


def test_without_redis_calls_are_refused_and_do_not_fill_the_journal(
    ledger: RedisLedger, server: RedisServer
) -> None:
    reserve(limits_of(CHAT), 10)
    server.kill()
    for _ in range(5):
        with pytest.raises(LedgerUnavailable):
            reserve(limits_of(CHAT), 10)
    first, second = CallLog.objects.order_by("id")
    assert (first.status, second.status) == (Status.RESERVED, Status.RELEASED)
    server.start()
    assert kept() == Balances(held_nanousd=10, calls=1)


def test_what_redis_took_unheard_is_given_back_by_the_tick(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(RedisLedger, "_take", unheard)
        with pytest.raises(LedgerUnavailable):
            reserve(limits_of(CHAT), 10)
    assert kept().held_nanousd == 10
    ledger.tidy()
    assert kept() == Balances()
    assert no_differences()


def test_a_redis_that_hangs_is_waited_for_no_longer_than_configured(server: RedisServer) -> None:
    with using(LEDGER_REDIS_URL=f"{server.url}?socket_timeout=0.3"):
        reserve(limits_of(CHAT), 10)
        server.freeze()
        start = time.monotonic()
        with pytest.raises(LedgerUnavailable):
            reserve(limits_of(CHAT), 10)
        # One command waits, and none after it.
        assert time.monotonic() - start < 2
        server.thaw()
        reserve(limits_of(CHAT), 10)


def test_an_answer_is_booked_although_redis_is_away(
    ledger: RedisLedger, server: RedisServer
) -> None:
    flying = reserve(limits_of(CHAT), 10)
    server.kill()
    settle(flying, settled(4))
    assert row(flying).status == Status.SETTLED
    server.start()
    assert kept() == Balances(spent_nanousd=4, calls=1)
    assert no_differences()


def test_calls_that_were_let_through_are_counted_when_redis_is_back(
    server: RedisServer,
) -> None:
    url = f"{server.url}?socket_timeout=0.2"
    with using(LEDGER_REDIS_URL=url, ON_LEDGER_FAILURE="allow"):
        limits = limits_of(CHAT, daily=100)
        reserve(limits, 10)
        server.freeze()
        through = reserve(limits, 95)
        assert through.unchecked
        assert row(through).decision.startswith(UNCHECKED)
        settle(through, settled(90))
        server.thaw()
        with pytest.raises(BudgetExceeded):
            reserve(limits, 1)
        assert kept() == Balances(spent_nanousd=90, held_nanousd=10, calls=2)
        assert no_differences()


def test_the_tick_counts_what_another_worker_let_through(server: RedisServer) -> None:
    url = f"{server.url}?socket_timeout=0.2"
    with using(LEDGER_REDIS_URL=url, ON_LEDGER_FAILURE="allow"):
        limits = limits_of(CHAT, daily=100)
        reserve(limits, 10)
        server.freeze()
        settle(reserve(limits, 95), settled(90))
        flying = reserve(limits, 5)
        server.thaw()
        the_ledger()._to_forget.clear()  # the worker is gone, and what it remembered
        ledgers.current().tidy()
        assert kept().spent_nanousd == 90
        with freeze(NOON + timedelta(hours=1)):
            ledgers.current().settle_overdue()
            assert row(flying).status == Status.ESTIMATED
            assert kept().spent_nanousd == 105
            assert no_differences()


def test_what_was_let_through_is_counted_although_the_setting_is_back(
    server: RedisServer,
) -> None:
    address: dict[str, Any] = {"LEDGER_REDIS_URL": f"{server.url}?socket_timeout=0.2"}
    limits = limits_of(CHAT, daily=100)
    with using(ON_LEDGER_FAILURE="allow", **address):
        reserve(limits, 10)
        server.freeze()
        settle(reserve(limits, 95), settled(90))
        server.thaw()
        the_ledger()._to_forget.clear()  # the worker is gone, and what it remembered
    with using(**address):
        ledgers.current().tidy()
        ledgers.current().tidy()
        assert kept() == Balances(spent_nanousd=90, held_nanousd=10, calls=2)
        assert not SpendWindow.objects.filter(scope=UNCHECKED).exists()


def test_a_call_that_redis_knows_of_after_all_fills_nothing_anew(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer was lost, so it passed unchecked, and was checked all the same."""
    with using(LEDGER_REDIS_URL=server.url, ON_LEDGER_FAILURE="allow"):
        reserve(limits_of(CHAT), 1)
        with monkeypatch.context() as patched:
            patched.setattr(RedisLedger, "_take", unheard)
            through = reserve(limits_of(CHAT), 10)
        key = f"{the_ledger().prefix}:day:{NOON.date()}"
        the_ledger().client.hset(key, "witness", "1")
        settle(through, settled(4))
        assert the_ledger().client.hexists(key, "witness")
        assert kept() == Balances(spent_nanousd=4, held_nanousd=1, calls=2)


# Comparing, and what admin sees -------------------------------------------------------------------


def test_comparing_makes_nobody_wait(ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    flying = reserve(limits_of(CHAT), 10)
    made: list[object] = []

    def compared(*args: Any, **kwargs: Any) -> Any:
        """The hash is read, and the journal is not yet."""
        if not made:
            settle(flying, settled(3))
        made.append(reserve(limits_of(CHAT), 10))
        settle(reserve(limits_of(CHAT), 10), settled(1))
        return compare(*args, **kwargs)

    monkeypatch.setattr("ai_budget.ledger.redis.compare", compared)
    ticks = itertools.count()
    with periods.override_clock(lambda: NOON + timedelta(milliseconds=next(ticks))):
        assert no_differences()
    # A day and a month were looked at once each.
    assert len(made) == 2
    assert kept() == Balances(spent_nanousd=5, held_nanousd=20, calls=5)


def test_refusals_are_shown_and_leave_balances_as_they_are(ledger: RedisLedger) -> None:
    settle(reserve(limits_of(CHAT), 10), settled(4))
    ledger.tidy()
    server_lost_everything(ledger)
    ledger.count_refusal([day_key()])
    ledger.tidy()
    window = SpendWindow.objects.get(scope="feature:chat", period="day")
    assert (window.spent_nanousd, window.calls, window.refused) == (4, 1, 1)


def test_a_damaged_balance_does_not_stop_the_tick(
    ledger: RedisLedger, caplog: pytest.LogCaptureFixture
) -> None:
    reserve(limits_of(CHAT), 10)
    ledger.count_refusal([day_key()])
    ledger.client.hincrby(f"{ledger.prefix}:day:{NOON.date()}", "t feature:chat", -50)
    ledger.tidy()
    window = SpendWindow.objects.get(scope="feature:chat", period="day")
    assert (window.held_nanousd, window.refused) == (0, 1)
    assert "ai_budget_rebuild" in caplog.text


# Locks of others on the journal ------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has no rows to lock")
@pytest.mark.parametrize("settlement", [settled(4), estimated(10), RELEASED])
def test_a_row_that_somebody_locks_is_not_waited_for_for_ever(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch, settlement: Settlement
) -> None:
    flying = reserve(limits_of(CHAT), 10)
    shortest = "0.01" if connection.vendor == "postgresql" else 0
    monkeypatch.setattr(connecting, "LOCK_TIMEOUT_SECONDS", shortest)
    # Its statements were phrased with another patience.
    connections["default"].__dict__.pop("_ai_budget_journal", None)
    locked, done = threading.Event(), threading.Event()

    def lock() -> None:
        with transaction.atomic():
            CallLog.objects.select_for_update().get(pk=flying.id)
            locked.set()
            done.wait(30)
        connection.close()

    thread = threading.Thread(target=lock)
    thread.start()
    try:
        assert locked.wait(10)
        with pytest.raises(LedgerUnavailable):
            settle(flying, settlement)
    finally:
        done.set()
        thread.join()
        connections["default"].__dict__.pop("_ai_budget_journal", None)
    settle(flying, settlement)
    assert kept().held_nanousd == 0
    assert no_differences()


# Inside the caller's transaction ------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_balances_can_be_read_inside_a_transaction_though_nothing_is_filled(
    ledger: RedisLedger,
) -> None:
    reserve(limits_of(CHAT), 10)
    server_lost_everything(ledger)
    with transaction.atomic():
        assert kept() == Balances(held_nanousd=10, calls=1)
    assert ledger.client.dbsize() == 0


# Cost ---------------------------------------------------------------------------------------------


def test_a_second_refusal_costs_the_database_nothing(
    ledger: RedisLedger, django_assert_num_queries: Any
) -> None:
    limits = limits_of(CHAT, daily=5)
    with pytest.raises(BudgetExceeded):
        reserve(limits, 10)
    with django_assert_num_queries(0), pytest.raises(BudgetExceeded):
        reserve(limits, 10)
    assert not CallLog.objects.exists()


def test_only_the_journal_is_written_to_the_database(ledger: RedisLedger) -> None:
    settle(reserve(limits_of(CHAT), 10), settled(5))
    assert not SpendWindow.objects.exists()
    assert connection.alias == ledger.alias
