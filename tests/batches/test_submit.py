"""``submit_batch``: what it takes, what it holds before anything is sent, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from anthropic.types import TextBlock
from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured

import ai_budget
from ai_budget import batches
from ai_budget.exceptions import (
    AIBudgetError,
    BudgetExceeded,
    FeatureDisabled,
    LimitReached,
    QuotaExceeded,
    RateLimited,
    UnboundedCall,
    UnpricedModel,
)
from ai_budget.guard.batch import opening as openings
from ai_budget.guard.batch import preparing
from ai_budget.ledger import base as ledgers
from ai_budget.models import Batch, CallLog, FeatureBudget, UserQuota
from ai_budget.money import to_usd
from ai_budget.periods import Period
from ai_budget.signals import batch_waiting, call_refused
from ai_budget.testing import AnthropicSimulator, Errored, freeze, override_budget
from ai_budget.values import BalanceKey
from tests.batches.submitted import (
    FEATURE,
    HAIKU,
    OPUS,
    SONNET,
    assert_nothing_left,
    differences,
    items,
    keys,
    most,
    reservation,
    submit,
    to_be_sent,
    work_off,
)
from tests.guard.books import balance, ledger_of_the_run, refusals, rows, site

pytestmark = pytest.mark.django_db

PROMPT = "Why is the sky blue?"
MESSAGES = [{"role": "user", "content": PROMPT}]
MARKED = [{"type": "text", "text": "word " * 500, "cache_control": {"type": "ephemeral"}}]


@pytest.fixture
def user(db: None) -> Any:
    return get_user_model().objects.create_user("ada")


@pytest.fixture
def refused() -> Iterator[list[AIBudgetError]]:
    """What listeners are told of refusals."""
    told: list[AIBudgetError] = []

    def hear(error: AIBudgetError, **kwargs: object) -> None:
        told.append(error)

    call_refused.connect(hear)
    yield told
    call_refused.disconnect(hear)


def usd(nanousd: int) -> Decimal:
    return to_usd(nanousd)


def of_three() -> int:
    """What a batch of three equal prompts holds, and a third of it each of them."""
    return 3 * most({"model": HAIKU, "max_tokens": 100, "messages": MESSAGES})


# What it takes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        PROMPT,
        MESSAGES,
        tuple(MESSAGES),
        {"messages": MESSAGES},
        {"messages": MESSAGES, "max_tokens": 100},
        ("7", PROMPT),
        (7, MESSAGES),
        ("7", {"messages": MESSAGES}),
        {"custom_id": "7", "params": {"messages": MESSAGES}},
        {"params": {"messages": MESSAGES}},
    ],
)
def test_a_request_is_a_prompt_messages_or_parameters(
    api: AnthropicSimulator, request_: Any
) -> None:
    batch = submit([request_], model=HAIKU)

    assert to_be_sent(batch) == [{"model": HAIKU, "max_tokens": 100, "messages": MESSAGES}]
    assert keys(batch) in (["7"], ["0"])


@pytest.mark.parametrize(
    "requests",
    [
        ["one", "two"],
        ("one", "two"),
        {"a": "one", "b": "two"},
        iter(["one", "two"]),
        (text for text in ("one", "two")),
        {"one": 1, "two": 2}.keys(),
    ],
    ids=["list", "tuple", "dict", "iterator", "generator", "keys"],
)
def test_requests_come_from_whatever_can_be_read(api: AnthropicSimulator, requests: Any) -> None:
    batch = submit(requests)

    texts = [params["messages"][0]["content"] for params in to_be_sent(batch)]
    assert texts == ["one", "two"]


def test_what_is_said_for_all_is_for_those_that_do_not_say_so_themselves(
    api: AnthropicSimulator,
) -> None:
    own = {"messages": MESSAGES, "model": SONNET, "max_tokens": 7, "temperature": 0}

    batch = submit([PROMPT, own], model=HAIKU, system="Be brief.", temperature=1, tags={"a": "b"})

    assert to_be_sent(batch) == [
        {
            "model": HAIKU,
            "max_tokens": 100,
            "system": "Be brief.",
            "temperature": 1,
            "messages": MESSAGES,
        },
        {**own, "system": "Be brief."},
    ]
    assert batch.tags == {"a": "b"}


def test_objects_of_the_sdk_are_sent_as_what_they_stand_for(api: AnthropicSimulator) -> None:
    block = TextBlock(type="text", text="Blue, mostly.")

    batch = submit([[*MESSAGES, {"role": "assistant", "content": [block]}]])

    answer = to_be_sent(batch)[0]["messages"][1]
    assert answer["content"] == [{"type": "text", "text": "Blue, mostly."}]


def test_text_of_any_kind_is_sent_as_it_is(api: AnthropicSimulator) -> None:
    text = "naïve 🦊 \0 \ud83e ' \" \\ \N{LINE SEPARATOR}"

    batch = submit([text])
    work_off(batch)

    (sent,) = (api.requests[0].body or {})["requests"]
    assert sent["params"]["messages"] == [{"role": "user", "content": text}]


# Ids ---------------------------------------------------------------------------------------------


def test_an_item_without_an_id_has_its_position(api: AnthropicSimulator) -> None:
    assert keys(submit(["a", ("seven", "b"), "c"])) == ["0", "seven", "2"]


def test_ids_are_kept_as_texts(api: AnthropicSimulator) -> None:
    ids = [42, date(2026, 11, 22), "Ünïcode and spaces / slashes", "x" * 200, ""]

    assert keys(submit([(key, PROMPT) for key in ids])) == [str(key) for key in ids]


def test_ids_that_differ_by_case_alone_are_two(api: AnthropicSimulator) -> None:
    batch = submit([("a", "one"), ("A", "two"), ("ä", "three")])
    work_off(batch)

    answers = {result.key: result.status for result in batch.results()}
    assert answers == {"a": "succeeded", "A": "succeeded", "ä": "succeeded"}


def test_the_api_is_told_ids_that_no_other_batch_has(api: AnthropicSimulator) -> None:
    one, other = submit([("a b", PROMPT), PROMPT]), submit([("a b", PROMPT), PROMPT])

    ids = [item.custom_id for batch in (one, other) for item in items(batch)]
    assert len(set(ids)) == 4
    assert all(0 < len(each) <= 64 for each in ids)


# What is no request ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (5, TypeError, "a prompt, a list of messages"),
        (None, TypeError, "a prompt, a list of messages"),
        (b"bytes", TypeError, "a prompt, a list of messages"),
        ([], ValueError, "needs messages"),
        ({"max_tokens": 5}, ValueError, "needs messages"),
        ({"messages": "text"}, ValueError, "needs messages"),
        (["id", PROMPT], TypeError, "tuple"),
        ({"messages": [{"role": "user", "content": object()}]}, TypeError, "JSON"),
        ({"messages": [{"role": "user", "content": float("nan")}]}, TypeError, "JSON"),
        ({"messages": MESSAGES, "stream": True}, ValueError, "stream"),
        ({"messages": MESSAGES, "speed": "fast"}, ValueError, "fast"),
        ({"messages": MESSAGES, "extra_headers": {}, "timeout": 5}, TypeError, "timeout"),
        ({"messages": MESSAGES, "max_tokens": "many"}, UnboundedCall, "max_tokens"),
        ({"messages": MESSAGES, "max_tokens": -1}, UnboundedCall, "max_tokens"),
        ({"messages": MESSAGES, "teleport": True}, UnboundedCall, "teleport"),
        ({"messages": MESSAGES, "mcp_servers": [{"url": "x"}]}, UnboundedCall, "mcp_servers"),
        ({"messages": MESSAGES, "model": "claude-of-tomorrow"}, UnpricedModel, "tomorrow"),
        ({"params": {"model": HAIKU}}, ValueError, "needs messages"),
    ],
)
def test_an_error_names_its_item_and_nothing_is_left_behind(
    api: AnthropicSimulator, wrong: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=f"'1'.*{says}"):
        submit(["fine", wrong, "not read"])

    assert_nothing_left(api)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (("a", PROMPT), "'a': Two items"),
        (("x" * 201, PROMPT), "at position 1: .*200 characters"),
        (("nul\0", PROMPT), "no database"),
        (("half \ud83e", PROMPT), "no database"),
    ],
)
def test_an_id_that_cannot_be_told_from_others_or_be_kept_is_refused(
    api: AnthropicSimulator, second: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        submit([("a", PROMPT), second])

    assert_nothing_left(api)


def test_errors_carry_no_prompts(api: AnthropicSimulator) -> None:
    secret = "the secret recipe " * 20

    with pytest.raises(ValueError, match="Item at position 0") as error:
        submit([(secret, "id")])

    assert "secret" not in str(error.value)


@pytest.mark.parametrize("requests", [PROMPT, b"x", {"model": HAIKU, "messages": MESSAGES}])
def test_one_request_alone_is_no_batch(api: AnthropicSimulator, requests: Any) -> None:
    with pytest.raises(TypeError, match="requests is a list"):
        submit(requests)

    assert_nothing_left(api)


@pytest.mark.parametrize("requests", [[], {}, iter(())])
def test_a_batch_of_nothing_is_refused(api: AnthropicSimulator, requests: Any) -> None:
    with pytest.raises(ValueError, match="at least one"):
        submit(requests)

    assert_nothing_left(api)


@pytest.mark.parametrize("callback", ["no.such.callable", "os.name", print])
def test_a_callback_that_cannot_be_called_is_refused(
    api: AnthropicSimulator, callback: Any
) -> None:
    with pytest.raises(TypeError, match="callable"):
        submit([PROMPT], on_result=callback)

    assert_nothing_left(api)


def test_without_a_key_nothing_is_read(
    api: AnthropicSimulator, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    settings.AI_BUDGET = {**settings.AI_BUDGET, "API_KEY": None}

    def requests() -> Iterator[str]:
        raise AssertionError("was read")
        yield ""

    with pytest.raises(ImproperlyConfigured):
        submit(requests())

    assert_nothing_left(api)


# What it holds -----------------------------------------------------------------------------------


def test_the_worst_case_of_all_items_at_half_the_price_is_held_before_anything_is_sent(
    api: AnthropicSimulator,
) -> None:
    batch = submit([PROMPT, {"messages": MESSAGES, "model": OPUS, "max_tokens": 4_000}])

    bounds = [most(params) for params in to_be_sent(batch)]
    assert [item.reserved_nanousd for item in items(batch)] == bounds
    assert bounds[1] > 4_000 * 20_000 // 2
    assert batch.reserved_nanousd == batch.held_nanousd == sum(bounds)
    row = reservation(batch)
    assert (row.status, row.kind, row.counted) == ("reserved", "batch", 2)
    assert row.reserved_nanousd == sum(bounds)
    assert (site().held_nanousd, site().calls) == (sum(bounds), 2)
    assert balance(f"feature:{FEATURE}").held_nanousd == sum(bounds)
    assert api.requests == []


def test_a_batch_is_returned_as_it_waits(api: AnthropicSimulator, user: Any) -> None:
    batch = submit(["a", "b"], user=user, subject="tenant", tags={"plan": "free"})

    stored = Batch.objects.get()
    assert stored == batch
    assert (stored.status, stored.total, stored.open) == ("open", 2, 2)
    assert (stored.feature_id, stored.user_id, stored.subject) == (FEATURE, user.pk, "tenant")
    assert stored.tags == {"plan": "free"}
    submission = batch.submissions.get()
    assert (submission.status, submission.items_count) == ("waiting", 2)


def test_the_charge_around_it_pays(api: AnthropicSimulator, user: Any) -> None:
    with ai_budget.charge(feature="tickets", user=user, tags={"a": "b"}):
        batch = ai_budget.submit_batch([PROMPT])

    assert (batch.feature_id, batch.user_id, batch.tags) == ("tickets", user.pk, {"a": "b"})
    assert balance(f"user:{user.pk}").held_nanousd == batch.held_nanousd > 0


def test_when_all_is_answered_half_the_price_is_booked_and_nothing_held(
    api: AnthropicSimulator,
) -> None:
    batch = work_off(submit(["a", "b", "c"]))

    bill = sum(ai_budget.price(it.model, it.usage, batch=True) for it in api.billed)
    assert batch.status == "finished"
    assert sum(row.cost_nanousd or 0 for row in rows()) == batch.spent_nanousd == bill > 0
    assert (site().spent_nanousd, site().held_nanousd, site().calls) == (bill, 0, 3)


# Limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "scope", "limit"),
    [
        (FEATURE, f"feature:{FEATURE}", "daily_limit_usd"),
        (FEATURE, f"feature:{FEATURE}", "monthly_limit_usd"),
        ("*", "*", "daily_limit_usd"),
        ("jobs", "category:jobs", "monthly_limit_usd"),
    ],
)
def test_what_does_not_fit_a_budget_is_refused_and_says_how_many_items_would(
    api: AnthropicSimulator, budget: str, scope: str, limit: str, refused: list[AIBudgetError]
) -> None:
    jobs = FeatureBudget.objects.create(name="jobs")
    FeatureBudget.objects.create(name=FEATURE, parent=jobs)
    fields: dict[str, Any] = {limit: usd(of_three() - 1)}

    with override_budget(budget, **fields), pytest.raises(BudgetExceeded) as error:
        submit([PROMPT] * 3, model=HAIKU)

    assert error.value.items_fit == 2
    assert "2 of its items would fit" in str(error.value)
    assert (error.value.requested, error.value.limit) == (of_three(), of_three() - 1)
    assert error.value.scope == scope
    assert refused == [error.value]
    assert refusals()[f"feature:{FEATURE}"] == 1
    assert_nothing_left(api)


def test_what_fits_to_the_nano_dollar_is_taken(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, daily_limit_usd=usd(of_three())):
        batch = submit([PROMPT] * 3, model=HAIKU)

    assert batch.held_nanousd == of_three()


@pytest.mark.parametrize(
    ("quota", "fit"),
    [
        ({"daily_calls": 2}, 2),
        ({"daily_calls": 0}, 0),
        ({"daily_limit_usd": ...}, 2),
        ({"monthly_limit_usd": ...}, 2),
    ],
)
@pytest.mark.parametrize("subject", ["", "tenant"])
def test_a_quota_counts_every_item(
    api: AnthropicSimulator, user: Any, subject: str, quota: dict[str, Any], fit: int
) -> None:
    fields = {name: usd(of_three() - 1) if it is ... else it for name, it in quota.items()}
    UserQuota.objects.create(user=None if subject else user, **fields)

    with pytest.raises(QuotaExceeded) as error:
        submit([PROMPT] * 3, model=HAIKU, user=None if subject else user, subject=subject)

    assert error.value.items_fit == fit
    assert_nothing_left(api)


def test_the_calls_of_a_batch_are_calls_of_the_day(api: AnthropicSimulator, user: Any) -> None:
    UserQuota.objects.create(user=user, daily_calls=4)
    submit([PROMPT] * 3, user=user)
    ai_budget.ask(PROMPT, feature=FEATURE, user=user)

    with pytest.raises(QuotaExceeded):
        ai_budget.ask(PROMPT, feature=FEATURE, user=user)


def test_a_batch_takes_one_request_of_a_rate_and_no_tokens(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, requests_per_minute=2, tokens_per_minute=10):
        submit([PROMPT] * 5)
        submit([PROMPT] * 5)

        with pytest.raises(RateLimited) as error:
            submit([PROMPT] * 5, allow_partial=True)

    assert error.value.items_fit is None
    assert Batch.objects.count() == 2


def test_a_refused_batch_takes_no_request_of_a_rate(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, requests_per_minute=1, daily_limit_usd="0.0001"):
        with pytest.raises(BudgetExceeded):
            submit([PROMPT] * 3)
        with override_budget(FEATURE, daily_limit_usd=1):
            submit([PROMPT] * 3)


@pytest.mark.parametrize("scope", [FEATURE, "*"])
def test_a_paused_feature_takes_none(
    api: AnthropicSimulator, scope: str, refused: list[AIBudgetError]
) -> None:
    with override_budget(scope, enabled=False), pytest.raises(FeatureDisabled):
        submit([PROMPT])

    assert len(refused) == 1
    assert refusals()[f"feature:{FEATURE}"] == 1
    assert_nothing_left(api)


def test_a_feature_that_is_paused_while_items_are_read_takes_none(api: AnthropicSimulator) -> None:
    FeatureBudget.objects.create(name=FEATURE)

    def requests() -> Iterator[str]:
        yield PROMPT
        FeatureBudget.objects.filter(name=FEATURE).update(enabled=False)
        yield PROMPT

    with pytest.raises(FeatureDisabled):
        submit(requests())

    assert_nothing_left(api)


def test_an_unknown_feature_is_refused_where_the_settings_say_so(
    api: AnthropicSimulator, settings: Any, refused: list[AIBudgetError]
) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "UNKNOWN_FEATURE": "refuse"}

    with pytest.raises(FeatureDisabled):
        submit([PROMPT])

    assert len(refused) == 1
    assert refusals() == {}
    assert_nothing_left(api)


def test_shadow_mode_records_and_lets_it_pass(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, daily_limit_usd=0, enforce=False):
        batch = submit([PROMPT])

    assert "would" in reservation(batch).decision
    assert batch.status == "open"


def test_a_category_that_changes_meanwhile_is_the_one_it_counts_in(
    api: AnthropicSimulator,
) -> None:
    jobs = FeatureBudget.objects.create(name="jobs")
    FeatureBudget.objects.create(name=FEATURE)

    def requests() -> Iterator[str]:
        yield PROMPT
        FeatureBudget.objects.filter(name=FEATURE).update(parent=jobs)
        yield PROMPT

    batch = work_off(submit(requests()))

    assert batch.category == "jobs"
    assert balance("category:jobs").spent_nanousd == batch.spent_nanousd > 0
    assert differences(batch) == []


# What its feature's budget says ------------------------------------------------------------------


def test_max_tokens_is_capped_and_given_by_the_feature(api: AnthropicSimulator) -> None:
    large = {"messages": MESSAGES, "max_tokens": 5_000}
    small = {"messages": MESSAGES, "max_tokens": 7}

    with override_budget(FEATURE, max_tokens=40):
        batch = ai_budget.submit_batch([PROMPT, large, small], feature=FEATURE)

    assert [params["max_tokens"] for params in to_be_sent(batch)] == [40, 40, 7]
    assert [item.max_tokens for item in items(batch)] == [40, 40, 7]
    assert [item.decision for item in items(batch)] == ["", "max_tokens 5000 to 40", ""]


def test_the_model_is_the_features_where_nobody_says_one(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, model=SONNET):
        batch = submit([PROMPT])

    assert to_be_sent(batch)[0]["model"] == SONNET


def test_the_ladder_decides_at_submission_and_is_booked(api: AnthropicSimulator) -> None:
    limit = usd(of_three() * 10)
    with override_budget(FEATURE, daily_limit_usd=limit, rungs=[(50, HAIKU)]):
        submit([PROMPT] * 20, model=HAIKU)  # more than half of it

        batch = submit([PROMPT], model=OPUS)
        work_off(batch)

    (item,) = items(batch)
    assert (item.requested_model, item.model) == (OPUS, HAIKU)
    assert "rung 50 %" in item.decision
    (row,) = CallLog.objects.filter(call_id=item.call_id)
    assert (row.requested_model, row.model) == (OPUS, HAIKU)
    assert row.decision == item.decision
    assert row.cost_nanousd == ai_budget.price(HAIKU, api.billed[-1].usage, batch=True)
    assert "downgrade" in row.saved_reason


def test_marks_for_the_prompt_cache_are_kept_and_bounded_as_writes(
    api: AnthropicSimulator,
) -> None:
    plain = [{**MARKED[0]}]
    del plain[0]["cache_control"]

    marked, unmarked = submit([PROMPT], system=MARKED), submit([PROMPT], system=plain)

    assert to_be_sent(marked)[0]["system"] == MARKED
    assert marked.held_nanousd > unmarked.held_nanousd * 1.2


def test_the_prompt_caching_of_its_feature_marks_nothing(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, prompt_cache="5m"):
        batch = submit([PROMPT], system="word " * 5_000)

    assert "cache_control" not in str(to_be_sent(batch))


# Again -------------------------------------------------------------------------------------------


def test_called_again_with_its_key_it_returns_the_first_batch(api: AnthropicSimulator) -> None:
    first = submit([PROMPT], idempotency_key="nightly 2026-11-22")
    held = site().held_nanousd

    def requests() -> Iterator[str]:
        raise AssertionError("was read")
        yield ""

    again = submit(requests(), idempotency_key="nightly 2026-11-22")

    assert again == first
    assert site().held_nanousd == held
    assert submit([PROMPT], idempotency_key="nightly 2026-11-23") != first


def test_a_key_of_somebody_else_is_refused(api: AnthropicSimulator, user: Any) -> None:
    submit([PROMPT], idempotency_key="key")

    for other in ({"user": user}, {"subject": "tenant"}, {"feature": "other"}):
        with pytest.raises(ValueError, match="another feature, user or subject"):
            submit([PROMPT], idempotency_key="key", **other)


def test_keys_that_differ_by_case_alone_are_never_taken_for_one(api: AnthropicSimulator) -> None:
    first = submit([PROMPT], idempotency_key="key")

    try:
        other = submit([PROMPT], idempotency_key="KEY")
    except ValueError:
        assert Batch.objects.get() == first
    else:
        assert other != first


@pytest.mark.parametrize("key", ["", "x" * 201, 5])
def test_a_key_is_a_text(api: AnthropicSimulator, key: Any) -> None:
    with pytest.raises(ValueError, match="idempotency_key"):
        submit([PROMPT], idempotency_key=key)

    assert_nothing_left(api)


def test_a_key_of_a_refused_batch_is_free_again(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, daily_limit_usd=0), pytest.raises(BudgetExceeded):
        submit([PROMPT], idempotency_key="key")

    assert submit([PROMPT], idempotency_key="key").status == "open"


def test_submitted_twice_at_once_it_is_one_batch(api: AnthropicSimulator) -> None:
    others: list[Batch] = []

    def requests() -> Iterator[str]:
        yield PROMPT
        others.append(submit([PROMPT, PROMPT], idempotency_key="key"))

    batch = submit(requests(), idempotency_key="key")

    assert [batch] == others
    assert Batch.objects.get() == batch
    assert site().held_nanousd == batch.held_nanousd
    assert site().calls == batch.total == 2
    assert differences(batch) == []


def test_what_the_first_of_two_took_is_no_reason_to_refuse_the_second(
    api: AnthropicSimulator,
) -> None:
    others: list[Batch] = []

    def requests() -> Iterator[str]:
        yield PROMPT
        others.append(submit([PROMPT], idempotency_key="key", model=HAIKU))

    with override_budget(FEATURE, daily_limit_usd=usd(of_three() // 3)):
        batch = submit(requests(), idempotency_key="key", model=HAIKU)

    assert [batch] == others
    assert Batch.objects.get() == batch


# What failed, once more --------------------------------------------------------------------------


def test_what_was_not_answered_is_submitted_once_more(api: AnthropicSimulator) -> None:
    api.batches.enqueue(Errored())
    first = work_off(submit([("bad", "one"), ("good", "two")], model=HAIKU))

    again = first.resubmit()

    assert (again.resubmits, keys(again)) == (first, ["bad"])
    assert to_be_sent(again)[0]["messages"][0]["content"] == "one"
    assert work_off(again).succeeded == 1


def test_submitted_once_more_its_feature_decides_anew(api: AnthropicSimulator) -> None:
    api.batches.enqueue(Errored())
    submit([PROMPT], model=HAIKU)
    limit = usd(site().held_nanousd * 50)
    with override_budget(FEATURE, daily_limit_usd=limit, rungs=[(1, HAIKU)], max_tokens=50):
        first = work_off(submit([PROMPT], model=OPUS))
    assert [item.model for item in items(first)] == [HAIKU]

    again = first.resubmit()

    assert to_be_sent(again) == [{"model": OPUS, "max_tokens": 50, "messages": MESSAGES}]


def test_submitted_once_more_twice_it_is_one_batch(api: AnthropicSimulator) -> None:
    api.batches.enqueue(Errored())
    first = work_off(submit([PROMPT]))

    assert first.resubmit() == first.resubmit()
    assert Batch.objects.count() == 2


def test_a_batch_that_goes_on_is_not_submitted_once_more(api: AnthropicSimulator) -> None:
    batch = submit([PROMPT])

    with pytest.raises(AIBudgetError, match="not over"):
        batch.resubmit()


def test_nothing_is_submitted_once_more_where_all_was_answered(api: AnthropicSimulator) -> None:
    batch = work_off(submit([PROMPT]))

    with pytest.raises(AIBudgetError, match="Nothing"):
        batch.resubmit()

    assert Batch.objects.get() == batch


# Cut off in the middle ---------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process: nothing of the submission's own runs any more."""


