"""Which limits an attempt counts against: tables of what is in force, and what follows."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, date, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_budget import periods
from ai_budget.exceptions import FeatureDisabled
from ai_budget.periods import Period
from ai_budget.policy.limits import (
    Budget,
    Quota,
    Rules,
    Rung,
    balance_keys,
    ensure_enabled,
    ladder_limits,
    limits_in_force,
    own_limit,
    raised,
    refused_keys,
)
from ai_budget.values import SITE, Bucket, Charge, Limit, Measure

AT = datetime(2026, 5, 4, 12, tzinfo=UTC)
ZONE = ZoneInfo("UTC")
CHAT = Budget(name="chat")
DAY, MONTH, CALLS = "day", "month", "calls"


def windows(charge: Charge, rules: Rules, at: datetime = AT, zone: Any = ZONE) -> list[Limit]:
    """The limits of days and months."""
    found = limits_in_force(charge, rules, at=at, zone=zone)
    return [limit for limit in found if isinstance(limit, Limit)]


def buckets(charge: Charge, rules: Rules) -> dict[tuple[str, str], Bucket]:
    """The limits that refill, by scope and measure."""
    found = limits_in_force(charge, rules, at=AT, zone=ZONE)
    own = [limit for limit in found if isinstance(limit, Bucket)]
    named = {(bucket.scope, str(bucket.measure)): bucket for bucket in own}
    assert len(named) == len(own)
    return named


def in_force(
    charge: Charge | None = None, rules: Rules | None = None, *, at: datetime = AT, zone: Any = ZONE
) -> dict[tuple[str, str], Limit]:
    """The limits by scope and by "day", "month" or, for calls a day, "calls"."""
    limits = windows(charge or Charge(feature="chat"), rules or Rules(feature=CHAT), at, zone)
    named = {
        (limit.scope, CALLS if limit.measure is Measure.CALLS else str(limit.window.period)): limit
        for limit in limits
    }
    assert len(named) == len(limits)
    return named


def amounts(charge: Charge | None = None, rules: Rules | None = None) -> dict[Any, int | None]:
    return {name: limit.amount for name, limit in in_force(charge, rules).items()}


def of_caller(
    *quotas: Quota, charge: Charge | None = None, scope: str = "user:7"
) -> dict[str, int | None]:
    """What these quotas give a caller, by day, month and calls a day."""
    found = amounts(charge or Charge(feature="chat", user_id=7), Rules(feature=CHAT, quotas=quotas))
    return {name: amount for (of, name), amount in found.items() if of == scope}


# Features, categories and the site ---------------------------------------------------------------


def test_a_feature_and_the_site_are_counted_without_any_limit() -> None:
    assert amounts() == {
        ("feature:chat", DAY): None,
        ("feature:chat", MONTH): None,
        (SITE, DAY): None,
        (SITE, MONTH): None,
    }


def test_a_feature_has_its_limits() -> None:
    rules = Rules(feature=replace(CHAT, daily_limit=5, monthly_limit=50))

    assert amounts(rules=rules)["feature:chat", DAY] == 5
    assert amounts(rules=rules)["feature:chat", MONTH] == 50


def test_the_site_has_its_limits() -> None:
    rules = Rules(feature=CHAT, site=Budget(name=SITE, daily_limit=7, monthly_limit=70))

    assert amounts(rules=rules)[SITE, DAY] == 7
    assert amounts(rules=rules)[SITE, MONTH] == 70


def test_a_category_has_its_limits() -> None:
    rules = Rules(feature=CHAT, category=Budget(name="support", daily_limit=6, monthly_limit=60))

    assert amounts(rules=rules)["category:support", DAY] == 6
    assert amounts(rules=rules)["category:support", MONTH] == 60


def test_nothing_is_a_limit_too() -> None:
    assert amounts(rules=Rules(feature=replace(CHAT, daily_limit=0)))["feature:chat", DAY] == 0


def test_a_feature_that_is_its_own_category_counts_as_both() -> None:
    budget = replace(CHAT, daily_limit=5)

    found = amounts(rules=Rules(feature=budget, category=replace(budget)))

    assert (found["feature:chat", DAY], found["category:chat", DAY]) == (5, 5)


@pytest.mark.parametrize("watching", ["feature", "category", "site"])
def test_shadow_mode_is_that_of_its_own_budget(watching: str) -> None:
    rules = Rules(
        feature=Budget(name="chat", enforce=watching != "feature"),
        category=Budget(name="support", enforce=watching != "category"),
        site=Budget(name=SITE, enforce=watching != "site"),
    )

    found = in_force(rules=rules)

    shadowed = {scope.split(":")[0] for (scope, _), limit in found.items() if not limit.enforce}
    assert shadowed == {"*" if watching == "site" else watching}


def test_a_callers_quota_is_enforced_whatever_the_feature_does() -> None:
    rules = Rules(
        feature=replace(CHAT, enforce=False), quotas=(Quota(daily_limit=5, daily_calls=5),)
    )

    found = in_force(Charge(feature="chat", user_id=7), rules)

    assert all(limit.enforce for (scope, _), limit in found.items() if scope.startswith("user:"))


# Callers -----------------------------------------------------------------------------------------


def test_a_user_is_counted_without_any_quota() -> None:
    assert {scope for scope, _ in amounts(Charge(feature="chat", user_id=7))} == {
        "feature:chat",
        SITE,
        "user:7",
        "user:7,feature:chat",
    }


def test_a_subject_is_counted_without_any_quota() -> None:
    assert {scope for scope, _ in amounts(Charge(feature="chat", subject="acme"))} == {
        "feature:chat",
        SITE,
        "subject:acme",
        "subject:acme,feature:chat",
    }


def test_a_user_and_a_subject_are_both_counted() -> None:
    scopes = {scope for scope, _ in amounts(Charge(feature="chat", user_id=7, subject="acme"))}

    assert {"user:7", "user:7,feature:chat", "subject:acme", "subject:acme,feature:chat"} < scopes


def test_the_user_zero_is_a_user() -> None:
    assert ("user:0", DAY) in amounts(Charge(feature="chat", user_id=0))


def test_a_subject_with_a_users_number_is_no_user() -> None:
    found = of_caller(
        Quota(for_user=True, daily_limit=5),
        charge=Charge(feature="chat", subject="7"),
        scope="subject:7",
    )

    assert found == {DAY: None, MONTH: None}


@pytest.mark.parametrize("subject", ["acme,feature:chat", "acme,,feature:chat", ",feature:chat"])
def test_no_subject_is_counted_as_anothers_share_of_a_feature(subject: str) -> None:
    """A visitor who may choose a name must not use up the quota of another."""
    others = [Charge(feature="chat", subject=name) for name in ("acme", "acme,", "", ",")]

    mine = {scope for scope, _ in amounts(Charge(feature="chat", subject=subject))}
    theirs = {scope for charge in others for scope, _ in amounts(charge)}

    assert mine & theirs == {"feature:chat", SITE}


SUBJECTS = st.lists(st.sampled_from(["a", ",", ",feature:chat", "|day|"]), max_size=5).map("".join)


@given(SUBJECTS, SUBJECTS)
def test_no_two_subjects_share_a_balance(one: str, other: str) -> None:
    scopes = [
        {scope for scope, _ in amounts(Charge(feature="chat", subject=subject))}
        - {"feature:chat", SITE}
        for subject in (one, other)
    ]

    assert one == other or not scopes[0] & scopes[1]


@pytest.mark.parametrize(
    ("quotas", "given"),
    [
        pytest.param([], {DAY: None, MONTH: None}, id="none"),
        pytest.param(
            [Quota(daily_calls=9, daily_limit=5, monthly_limit=50)],
            {DAY: 5, MONTH: 50, CALLS: 9},
            id="everyones",
        ),
        pytest.param(
            [Quota(for_user=True, daily_calls=3, daily_limit=2, monthly_limit=20)],
            {DAY: 2, MONTH: 20, CALLS: 3},
            id="the-users-own",
        ),
        pytest.param(
            [Quota(daily_limit=5), Quota(for_user=True, daily_limit=8)],
            {DAY: 8, MONTH: None},
            id="the-users-own-wins",
        ),
        pytest.param(
            [Quota(for_user=True, daily_limit=8), Quota(daily_limit=5)],
            {DAY: 8, MONTH: None},
            id="in-any-order",
        ),
        pytest.param(
            [Quota(daily_calls=9, daily_limit=5), Quota(for_user=True, monthly_limit=20)],
            {DAY: 5, MONTH: 20, CALLS: 9},
            id="null-inherits-field-by-field",
        ),
        pytest.param(
            [Quota(daily_limit=5, daily_calls=9), Quota(for_user=True, daily_limit=0)],
            {DAY: 0, MONTH: None, CALLS: 9},
            id="zero-is-no-null",
        ),
        pytest.param(
            [Quota(daily_calls=9, daily_limit=5), Quota(for_user=True, unlimited=True)],
            {DAY: None, MONTH: None},
            id="unlimited-ends-the-search",
        ),
        pytest.param(
            [
                Quota(daily_calls=9, daily_limit=5, monthly_limit=50),
                Quota(for_user=True, unlimited=True, monthly_limit=20),
            ],
            {DAY: None, MONTH: 20},
            id="unlimited-but-for-what-it-says",
        ),
        pytest.param(
            [Quota(unlimited=True, daily_calls=9), Quota(for_user=True, daily_limit=2)],
            {DAY: 2, MONTH: None, CALLS: 9},
            id="everyone-unlimited-but-for-the-users-own",
        ),
        pytest.param(
            [Quota(daily_calls=0)], {DAY: None, MONTH: None, CALLS: 0}, id="zero-calls-blocks"
        ),
        pytest.param(
            [Quota(for_feature=True, daily_limit=5)], {DAY: None, MONTH: None}, id="not-a-features"
        ),
    ],
)
def test_a_users_quota(quotas: list[Quota], given: dict[str, int | None]) -> None:
    assert of_caller(*quotas) == given


@pytest.mark.parametrize(
    ("quotas", "given"),
    [
        pytest.param([Quota(daily_limit=5)], {DAY: None, MONTH: None}, id="not-everyones-whole"),
        pytest.param(
            [Quota(for_feature=True, daily_limit=5, daily_calls=9)],
            {DAY: 5, MONTH: None, CALLS: 9},
            id="everyones",
        ),
        pytest.param(
            [
                Quota(for_feature=True, daily_limit=5),
                Quota(for_feature=True, for_user=True, daily_limit=8),
            ],
            {DAY: 8, MONTH: None},
            id="the-users-own-wins",
        ),
        pytest.param(
            [
                Quota(for_user=True, unlimited=True),
                Quota(for_feature=True, daily_limit=5),
            ],
            {DAY: 5, MONTH: None},
            id="a-features-stays-beside-an-unlimited-whole",
        ),
    ],
)
def test_a_users_quota_for_one_feature(quotas: list[Quota], given: dict[str, int | None]) -> None:
    assert of_caller(*quotas, scope="user:7,feature:chat") == given


def test_a_subject_has_everyones_quota() -> None:
    found = of_caller(
        Quota(daily_limit=5, daily_calls=9),
        charge=Charge(feature="chat", subject="acme"),
        scope="subject:acme",
    )

    assert found == {DAY: 5, MONTH: None, CALLS: 9}


def test_a_subject_does_not_have_the_quota_of_the_user_it_comes_with() -> None:
    found = of_caller(
        Quota(daily_limit=5),
        Quota(for_user=True, unlimited=True),
        charge=Charge(feature="chat", user_id=7, subject="acme"),
        scope="subject:acme",
    )

    assert found == {DAY: 5, MONTH: None}


def test_nobodys_call_has_no_quota() -> None:
    rules = Rules(feature=CHAT, quotas=(Quota(daily_limit=0, daily_calls=0),))

    assert set(amounts(rules=rules).values()) == {None}


# Windows -----------------------------------------------------------------------------------------


def test_windows_are_those_of_the_zone() -> None:
    at, zone = datetime(2026, 5, 31, 22, 30, tzinfo=UTC), ZoneInfo("Europe/Berlin")

    found = in_force(at=at, zone=zone)

    assert found["feature:chat", DAY].window == periods.day(at, zone)
    assert found["feature:chat", DAY].window.first_day == date(2026, 6, 1)
    assert found["feature:chat", MONTH].window == periods.month(at, zone)


def test_a_limit_is_counted_in_the_balance_of_its_scope_and_window() -> None:
    limit = in_force()["feature:chat", MONTH]

    assert (limit.key.scope, limit.key.period, limit.key.first_day) == (
        "feature:chat",
        Period.MONTH,
        date(2026, 5, 1),
    )


# Buckets -----------------------------------------------------------------------------------------

RATES: dict[str, Any] = {"requests_per_minute": 20, "tokens_per_minute": 9_000}
USER = Charge(feature="chat", user_id=7, subject="acme")


def test_without_a_rate_there_is_no_bucket() -> None:
    assert buckets(USER, Rules(feature=CHAT, quotas=(Quota(), Quota(for_feature=True)))) == {}


@pytest.mark.parametrize(
    ("rated", "scope"),
    [("feature", "feature:chat"), ("category", "category:support"), ("site", SITE)],
)
def test_the_rates_of_a_budget_are_buckets_of_a_minute(rated: str, scope: str) -> None:
    budgets: dict[str, Any] = {
        "feature": CHAT,
        "category": Budget(name="support"),
        "site": Budget(name=SITE),
    }
    budgets[rated] = replace(budgets[rated], **RATES)

    assert buckets(Charge(feature="chat"), Rules(**budgets)) == {
        (scope, "requests"): Bucket(scope=scope, measure=Measure.REQUESTS, amount=20),
        (scope, "tokens"): Bucket(scope=scope, measure=Measure.TOKENS, amount=9_000),
    }


def test_a_rate_of_nothing_is_a_bucket_too() -> None:
    found = buckets(Charge(feature="chat"), Rules(feature=replace(CHAT, requests_per_minute=0)))

    assert {name: bucket.amount for name, bucket in found.items()} == {
        ("feature:chat", "requests"): 0
    }


def test_the_buckets_of_a_budget_in_shadow_mode_are_not_enforced() -> None:
    rules = Rules(
        feature=replace(CHAT, enforce=False, requests_per_minute=1),
        site=Budget(name=SITE, requests_per_minute=1),
        quotas=(Quota(requests_per_minute=1),),
    )

    found = buckets(Charge(feature="chat", user_id=7), rules)

    assert {scope: bucket.enforce for (scope, _), bucket in found.items()} == {
        "feature:chat": False,
        SITE: True,
        "user:7": True,
    }


def test_a_callers_rates_are_buckets_of_the_caller() -> None:
    rules = Rules(feature=CHAT, quotas=(Quota(requests_per_minute=5),))

    assert set(buckets(USER, rules)) == {("user:7", "requests"), ("subject:acme", "requests")}


def test_a_callers_rates_for_a_feature_are_apart() -> None:
    rules = Rules(
        feature=CHAT,
        quotas=(
            Quota(requests_per_minute=5),
            Quota(for_feature=True, tokens_per_minute=100),
            Quota(for_feature=True, for_user=True, tokens_per_minute=200),
        ),
    )

    found = buckets(Charge(feature="chat", user_id=7), rules)

    assert {name: bucket.amount for name, bucket in found.items()} == {
        ("user:7", "requests"): 5,
        ("user:7,feature:chat", "tokens"): 200,
    }


# Groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quotas", "day"),
    [
        pytest.param([Quota(daily_limit=1), Quota(group=(9, 1), daily_limit=2)], 2, id="a-group"),
        pytest.param(
            [Quota(for_user=True, daily_limit=3), Quota(group=(0, 1), daily_limit=2)],
            3,
            id="the-users-own",
        ),
        pytest.param(
            [Quota(group=(5, 1), daily_limit=1), Quota(group=(2, 9), daily_limit=2)],
            2,
            id="the-lowest-priority",
        ),
        pytest.param(
            [Quota(group=(5, 7), daily_limit=1), Quota(group=(5, 3), daily_limit=2)],
            2,
            id="then-the-lowest-id",
        ),
        pytest.param(
            [Quota(group=(1, 1), monthly_limit=9), Quota(group=(2, 2), daily_limit=2)],
            2,
            id="field-by-field",
        ),
        pytest.param(
            [Quota(group=(1, 1), unlimited=True), Quota(group=(2, 2), daily_limit=2)],
            None,
            id="unlimited-ends-the-search",
        ),
        pytest.param([Quota(group=(1, 1), daily_limit=0), Quota(daily_limit=2)], 0, id="zero"),
        pytest.param(
            [Quota(group=(1, 1), for_feature=True, daily_limit=2)], None, id="of-one-feature"
        ),
    ],
)
def test_a_members_quota(quotas: list[Quota], day: int | None) -> None:
    for given_order in (quotas, quotas[::-1]):
        assert of_caller(*given_order)[DAY] == day


def test_a_groups_quota_for_one_feature_is_for_that_feature() -> None:
    quota = Quota(group=(1, 1), for_feature=True, daily_limit=2)

    assert of_caller(quota, scope="user:7,feature:chat")[DAY] == 2


def test_a_groups_quota_is_no_subjects() -> None:
    found = of_caller(
        Quota(group=(1, 1), daily_limit=2),
        Quota(daily_limit=1),
        charge=USER,
        scope="subject:acme",
    )

    assert found[DAY] == 1


# Limits by themselves ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_limit", "name", "limit"),
    [(None, SITE, 9), (3, SITE, 3), (0, SITE, 0), (None, "chat", None), (3, "chat", 3)],
)
def test_the_settings_stand_in_for_the_site(
    given_limit: int | None, name: str, limit: int | None
) -> None:
    assert own_limit(given_limit, name, of_settings=9) == limit


@pytest.mark.parametrize(
    ("limit", "overrides", "in_force_now"),
    [(5, [], 5), (5, [9], 9), (5, [3, 9, 7], 9), (5, [3], 5), (0, [9], 9), (None, [9], None)],
)
def test_the_highest_override_raises_a_limit(
    limit: int | None, overrides: list[int], in_force_now: int | None
) -> None:
    assert raised(limit, overrides) == in_force_now


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("charge", "scope", "counted"),
    [
        (Charge(feature="chat"), "", {"feature:chat"}),
        (Charge(feature="chat"), "feature:chat", {"feature:chat"}),
        (Charge(feature="chat"), SITE, {"feature:chat", SITE}),
        (Charge(feature="chat"), "category:support", {"feature:chat", "category:support"}),
        (USER, "user:7", {"feature:chat", "user:7", "subject:acme"}),
        (USER, "user:7,feature:chat", {"feature:chat", "user:7", "subject:acme"}),
        (
            Charge(feature="chat", subject="a,feature:chat"),
            "",
            {"feature:chat", "subject:a,,feature:chat"},
        ),
    ],
)
def test_a_refusal_counts_in_the_days_of_the_limit_the_feature_and_the_caller(
    charge: Charge, scope: str, counted: set[str]
) -> None:
    day = date(2026, 5, 4)

    keys = refused_keys(charge, day, scope=scope)

    assert len(keys) == len(set(keys))
    assert {(key.scope, key.period, key.first_day) for key in keys} == {
        (name, Period.DAY, day) for name in counted
    }


# The journal -------------------------------------------------------------------------------------

NAMES = st.from_regex(r"[-a-zA-Z0-9_.]{1,8}", fullmatch=True)
MAYBE = st.none() | st.integers(0, 100)
QUOTAS = st.builds(
    Quota,
    for_user=st.booleans(),
    group=st.none() | st.tuples(st.integers(0, 3), st.integers(1, 3)),
    for_feature=st.booleans(),
    unlimited=st.booleans(),
    daily_calls=MAYBE,
    daily_limit=MAYBE,
    monthly_limit=MAYBE,
    requests_per_minute=MAYBE,
    tokens_per_minute=MAYBE,
)


@given(
    feature=NAMES,
    category=st.none() | NAMES,
    user_id=st.none() | st.integers(0) | st.uuids() | NAMES,
    subject=st.text(max_size=20),
    quotas=st.lists(QUOTAS, max_size=4),
    at=st.datetimes(
        min_value=datetime(2020, 1, 1),  # noqa: DTZ001 - hypothesis adds the zone itself
        max_value=datetime(2040, 1, 1),  # noqa: DTZ001
        timezones=st.just(UTC),
    ),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "Pacific/Apia", "Asia/Kathmandu"]).map(ZoneInfo),
)
def test_a_journals_row_tells_the_balances_that_its_call_was_counted_in(
    feature: str,
    category: str | None,
    user_id: int | uuid.UUID | str | None,
    subject: str,
    quotas: list[Quota],
    at: datetime,
    zone: ZoneInfo,
) -> None:
    """Whatever the limits are, and whatever becomes of them before the call is settled."""
    charge = Charge(feature=feature, user_id=user_id, subject=subject)
    rules = Rules(
        feature=Budget(name=feature),
        category=None if category is None else Budget(name=category),
        quotas=tuple(quotas),
    )

    limits = windows(charge, rules, at, zone)

    told = balance_keys(charge, rules.category_name, periods.day(at, zone).first_day)
    assert sorted(told) == sorted({limit.key for limit in limits})


# The ladder's limits -----------------------------------------------------------------------------


def test_the_ladder_follows_the_money_of_feature_category_and_site() -> None:
    limited = replace(CHAT, daily_limit=5, monthly_limit=50)
    rules = Rules(
        feature=limited,
        category=replace(limited, name="support"),
        site=replace(limited, name=SITE),
        quotas=(Quota(daily_limit=1, daily_calls=1), Quota(for_feature=True, monthly_limit=1)),
    )
    charge = Charge(feature="chat", user_id=7, subject="acme")

    followed = ladder_limits(rules, limits_in_force(charge, rules, at=AT, zone=ZONE))

    assert {(limit.scope, str(limit.window.period)) for limit in followed} == {
        (scope, period)
        for scope in ("feature:chat", "category:support", SITE)
        for period in (DAY, MONTH)
    }


def test_the_ladder_does_not_follow_what_has_no_limit() -> None:
    rules = Rules(feature=CHAT)
    limits = limits_in_force(Charge(feature="chat"), rules, at=AT, zone=ZONE)

    assert ladder_limits(rules, limits) == []


RUNG = Rung(at_percent=50, model="haiku")


@pytest.mark.parametrize(
    ("owner", "watching", "followed"),
    [
        ("chat", "", {"feature:chat", "category:support", SITE}),
        ("chat", "support", {"feature:chat", SITE}),
        ("support", "chat", {"category:support", SITE}),
        (SITE, "chat support", {SITE}),
        ("chat", "chat", {"feature:chat", "category:support", SITE}),
        ("chat", "chat support", {"feature:chat", SITE}),
    ],
)
def test_a_limit_in_shadow_mode_drives_no_ladder_but_its_budgets_own(
    owner: str, watching: str, followed: set[str]
) -> None:
    def budget(name: str) -> Budget:
        return Budget(
            name=name,
            daily_limit=5,
            enforce=name not in watching.split(),
            rungs=(RUNG,) if name == owner else (),
        )

    rules = Rules(feature=budget("chat"), category=budget("support"), site=budget(SITE))
    limits = limits_in_force(Charge(feature="chat"), rules, at=AT, zone=ZONE)

    assert {limit.scope for limit in ladder_limits(rules, limits)} == followed


ONE, TWO, THREE = (Rung(at_percent=percent, model="haiku") for percent in (50, 60, 70))


@pytest.mark.parametrize(
    ("feature", "category", "site", "ladder"),
    [
        ((ONE,), (TWO,), (THREE,), (ONE,)),
        ((), (TWO,), (THREE,), (TWO,)),
        ((), (), (THREE,), (THREE,)),
        ((), None, (THREE,), (THREE,)),
        ((), (), (), ()),
    ],
)
def test_the_nearest_ladder_is_climbed(
    feature: tuple[Rung, ...],
    category: tuple[Rung, ...] | None,
    site: tuple[Rung, ...],
    ladder: tuple[Rung, ...],
) -> None:
    rules = Rules(
        feature=replace(CHAT, rungs=feature),
        category=None if category is None else Budget(name="support", rungs=category),
        site=Budget(name=SITE, rungs=site),
    )

    assert rules.rungs == ladder


# Paused ------------------------------------------------------------------------------------------


def test_what_is_enabled_passes() -> None:
    ensure_enabled(Rules(feature=CHAT, category=Budget(name="support")))


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        (Rules(feature=Budget(name="chat", enabled=False)), "'chat'"),
        (Rules(feature=CHAT, category=Budget(name="support", enabled=False)), "'support'"),
        (Rules(feature=CHAT, site=Budget(name=SITE, enabled=False)), "the whole site"),
    ],
)
def test_what_is_paused_is_refused_by_name(rules: Rules, named: str) -> None:
    with pytest.raises(FeatureDisabled, match=named):
        ensure_enabled(rules)
