"""Batches that a guarded client creates and reads: held, recorded, booked, whoever reads them."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anthropic
import httpx2
import pytest

import ai_budget
from ai_budget import batches
from ai_budget.conf import conf
from ai_budget.exceptions import (
    AIBudgetError,
    BudgetExceeded,
    FeatureDisabled,
    QuotaExceeded,
    UnboundedCall,
    UnpricedEndpoint,
    UnpricedModel,
)
from ai_budget.guard import middleware
from ai_budget.guard.batch import through_client
from ai_budget.ledger import base as ledgers
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallText, UserQuota
from ai_budget.money import to_usd
from ai_budget.testing import (
    AnthropicSimulator,
    Canceled,
    CutBeforeResponse,
    CutStream,
    Errored,
    Expired,
    Fail,
    Hang,
    Pace,
    Reply,
    Results,
    override_budget,
)
from tests.guard.books import (
    MODEL,
    assert_balanced,
    in_db,
    ledger_of_the_run,
    refusals,
    rows,
    site,
)

pytestmark = pytest.mark.django_db

PATH = "/v1/messages/batches"
ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "Hello there"}],
}
RAW: dict[str, Any] = {"cast_to": httpx2.Response}


@pytest.fixture
def client(api: AnthropicSimulator) -> Iterator[anthropic.Anthropic]:
    """A guarded client of the account that workers look after."""
    with anthropic.Anthropic(api_key=conf.API_KEY, base_url=api.base_url) as bare:
        yield ai_budget.guard(bare, feature="chat")


@pytest.fixture
async def async_client(api: AnthropicSimulator) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(api_key=conf.API_KEY, base_url=api.base_url) as bare:
        yield ai_budget.guard(bare, feature="chat")


def requests(*ids: str, **params: Any) -> list[Any]:
    return [{"custom_id": each, "params": {**ASKED, **params}} for each in ids]


TWO: dict[str, Any] = {"requests": requests("a", "b")}


def create(client: anthropic.Anthropic, *ids: str) -> str:
    """Create a batch of such items, and return its id at the API."""
    return client.messages.batches.create(requests=requests(*ids)).id


def submission() -> BatchSubmission:
    return BatchSubmission.objects.select_related("batch").get()


def created(api: AnthropicSimulator) -> list[dict[str, Any]]:
    """The bodies that asked for a batch."""
    return [it.body or {} for it in api.requests if it.method == "POST" and it.path == PATH]


def prices(api: AnthropicSimulator) -> int:
    return sum(ai_budget.price(it.model, it.usage, batch=True) for it in api.billed)


def work_off() -> None:
    """Do what workers do until all that can be over is."""
    for _ in range(4):
        waiting = BatchSubmission.objects.filter(next_look_at__isnull=False)
        waiting.update(next_look_at=ledgers.current().now())
        for each in waiting.values_list("pk", flat=True):
            batches.advance(each)
    batches.tidy()


def assert_booked(api: AnthropicSimulator) -> Batch:
    """All that was answered is booked once at half the price, and nothing is held."""
    batch = Batch.objects.get()
    assert (batch.open, batch.held_nanousd) == (0, 0)
    assert batch.spent_nanousd == prices(api) == site().spent_nanousd
    assert sum(row.cost_nanousd or 0 for row in rows()) == prices(api)
    assert_balanced()
    return batch


def assert_no_batch() -> None:
    """Nothing is left of it, and everything was given back."""
    for model in (Batch, BatchSubmission, BatchItem, CallText):
        assert not model._default_manager.exists()
    assert {row.status for row in rows()} <= {"released"}
    assert (site().held_nanousd, site().calls) == (0, 0)
    assert_balanced()


# Every way to create one -------------------------------------------------------------------------


def _unread(client: anthropic.Anthropic) -> object:
    with client.messages.batches.with_streaming_response.create(**TWO) as response:
        return response.parse()


SYNC: dict[str, Callable[[anthropic.Anthropic], object]] = {
    "create": lambda client: client.messages.batches.create(**TWO),
    "beta": lambda client: client.beta.messages.batches.create(**TWO, betas=["x-1"]),
    "raw response": lambda client: client.messages.batches.with_raw_response.create(**TWO).parse(),
    "streaming response": _unread,
    "of an iterator": lambda client: client.messages.batches.create(requests=iter(TWO["requests"])),
    "post": lambda client: client.post(PATH, body=TWO, **RAW),
    "post to an address": lambda client: client.post(f"{client.base_url}{PATH}", body=TWO, **RAW),
    "post along a detour": lambda client: client.post(
        "/v1/models/../messages/batches", body=TWO, **RAW
    ),
    "derived": lambda client: client.with_options(timeout=30).messages.batches.create(**TWO),
}


@pytest.mark.parametrize("way", SYNC)
def test_it_is_reserved_and_noted(
    api: AnthropicSimulator, client: anthropic.Anthropic, way: str
) -> None:
    SYNC[way](client)

    (api_id,) = api.batches.ids
    assert (submission().status, submission().api_id) == ("sent", api_id)
    batch = submission().batch
    assert (batch.feature_id, batch.status, batch.total) == ("chat", "open", 2)
    assert 0 < batch.held_nanousd == batch.reserved_nanousd == site().held_nanousd
    assert site().calls == 2
    assert created(api) == [TWO]


def test_all_of_it_is_held_before_it_is_sent(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    seen: list[tuple[str, int]] = []

    def watch(request: anthropic.APIRequest, call_next: Any) -> Any:
        seen.append((submission().status, site().held_nanousd))
        return call_next(request)

    client.with_options(middleware=[*client.middleware, watch]).messages.batches.create(**TWO)

    assert seen == [("sending", Batch.objects.get().held_nanousd)]


async def _unread_async(client: anthropic.AsyncAnthropic) -> object:
    async with client.messages.batches.with_streaming_response.create(**TWO) as response:
        return await response.parse()


ASYNC: dict[str, Callable[[anthropic.AsyncAnthropic], Awaitable[object]]] = {
    "create": lambda client: client.messages.batches.create(**TWO),
    "beta": lambda client: client.beta.messages.batches.create(**TWO),
    "raw response": lambda client: client.messages.batches.with_raw_response.create(**TWO),
    "streaming response": _unread_async,
}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("way", ASYNC)
async def test_async_clients_reserve_and_note_it_alike(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic, way: str
) -> None:
    await ASYNC[way](async_client)

    (api_id,) = api.batches.ids
    noted = await in_db(submission)
    assert (noted.status, noted.api_id) == ("sent", api_id)
    assert 0 < noted.batch.held_nanousd == (await in_db(site)).held_nanousd


def test_its_own_payer_pays(api: AnthropicSimulator) -> None:
    client = ai_budget.client(feature="agent", subject="tenant", tags={"a": "b"})

    with ai_budget.charge(feature="other", subject="others"):
        create(client, "a")

    batch = Batch.objects.get()
    assert (batch.feature_id, batch.subject, batch.tags) == ("agent", "tenant", {"a": "b"})


def test_what_is_sent_is_capped_and_downgraded(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    create(client, "z")
    limit = to_usd(site().held_nanousd * 100)
    sent = requests("a", model="claude-opus-5-5", max_tokens=5_000)

    with override_budget("chat", daily_limit_usd=limit, max_tokens=20, rungs=[(1, MODEL)]):
        client.messages.batches.create(requests=sent)

    assert created(api)[1] == {"requests": requests("a", max_tokens=20)}
    item = BatchItem.objects.get(key="a")
    assert (item.requested_model, item.model, item.max_tokens) == ("claude-opus-5-5", MODEL, 20)
    assert sent[0]["params"]["max_tokens"] == 5_000


def test_however_large_it_is_it_is_sent_at_once(
    api: AnthropicSimulator, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ai_budget.guard.batch.preparing.MOST_BYTES", 100)
    monkeypatch.setattr("ai_budget.guard.batch.preparing.MOST_ITEMS", 1)

    create(client, "a", "b", "c")

    assert submission().items_count == 3


# Refused before it is sent -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        ({"daily_limit_usd": "0.000001"}, BudgetExceeded),
        ({"monthly_limit_usd": 0}, BudgetExceeded),
        ({"enabled": False}, FeatureDisabled),
    ],
)
def test_what_its_budget_refuses_does_not_arrive(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    budget: dict[str, Any],
    error: type[AIBudgetError],
) -> None:
    with override_budget("chat", **budget), pytest.raises(error):
        create(client, "a", "b")

    assert api.requests == []
    assert refusals()["feature:chat"] == 1
    assert_no_batch()


def test_a_quota_counts_its_items(api: AnthropicSimulator) -> None:
    UserQuota.objects.create(daily_calls=2)
    client = ai_budget.client(feature="chat", subject="tenant")

    with pytest.raises(QuotaExceeded) as error:
        create(client, "a", "b", "c")

    assert error.value.items_fit == 2
    assert api.requests == []
    assert_no_batch()


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        ({"requests": []}, ValueError, "at least one"),
        ({"requests": requests("a", "a")}, ValueError, "'a': Two items"),
        ({"requests": requests("a", model="claude-of-tomorrow")}, UnpricedModel, "'a'"),
        ({"requests": requests("a", teleport=True)}, UnboundedCall, "'a'.*teleport"),
        ({"requests": requests("a", stream=True)}, ValueError, "'a'.*stream"),
        ({"requests": requests("a", speed="fast")}, ValueError, "'a'.*fast"),
        ({"requests": requests("not an id")}, UnboundedCall, "custom_id"),
        ({"requests": requests("")}, UnboundedCall, "custom_id"),
        ({"requests": requests("x" * 65)}, UnboundedCall, "custom_id"),
        ({"requests": requests("a\n")}, UnboundedCall, "custom_id"),
        ({"requests": [{"params": ASKED}]}, UnboundedCall, "custom_id"),
        ({"requests": [{"custom_id": "a"}]}, UnboundedCall, "params"),
        ({"requests": [{**requests("a")[0], "priority": "high"}]}, UnboundedCall, "nothing else"),
        ({**TWO, "priority": "high"}, UnboundedCall, "nothing else"),
        ({"requests": {"a": ASKED}}, UnboundedCall, "a list"),
        ({"requests": None}, UnboundedCall, "a list"),
        ({}, UnboundedCall, "a list"),
        ([TWO], UnboundedCall, "the guard can read"),
    ],
)
def test_a_body_that_cannot_be_bounded_does_not_arrive(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    body: Any,
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        client.post(PATH, body=body, **RAW)

    assert api.requests == []
    assert_no_batch()


def test_other_platforms_have_no_batches_of_this_kind(api: AnthropicSimulator) -> None:
    bedrock = anthropic.AnthropicBedrock(
        aws_region="us-east-1", aws_access_key="key", aws_secret_key="key", base_url=api.base_url
    )
    with bedrock, pytest.raises(UnpricedEndpoint):
        ai_budget.guard(bedrock, feature="chat").post(PATH, body=TWO, **RAW)

    assert api.requests == []
    assert_no_batch()


# What becomes of sending it ----------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 429, 503, 529])
def test_what_the_api_does_not_take_is_given_back(
    api: AnthropicSimulator, client: anthropic.Anthropic, status: int
) -> None:
    api.batches.script("create", Fail(status=status))

    with pytest.raises(anthropic.APIStatusError):
        create(client.with_options(max_retries=0), "a", "b")

    assert len(created(api)) == 1
    assert_no_batch()


@pytest.mark.parametrize(
    "step",
    [
        Fail(status=500),
        Fail(status=502),
        CutBeforeResponse(),
        CutBeforeResponse(billed=True),
        CutStream(),
        Hang(seconds=30, billed=True),
    ],
    ids=["500", "502", "cut", "cut, and taken", "half an answer", "silence"],
)
def test_what_nobody_heard_of_is_held_and_uncertain(
    api: AnthropicSimulator, client: anthropic.Anthropic, step: Any
) -> None:
    api.batches.script("create", step)

    with pytest.raises(anthropic.APIError):
        create(client.with_options(max_retries=0, timeout=0.2), "a", "b")

    assert (submission().status, submission().api_id) == ("uncertain", None)
    assert submission().error != ""
    assert site().held_nanousd == submission().batch.held_nanousd > 0


def test_what_the_api_took_without_our_hearing_of_it_is_found_and_booked(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.script("create", CutBeforeResponse(billed=True))
    with pytest.raises(anthropic.APIConnectionError):
        create(client.with_options(max_retries=0), "a", "b")

    work_off()

    assert assert_booked(api).succeeded == 2


def test_what_never_left_is_given_back(api: AnthropicSimulator) -> None:
    with (
        anthropic.Anthropic(api_key="key", base_url="http://127.0.0.1:9", max_retries=0) as nowhere,
        pytest.raises(anthropic.APIConnectionError),
    ):
        create(ai_budget.guard(nowhere, feature="chat"), "a")

    assert_no_batch()


def test_a_repeat_of_the_sdk_reserves_anew(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.script("create", Fail(status=429, retry_after=0.01))

    create(client, "a", "b")

    assert len(created(api)) == 2
    batch = Batch.objects.get()
    assert site().held_nanousd == batch.held_nanousd
    assert site().calls == 2
    assert [row.status for row in rows()] == ["released", "reserved"]


def test_a_repeat_after_one_that_nobody_heard_of_holds_both(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.script("create", Fail(status=500, headers={"retry-after-ms": "1"}))

    create(client, "a", "b")

    states = BatchSubmission.objects.order_by("pk").values_list("status", flat=True)
    assert list(states) == ["uncertain", "sent"]
    assert site().held_nanousd == sum(it.held_nanousd for it in Batch.objects.all())


def test_a_repeat_that_does_not_fit_any_more_is_refused(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    create(client, "a", "b")
    held = to_usd(site().held_nanousd)
    api.batches.script("create", Fail(status=500, headers={"retry-after-ms": "1"}))

    with override_budget("chat", daily_limit_usd=held * 2), pytest.raises(BudgetExceeded):
        create(client, "a", "b")

    assert len(created(api)) == 2


def test_middleware_inside_the_guard_that_answers_itself_is_uncertain(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    def replace(request: anthropic.APIRequest, call_next: Any) -> Any:
        return "an answer of its own"

    inside = client.with_options(middleware=[*client.middleware, replace])

    assert inside.messages.batches.create(**TWO) == "an answer of its own"  # type: ignore[comparison-overlap]
    assert submission().status == "uncertain"


def test_an_answer_that_is_never_read_is_uncertain(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with client.messages.batches.with_streaming_response.create(**TWO):
        pass

    assert submission().status == "uncertain"
    work_off()
    assert assert_booked(api).succeeded == 2


@pytest.mark.django_db(transaction=True)
async def test_cancelled_while_it_reserves_everything_is_given_back(
    api: AnthropicSimulator,
    async_client: anthropic.AsyncAnthropic,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reached, opened = threading.Event(), threading.Event()
    reserve = ledger_of_the_run().reserve

    def held_up(*args: Any) -> Any:
        reservation = reserve(*args)
        reached.set()
        assert opened.wait(10)
        return reservation

    monkeypatch.setattr(ledger_of_the_run(), "reserve", held_up)
    task = asyncio.create_task(async_client.messages.batches.create(**TWO))
    assert await asyncio.to_thread(reached.wait, 10)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    opened.set()
    await until_booked()

    assert api.requests == []
    await in_db(assert_no_batch)


async def until_booked() -> None:
    """Wait for what goes on behind a caller who has left."""
    async with asyncio.timeout(10):
        while middleware._running:
            await asyncio.wait(middleware._running)


# Results -----------------------------------------------------------------------------------------


def _read_all(client: anthropic.Anthropic, api_id: str) -> object:
    return list(client.messages.batches.results(api_id))


def _read_unread(client: anthropic.Anthropic, api_id: str) -> object:
    with client.messages.batches.with_streaming_response.results(api_id) as response:
        return list(response.iter_lines())


def _read_beta(client: anthropic.Anthropic, api_id: str) -> object:
    return list(client.beta.messages.batches.results(api_id))


def _read_address(client: anthropic.Anthropic, api_id: str) -> object:
    url = client.messages.batches.retrieve(api_id).results_url
    return client.get(str(url), **RAW).text


READ: dict[str, Callable[[anthropic.Anthropic, str], object]] = {
    "results": _read_all,
    "beta": _read_beta,
    "streaming response": _read_unread,
    "get": _read_address,
}


@pytest.mark.parametrize("way", READ)
@pytest.mark.parametrize("log_prompts", [False, True])
def test_results_are_booked_as_they_are_read(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    way: str,
    log_prompts: bool,
    settings: Any,
) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "LOG_PROMPTS": log_prompts}
    api.batches.enqueue(Reply(text="Hello yourself"), Errored(), Canceled(), Expired(), Reply())
    api_id = create(client, "a", "b", "c", "d", "e")

    READ[way](client, api_id)

    batch = assert_booked(api)
    assert (batch.succeeded, batch.errored, batch.canceled, batch.expired) == (2, 1, 1, 1)
    assert site().calls == 2
    kept = [text.message for text in CallText.objects.all() if text.message]
    assert [json.loads(it)["content"][0]["text"] for it in kept if "yourself" in it] == (
        ["Hello yourself"] if log_prompts else []
    )


@pytest.mark.django_db(transaction=True)
async def test_async_results_are_booked_as_they_are_read(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    made = await async_client.messages.batches.create(**TWO)

    results = await async_client.messages.batches.results(made.id)
    assert len([line async for line in results]) == 2

    await until_booked()
    await in_db(assert_booked, api)


def test_results_of_other_clients_are_booked_too(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    batch = ai_budget.submit_batch(["one", "two"], feature="nightly")
    (waiting,) = batches.due()
    batches.advance(waiting)

    _read_all(client, api.batches.ids[0])

    assert assert_booked(api) == batch


def test_a_batch_of_another_account_is_booked_as_its_results_are_read(
    api: AnthropicSimulator,
) -> None:
    with anthropic.Anthropic(api_key="another account's", base_url=api.base_url) as bare:
        other = ai_budget.guard(bare, feature="chat")
        api_id = create(other, "a", "b")
        work_off()  # sees nothing of it

        assert submission().batch.open == 2
        _read_all(other, api_id)

    work_off()
    assert assert_booked(api).succeeded == 2


def test_results_of_batches_that_nobody_knows_change_nothing(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    unguarded = client.with_options(middleware=[])
    api_id = create(unguarded, "a")

    _read_all(client, api_id)

    assert rows() == []


def test_results_are_booked_once_however_often_and_by_whom_they_are_read(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.script("results", *[Results(times=2)] * 4)
    api_id = create(client, "a", "b", "c")

    _read_all(client, api_id)
    work_off()
    _read_all(client, api_id)

    assert assert_booked(api).succeeded == 3
    assert BatchSubmission.objects.get().status == "done"


def test_what_a_worker_has_booked_is_passed_by(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api_id = create(client, "a", "b")
    work_off()

    _read_all(client, api_id)

    assert assert_booked(api).succeeded == 2


def test_what_was_read_of_results_that_are_left_is_booked_and_workers_read_the_rest(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.script("results", Results(shuffled=False, line_delay=0.01))
    api_id = create(client, *(f"item-{number}" for number in range(9)))

    results = client.messages.batches.results(api_id)
    next(iter(results))
    results.close()

    booked = Batch.objects.get().succeeded
    assert 0 < booked < 9
    work_off()
    assert assert_booked(api).succeeded == 9


def test_results_that_are_dropped_are_left_to_workers(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.script("results", Results(shuffled=False, line_delay=0.01))
    api_id = create(client, *(f"item-{number}" for number in range(9)))

    next(iter(client.messages.batches.results(api_id)))
    gc.collect()

    work_off()
    assert assert_booked(api).succeeded == 9


@pytest.mark.django_db(transaction=True)
async def test_what_was_read_of_async_results_that_are_left_is_booked(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    api.batches.script("results", Results(shuffled=False, line_delay=0.01))
    made = await async_client.messages.batches.create(
        requests=requests(*(f"item-{number}" for number in range(9)))
    )

    results = await async_client.messages.batches.results(made.id)
    await anext(aiter(results))
    await results.close()
    await until_booked()

    booked = (await in_db(Batch.objects.get)).succeeded
    assert 0 < booked < 9
    await in_db(work_off)
    await in_db(assert_booked, api)


def test_results_that_break_off_are_booked_as_far_as_they_came(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.script("results", CutStream(after_events=2))
    api_id = create(client, "a", "b", "c")

    with pytest.raises(httpx2.HTTPError):
        _read_all(client, api_id)

    assert Batch.objects.get().succeeded == 2
    work_off()
    assert assert_booked(api).succeeded == 3


def test_more_results_than_there_is_room_for_are_left_to_workers(
    api: AnthropicSimulator, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(through_client, "MOST_KEPT", 1_000)
    api_id = create(client, *(f"item-{number}" for number in range(9)))

    _read_all(client, api_id)

    booked = Batch.objects.get().succeeded
    assert 0 < booked < 9
    work_off()
    assert assert_booked(api).succeeded == 9


def test_the_texts_of_results_need_no_room(
    api: AnthropicSimulator, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(through_client, "MOST_KEPT", 10_000)
    api.batches.enqueue(*[Reply(text="word " * 2_000, output_tokens=50)] * 9)
    api_id = create(client, *(f"item-{number}" for number in range(9)))

    _read_all(client, api_id)

    assert assert_booked(api).succeeded == 9


@pytest.mark.parametrize("size", [1, 100, 100_000])
def test_results_are_booked_in_whatever_pieces_they_come(
    api: AnthropicSimulator, client: anthropic.Anthropic, size: int
) -> None:
    api_id = create(client, "a", "b", "c")
    bare = client.with_options(middleware=[])
    lines = bare.get(f"{PATH}/{api_id}/results", **RAW).content.rstrip(b"\n")
    reader = through_client.ResultsReader(api_id)

    for start in range(0, len(lines), size):
        reader.feed(lines[start : start + size])
    reader.settle()

    assert assert_booked(api).succeeded == 3


def test_ids_that_differ_by_case_alone_are_two(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.enqueue(Reply(output_tokens=5), Errored())
    api_id = create(client, "item", "ITEM")

    _read_all(client, api_id)

    states = {item.custom_id: item.status for item in BatchItem.objects.all()}
    assert states == {"item": "succeeded", "ITEM": "errored"}
    assert_booked(api)


def test_a_worker_tells_ids_apart_that_differ_by_case_alone(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.script("results", Results(omit={"ITEM"}))
    create(client, "item", "ITEM")

    submissions = BatchSubmission.objects.values_list("pk", flat=True)
    BatchSubmission.objects.update(next_look_at=ledgers.current().now())
    batches.advance(submissions[0])

    states = {item.custom_id: item.status for item in BatchItem.objects.all()}
    assert states == {"item": "succeeded", "ITEM": "open"}


def test_one_that_goes_on_has_no_results_to_book(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.pace = Pace.never()
    api_id = create(client, "a")

    assert client.get(f"{PATH}/{api_id}/results", **RAW).status_code == 404
    assert submission().batch.open == 1
    assert site().held_nanousd > 0


def test_cancelling_and_listing_pass(api: AnthropicSimulator, client: anthropic.Anthropic) -> None:
    api.batches.pace = Pace.never()
    api_id = create(client, "a")

    assert client.messages.batches.cancel(api_id).processing_status == "canceling"
    assert [it.id for it in client.messages.batches.list()] == [api_id]

    work_off()
    assert assert_booked(api).canceled == 1