STEPS: dict[str, tuple[Callable[[], Any], str]] = {
    "before anything is reserved": (lambda: openings.BatchOpening, "_reserve"),
    "after it was reserved": (lambda: preparing.Preparation, "open"),
    "in the middle of its rows": (lambda: preparing.Preparation, "_leave_out"),
}


@pytest.mark.parametrize("step", STEPS)
def test_what_was_killed_in_the_middle_counts_no_more_after_a_while(
    api: AnthropicSimulator, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = STEPS[step]

    def die(*args: object, **kwargs: object) -> None:
        raise Killed

    start = datetime(2026, 11, 22, 12, tzinfo=UTC)
    with freeze(start), monkeypatch.context() as dying:
        dying.setattr(owner(), name, die)
        dying.setattr(openings, "discard", lambda batch: None)
        with pytest.raises(Killed):
            submit([PROMPT] * 3)
    assert Batch.objects.get().status == "preparing"

    with freeze(start + timedelta(minutes=59)):
        batches.tidy()
        assert Batch.objects.exists()
        assert batches.due() == []
    with freeze(start + timedelta(minutes=61)):
        batches.tidy()
        assert_nothing_left(api)


def test_a_batch_that_was_given_up_meanwhile_is_not_opened(api: AnthropicSimulator) -> None:
    start = datetime(2026, 11, 22, 12, tzinfo=UTC)

    def requests() -> Iterator[str]:
        yield PROMPT
        with freeze(start + timedelta(hours=2)):
            batches.tidy()

    with freeze(start), pytest.raises(AIBudgetError, match="given up"):
        submit(requests())

    assert_nothing_left(api)


def test_a_batch_that_is_being_given_up_is_not_opened(api: AnthropicSimulator) -> None:
    def requests() -> Iterator[str]:
        yield PROMPT
        # Whoever gives it up says so first, and then deletes its rows by and by.
        Batch.objects.update(finished_at=ledgers.current().now())

    with pytest.raises(AIBudgetError, match="given up"):
        submit(requests())

    assert_nothing_left(api)


@pytest.mark.parametrize("error", [KeyboardInterrupt, LookupError, GeneratorExit])
def test_requests_that_break_off_leave_nothing_behind(
    api: AnthropicSimulator, error: type[BaseException]
) -> None:
    def requests() -> Iterator[str]:
        yield PROMPT
        raise error

    with pytest.raises(error):
        submit(requests())

    assert_nothing_left(api)


def test_interrupted_after_it_was_opened_it_stays(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(openings.BatchOpening, "_book_hits", interrupt)
        with pytest.raises(KeyboardInterrupt):
            submit([PROMPT])

    batch = Batch.objects.get()
    assert batch.status == "open"
    assert work_off(batch).succeeded == 1
    assert differences(batch) == []


# Windows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "night",
    [datetime(2026, 11, 22, 23, 59, 59, tzinfo=UTC), datetime(2026, 11, 30, 23, 59, tzinfo=UTC)],
    ids=["midnight", "the month's end"],
)
def test_items_belong_to_the_window_in_which_they_were_reserved(
    api: AnthropicSimulator, night: datetime
) -> None:
    with freeze(night):
        batch = submit(["one", "two"])
    with freeze(night + timedelta(hours=5)):
        work_off(batch)

        assert site().spent_nanousd == 0
        key = BalanceKey("*", Period.MONTH, night.date().replace(day=1))
        assert ledgers.current().balances([key])[key].spent_nanousd == batch.spent_nanousd > 0
        assert {row.day for row in rows()} == {night.date()}
        assert {row.reserved_at for row in rows()} == {night}
        assert ledgers.current().differences(night.date()) == []


def test_what_is_read_over_midnight_belongs_to_the_day_in_which_it_is_reserved(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = datetime(2026, 11, 22, 23, 59, 59, tzinfo=UTC)
    after = before + timedelta(minutes=2)
    clock = [before]
    monkeypatch.setattr(ledger_of_the_run(), "now", lambda self: clock[0])

    def requests() -> Iterator[str]:
        yield PROMPT
        clock[0] = after

    batch = submit(requests())

    assert (batch.created_at, batch.reserved_at, batch.day) == (before, after, after.date())
    assert reservation(batch).day == after.date()
    assert batch.deadline == reservation(batch).deadline == after + timedelta(hours=48)


# Submissions -------------------------------------------------------------------------------------


def sizes(batch: Batch) -> list[int]:
    """How many items each of a batch's submissions has."""
    return [it.items_count for it in batch.submissions.order_by("number")]


def test_what_the_api_does_not_take_at_once_is_sent_apart(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "MOST_ITEMS", 2)

    batch = submit(["a", "b", "c", "d", "e"])

    assert sizes(batch) == [2, 2, 1]
    assert len(rows()) == 1
    assert work_off(batch).succeeded == 5
    assert len(api.batches.ids) == 3


def test_what_is_larger_than_a_worker_has_room_for_is_sent_apart(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "MOST_BYTES", 3_000)

    batch = submit(["x" * 1_000, "x" * 1_000, "x" * 1_000, "x" * 9_000, "x"])

    assert sizes(batch) == [2, 1, 1, 1]
    work_off(batch)
    sent = [it for it in api.requests if it.path == "/v1/messages/batches" and it.method == "POST"]
    for submission, request in zip(batch.submissions.order_by("number"), sent, strict=True):
        assert len(str(request.body)) < submission.request_bytes + 100


def test_a_request_that_is_larger_than_the_api_takes_is_refused(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openings, "LARGEST_ITEM", 1_000)

    with pytest.raises(ValueError, match=r"'1'.*larger"):
        submit([PROMPT, "x" * 1_000])

    assert_nothing_left(api)


# Who is told -------------------------------------------------------------------------------------


@pytest.fixture
def waiting() -> Iterator[list[int]]:
    """The submissions that workers are told of."""
    told: list[int] = []

    def hear(submission_ids: list[int], **kwargs: object) -> None:
        told.extend(submission_ids)

    batch_waiting.connect(hear)
    yield told
    batch_waiting.disconnect(hear)


def test_workers_are_told_once_its_rows_are_committed(
    api: AnthropicSimulator,
    waiting: list[int],
    django_capture_on_commit_callbacks: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preparing, "MOST_ITEMS", 1)

    with django_capture_on_commit_callbacks(execute=True):
        batch = submit([PROMPT, PROMPT])
        assert waiting == []

    assert waiting == [it.pk for it in batch.submissions.order_by("number")]


def test_nobody_is_told_of_what_was_refused(
    api: AnthropicSimulator, waiting: list[int], django_capture_on_commit_callbacks: Any
) -> None:
    with (
        override_budget(FEATURE, daily_limit_usd=0),
        django_capture_on_commit_callbacks(execute=True),
        pytest.raises(LimitReached),
    ):
        submit([PROMPT])

    assert waiting == []
