"""Message Batches of the simulated API, as the official SDK sees them over real HTTP."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, IncompleteRead
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types.messages import MessageBatch, MessageBatchIndividualResponse
from django.core.management import call_command

from ai_budget import periods
from ai_budget.management.commands import ai_budget_simulator
from ai_budget.testing import batches
from ai_budget.testing.batches import Endpoint, Pace
from ai_budget.testing.simulator import AnthropicSimulator
from ai_budget.testing.steps import (
    BatchStep,
    Canceled,
    CutBeforeResponse,
    CutStream,
    Errored,
    Expired,
    Fail,
    Hang,
    Outcome,
    Reply,
    Results,
    TruncateCleanly,
)

MODEL = "claude-haiku-5-5"
HOUR = 3_600.0
FIELDS = [
    "id",
    "type",
    "processing_status",
    "request_counts",
    "ended_at",
    "created_at",
    "expires_at",
    "archived_at",
    "cancel_initiated_at",
    "results_url",
]


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[AnthropicSimulator, Clock, anthropic.Anthropic]]:
    clock = Clock()
    with (
        AnthropicSimulator(clock=clock) as api,
        anthropic.Anthropic(base_url=api.base_url, api_key="key", max_retries=0) as client,
    ):
        yield api, clock, client


@pytest.fixture
def api(running: tuple[AnthropicSimulator, Clock, anthropic.Anthropic]) -> AnthropicSimulator:
    running[0].wait_until_idle()
    running[0].reset()
    return running[0]


@pytest.fixture
def clock(running: tuple[AnthropicSimulator, Clock, anthropic.Anthropic]) -> Clock:
    return running[1]


@pytest.fixture
def client(
    api: AnthropicSimulator, running: tuple[AnthropicSimulator, Clock, anthropic.Anthropic]
) -> anthropic.Anthropic:
    return running[2]


def item(custom_id: str, **params: Any) -> Any:
    message = {"role": "user", "content": f"Is {custom_id} spam?"}
    return {
        "custom_id": custom_id,
        "params": {"model": MODEL, "max_tokens": 50, "messages": [message], **params},
    }


def create(client: anthropic.Anthropic, *items: Any, count: int = 3) -> MessageBatch:
    requests = items or [item(f"item-{number}") for number in range(count)]
    batch: MessageBatch = client.messages.batches.create(requests=requests)
    return batch


def look(client: anthropic.Anthropic, batch: MessageBatch) -> MessageBatch:
    found: MessageBatch = client.messages.batches.retrieve(batch.id)
    return found


def read(client: anthropic.Anthropic, batch: MessageBatch) -> list[MessageBatchIndividualResponse]:
    return list(client.messages.batches.results(batch.id))


def results_of(client: anthropic.Anthropic, batch: MessageBatch) -> dict[str, dict[str, Any]]:
    return {line.custom_id: line.result.to_dict() for line in read(client, batch)}


def types_of(client: anthropic.Anthropic, batch: MessageBatch) -> list[str]:
    """In the order sent, for items whose ids sort so."""
    results = results_of(client, batch)
    return [results[custom_id]["type"] for custom_id in sorted(results)]


def counts(batch: MessageBatch) -> dict[str, int]:
    return {state: number for state, number in batch.request_counts if number}


def request(
    api: AnthropicSimulator, method: str, path: str, body: Any = None, *, key: str = "key"
) -> tuple[int, dict[str, str], Any]:
    """Sends what the SDK would not send, and shows what it does not."""
    connection = HTTPConnection(api.base_url.removeprefix("http://"), timeout=10)
    try:
        payload = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        path = f"/v1/messages/batches{path}"
        connection.request(method, path, payload, {"x-api-key": key})
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        raw = response.read()
        is_json = headers["content-type"] == "application/json"
        return response.status, headers, json.loads(raw) if is_json else raw
    finally:
        connection.close()


# The life of a batch


def test_a_new_batch_is_in_progress(client: anthropic.Anthropic) -> None:
    batch = create(client, count=3)

    assert batch.id.startswith("msgbatch_")
    assert batch.type == "message_batch"
    assert batch.processing_status == "in_progress"
    assert counts(batch) == {"processing": 3}
    assert batch.expires_at - batch.created_at == timedelta(hours=24)
    assert (batch.ended_at, batch.results_url, batch.cancel_initiated_at) == (None, None, None)


def test_at_once_it_has_ended_for_the_next_look(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    batch = look(client, create(client, count=3))

    assert batch.processing_status == "ended"
    assert counts(batch) == {"succeeded": 3}
    assert batch.ended_at == batch.created_at
    assert batch.results_url == f"{api.base_url}/v1/messages/batches/{batch.id}/results"


def test_a_batch_takes_as_long_as_its_pace_says(
    api: AnthropicSimulator, client: anthropic.Anthropic, clock: Clock
) -> None:
    api.batches.pace = Pace(seconds=60)
    batch = create(client, count=3)
    api.batches.pace = Pace.never()

    clock.now += 59
    before = look(client, batch)
    clock.now += 101
    after = look(client, batch)

    assert before.processing_status == "in_progress"
    assert counts(before) == {"processing": 3}
    assert after.processing_status == "ended"
    assert after.ended_at is not None
    assert after.ended_at - after.created_at == timedelta(seconds=60)


def test_a_batch_is_written_as_the_api_writes_it(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.pace = Pace.never()
    batch = create(client, count=1)

    _, headers, running = request(api, "GET", f"/{batch.id}")
    api.batches.end()
    _, headers_at_end, ended = request(api, "GET", f"/{batch.id}")

    assert list(running) == list(ended) == FIELDS
    assert list(ended["request_counts"]) == [
        "processing",
        "succeeded",
        "errored",
        "canceled",
        "expired",
    ]
    assert datetime.fromisoformat(ended["ended_at"]).utcoffset() == timedelta(0)
    assert len(ended["created_at"]) == len("2026-08-19T14:44:51.493319+00:00")
    assert headers["retry-after"] == "10"
    assert "retry-after" not in headers_at_end
    assert headers["request-id"].startswith("req_")


def test_a_batch_is_dated_by_the_budgets_clock(client: anthropic.Anthropic) -> None:
    midnight = datetime(2026, 11, 30, tzinfo=UTC)

    with periods.override_clock(lambda: midnight):
        batch = create(client)

    assert batch.created_at == midnight


def test_a_batch_can_be_ended_by_hand(
    api: AnthropicSimulator, client: anthropic.Anthropic, clock: Clock
) -> None:
    api.batches.pace = Pace.never()
    first, second = create(client), create(client)

    clock.now += HOUR
    api.batches.end(first.id)

    ended = look(client, first)
    assert counts(ended) == {"succeeded": 3}
    assert ended.ended_at is not None
    assert ended.ended_at - ended.created_at == timedelta(hours=1)
    assert look(client, second).processing_status == "in_progress"
    with pytest.raises(LookupError):
        api.batches.end("msgbatch_unknown")


def test_what_is_not_done_in_24_hours_expires(
    api: AnthropicSimulator, client: anthropic.Anthropic, clock: Clock
) -> None:
    api.batches.pace = Pace(seconds=48 * HOUR)
    batch = create(client, count=4)

    clock.now += 30 * HOUR

    ended = look(client, batch)
    assert counts(ended) == {"succeeded": 2, "expired": 2}
    assert ended.ended_at == ended.expires_at
    assert types_of(client, batch) == ["succeeded", "succeeded", "expired", "expired"]
    assert results_of(client, batch)["item-3"] == {"type": "expired"}


def test_a_batch_can_be_expired_by_hand(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.pace = Pace.never()
    batch = create(client, count=4)

    api.batches.expire()
    api.batches.end()

    assert counts(look(client, batch)) == {"expired": 4}


def test_a_canceled_batch_keeps_what_was_done(
    api: AnthropicSimulator, client: anthropic.Anthropic, clock: Clock
) -> None:
    api.batches.pace = Pace(seconds=100, canceling=50)
    batch = create(client, count=4)

    clock.now += 30
    canceling = client.messages.batches.cancel(batch.id)
    clock.now += 49
    again = client.messages.batches.cancel(batch.id)
    clock.now += 1
    ended = look(client, batch)

    assert canceling.processing_status == again.processing_status == "canceling"
    assert counts(canceling) == {"processing": 4}
    assert canceling.cancel_initiated_at == again.cancel_initiated_at
    assert canceling.cancel_initiated_at == batch.created_at + timedelta(seconds=30)
    assert ended.ended_at == batch.created_at + timedelta(seconds=80)
    assert ended.cancel_initiated_at == canceling.cancel_initiated_at
    assert types_of(client, batch) == ["succeeded", "canceled", "canceled", "canceled"]
    assert results_of(client, batch)["item-3"] == {"type": "canceled"}


@pytest.mark.parametrize("stop", ["cancel", "end after cancel", "expire"])
def test_a_pace_can_say_what_share_is_done_when_it_is_stopped(
    api: AnthropicSimulator, client: anthropic.Anthropic, stop: str
) -> None:
    slowly = float("inf") if stop == "end after cancel" else 0.0
    api.batches.pace = Pace(seconds=60, done=0.5, canceling=slowly)
    batch = create(client, count=4)

    if stop != "expire":
        client.messages.batches.cancel(batch.id)
    if stop == "end after cancel":
        api.batches.end()
    if stop == "expire":
        api.batches.expire(batch.id)

    rest = "expired" if stop == "expire" else "canceled"
    assert counts(look(client, batch)) == {"succeeded": 2, rest: 2}


def test_an_ended_batch_cannot_be_canceled(client: anthropic.Anthropic) -> None:
    batch = create(client)

    with pytest.raises(anthropic.BadRequestError):
        client.messages.batches.cancel(batch.id)


def test_only_an_ended_batch_can_be_deleted(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.pace = Pace.never()
    batch = create(client)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.batches.delete(batch.id)

    api.batches.end()
    deleted = client.messages.batches.delete(batch.id)

    assert deleted.to_dict() == {"id": batch.id, "type": "message_batch_deleted"}
    assert api.batches.ids == []
    with pytest.raises(anthropic.NotFoundError):
        look(client, batch)


def test_results_are_gone_after_29_days(
    api: AnthropicSimulator, client: anthropic.Anthropic, clock: Clock
) -> None:
    batch = create(client)

    clock.now += 29 * 24 * HOUR

    archived = look(client, batch)
    assert archived.archived_at == batch.created_at + timedelta(days=29)
    assert archived.results_url is None
    assert request(api, "GET", f"/{batch.id}/results")[0] == 404


# The list


def test_the_newest_batches_are_listed_first(client: anthropic.Anthropic) -> None:
    created = [create(client, count=1).id for _ in range(5)]

    page = client.messages.batches.list(limit=2)
    walked = [batch.id for batch in client.messages.batches.list(limit=2)]
    newer = client.messages.batches.list(limit=2, before_id=created[1])

    assert [batch.id for batch in page.data] == created[:2:-1]
    assert (page.first_id, page.last_id, page.has_more) == (created[4], created[3], True)
    assert walked == created[::-1]
    assert [batch.id for batch in newer.data] == [created[3], created[2]]
    assert newer.has_more


def test_an_empty_list_has_no_ends(client: anthropic.Anthropic) -> None:
    page = client.messages.batches.list()

    assert (page.data, page.first_id, page.last_id, page.has_more) == ([], None, None, False)


def test_batches_belong_to_their_key(api: AnthropicSimulator, client: anthropic.Anthropic) -> None:
    batch = create(client)
    stranger = client.with_options(api_key="another")

    assert list(stranger.messages.batches.list()) == []
    for method, path in [("GET", ""), ("GET", "/results"), ("POST", "/cancel"), ("DELETE", "")]:
        status, _, payload = request(api, method, f"/{batch.id}{path}", key="another")
        assert (status, payload["error"]["type"]) == (404, "not_found_error")


# Results


def test_an_item_is_answered_like_a_message_at_the_batch_tier(
    client: anthropic.Anthropic,
) -> None:
    sent = item("a")
    alone = client.messages.create(**sent["params"]).to_dict()
    batched = results_of(client, create(client, sent))["a"]["message"]

    assert batched["usage"].pop("service_tier") == "batch"
    assert alone["usage"].pop("service_tier") == "standard"
    assert batched.pop("id") != alone.pop("id")
    assert batched == alone


def test_every_item_has_one_line_in_another_order_each_time(client: anthropic.Anthropic) -> None:
    batch = create(client, count=50)
    sent = [f"item-{number}" for number in range(50)]

    first, second = ([line.custom_id for line in read(client, batch)] for _ in range(2))

    assert sorted(first) == sorted(second) == sorted(sent)
    assert first != sent
    assert first != second


def test_even_two_results_are_not_in_the_order_sent(client: anthropic.Anthropic) -> None:
    batch = create(client, count=2)

    for _ in range(10):
        assert [line.custom_id for line in read(client, batch)] == ["item-1", "item-0"]


def test_results_are_the_same_whenever_they_are_read(client: anthropic.Anthropic) -> None:
    batch = create(client, count=20)

    assert results_of(client, batch) == results_of(client, batch)


def test_results_are_sent_as_a_file_of_lines(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    batch = create(client, item("a", system="—\u2028—"), item("b"))

    status, headers, raw = request(api, "GET", f"/{batch.id}/results")

    assert status == 200
    assert headers["content-type"] == "application/x-jsonl"
    assert headers["content-disposition"] == (
        f"attachment; filename*=utf-8''{batch.id}_results.jsonl"
    )
    assert headers["request-id"].startswith("req_")
    assert raw.endswith(b"\n")
    assert {json.loads(line)["custom_id"] for line in raw.split(b"\n")[:-1]} == {"a", "b"}


def test_there_are_no_results_before_the_end(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.pace = Pace.never()
    batch = create(client)

    status, _, payload = request(api, "GET", f"/{batch.id}/results")

    assert (status, payload["error"]["type"]) == (404, "not_found_error")
    with pytest.raises(anthropic.AnthropicError, match="Has it finished"):
        read(client, batch)


def test_outcomes_are_scripted_in_the_order_sent(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.enqueue(
        Reply(text="yes", usage={"output_tokens": 7}),
        Errored(error_type="overloaded_error"),
        Canceled(),
        Expired(),
    )
    batch = create(client, *[item(name) for name in "abcde"])

    results = results_of(client, batch)

    assert counts(look(client, batch)) == {
        "succeeded": 2,
        "errored": 1,
        "canceled": 1,
        "expired": 1,
    }
    assert results["a"]["message"]["content"][0]["text"] == "yes"
    assert results["a"]["message"]["usage"]["output_tokens"] == 7
    error = results["b"]["error"]
    assert error["type"] == "error"
    assert error["error"] == {"type": "overloaded_error", "message": "Overloaded"}
    assert [results[name]["type"] for name in "cde"] == ["canceled", "expired", "succeeded"]


def test_a_function_chooses_outcomes(api: AnthropicSimulator, client: anthropic.Anthropic) -> None:
    def choose(custom_id: str, params: dict[str, Any]) -> Outcome:
        if custom_id == "b":
            return Errored(message="No.")
        return Reply(text=f"{params['max_tokens']} tokens")

    api.batches.default = choose
    results = results_of(client, create(client, item("a"), item("b")))

    assert results["a"]["message"]["content"][0]["text"] == "50 tokens"
    assert results["b"]["error"]["error"] == {"type": "api_error", "message": "No."}


def test_a_refused_batch_takes_no_outcome(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.enqueue(Expired())
    with pytest.raises(anthropic.BadRequestError):
        create(client, item("not an id"))

    assert types_of(client, create(client, item("a"), item("b"))) == ["expired", "succeeded"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": None}, "max_tokens: Field required"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"messages": []}, "messages: at least one message is required"),
        ({"stream": True}, "stream: streaming is not supported in a batch"),
        ({"speed": "fast"}, "speed: fast mode is not supported in a batch"),
        ({"cache_control": {"type": "eternal"}}, "cache_control"),
    ],
)
def test_wrong_params_fail_their_item_alone(
    client: anthropic.Anthropic, params: dict[str, Any], message: str
) -> None:
    batch = create(client, item("a", **params), item("b", stream=False))

    results = results_of(client, batch)

    assert counts(look(client, batch)) == {"succeeded": 1, "errored": 1}
    assert results["a"]["error"]["error"]["type"] == "invalid_request_error"
    assert message in results["a"]["error"]["error"]["message"]


def test_the_api_version_decides_what_items_may_hold(api: AnthropicSimulator) -> None:
    connection = HTTPConnection(api.base_url.removeprefix("http://"), timeout=5)
    body = json.dumps({"requests": [item("a", temperature=1)]})
    headers = {"x-api-key": "key", "anthropic-version": "2026-10-21"}
    connection.request("POST", "/v1/messages/batches", body, headers)
    batch = json.loads(connection.getresponse().read())
    connection.close()

    assert request(api, "GET", f"/{batch['id']}")[2]["request_counts"]["errored"] == 1


def test_items_share_the_prompt_cache(client: anthropic.Anthropic) -> None:
    mark = {"type": "ephemeral"}
    system = [{"type": "text", "text": "word " * 1_000, "cache_control": mark}]
    batch = create(client, *[item(name, system=system) for name in "ab"])

    results = results_of(client, batch)
    after = client.messages.create(**item("c", system=system)["params"])

    usages = [results[name]["message"]["usage"] for name in "ab"]
    written = usages[0]["cache_creation_input_tokens"]
    assert written > 1_000
    assert usages[1]["cache_read_input_tokens"] == after.usage.cache_read_input_tokens == written


# What can be created


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "The request body is not a valid JSON object."),
        ({}, "requests: Field required"),
        ({"requests": {}}, "requests: Input should be a valid list"),
        ({"requests": []}, "requests: List should have at least 1 item"),
        ({"requests": [0] * 100_001}, "requests: List should have at most 100000 items"),
        ({"requests": [0]}, "requests.0: Input should be a valid dictionary"),
        ({"requests": [{"params": {}}]}, "requests.0.custom_id: Field required"),
        ({"requests": [{"custom_id": 1, "params": {}}]}, "requests.0.custom_id: Input should be"),
        ({"requests": [item("a"), item("a")]}, "requests.1.custom_id: must be unique"),
        ({"requests": [item("")]}, "requests.0.custom_id: String should match pattern"),
        ({"requests": [item("a" * 65)]}, "requests.0.custom_id: String should match pattern"),
        ({"requests": [item("a\n")]}, "requests.0.custom_id: String should match pattern"),
        ({"requests": [item("é")]}, "requests.0.custom_id: String should match pattern"),
        ({"requests": [{"custom_id": "a"}]}, "requests.0.params: Field required"),
        ({"requests": [{"custom_id": "a", "params": []}]}, "requests.0.params: Input should be"),
    ],
)
def test_a_wrong_batch_is_refused_in_the_apis_words(
    api: AnthropicSimulator, body: Any, message: str
) -> None:
    status, _, payload = request(api, "POST", "", body)

    assert status == 400
    assert payload["error"]["type"] == "invalid_request_error"
    assert payload["error"]["message"].startswith(message)
    assert api.batches.ids == []


def test_a_custom_id_may_have_64_characters(client: anthropic.Anthropic) -> None:
    assert types_of(client, create(client, item("a-_Z9" + "a" * 59))) == ["succeeded"]


def test_a_batch_may_be_larger_than_a_message(api: AnthropicSimulator) -> None:
    large = item("a", system="a" * 33 * 1024 * 1024)

    assert request(api, "POST", "", {"requests": [large]})[0] == 200


def test_a_batch_may_not_be_larger_than_its_limit(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert batches.LARGEST_BODY == 256 * 1024 * 1024
    body = json.dumps({"requests": [item("a")]}).encode()
    monkeypatch.setattr(batches, "LARGEST_BODY", len(body))

    assert request(api, "POST", "", body)[0] == 200
    status, _, payload = request(api, "POST", "", body + b" ")
    assert (status, payload["error"]["type"]) == (413, "request_too_large")


def test_the_beta_endpoints_answer_too(client: anthropic.Anthropic) -> None:
    resource = client.beta.messages.batches

    batch = resource.create(requests=[item("a")])

    assert [found.id for found in resource.list()] == [batch.id]
    assert resource.retrieve(batch.id).processing_status == "ended"
    assert [line.custom_id for line in resource.results(batch.id)] == ["a"]
    assert resource.delete(batch.id).id == batch.id


# What it costs


def test_what_succeeded_is_billed_at_the_end_read_or_not(
    api: AnthropicSimulator, client: anthropic.Anthropic, clock: Clock
) -> None:
    api.batches.pace = Pace(seconds=60)
    api.batches.enqueue(Reply(model="claude-opus-5-5"), Errored(), Canceled(), Expired())
    batch = create(client, count=5)

    clock.now += 59
    before = api.billed
    clock.now += 1
    bills = api.billed

    assert before == []
    assert [bill.model for bill in bills] == ["claude-opus-5-5", MODEL]
    assert all(bill.batch for bill in bills)
    messages = {
        result["message"]["id"].removeprefix("msg_"): result["message"]["usage"]
        for result in results_of(client, batch).values()
        if result["type"] == "succeeded"
    }
    assert {bill.request_id.removeprefix("req_"): bill.usage for bill in bills} == messages


def test_it_is_billed_once_however_often_it_is_read(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    batch = create(client, count=3)
    for _ in range(3):
        read(client, batch)
    api.batches.end()
    api.batches.expire()
    client.messages.batches.delete(batch.id)

    assert len(api.billed) == 3


def test_many_who_look_at_once_end_it_once(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    requests = [item(f"item-{number}") for number in range(3_000)]
    batch = MessageBatch.construct(**request(api, "POST", "", {"requests": requests})[2])
    together = threading.Barrier(8)

    def look_now(_: int) -> MessageBatch:
        together.wait()
        return look(client, batch)

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(look_now, range(8)))

    assert {found.processing_status for found in seen} == {"ended"}
    assert len(api.billed) == 3_000


# Failures


@pytest.mark.parametrize("status", [429, 500, 529])
def test_a_creation_can_fail(
    api: AnthropicSimulator, client: anthropic.Anthropic, status: int
) -> None:
    api.batches.script("create", Fail(status=status))

    with pytest.raises(anthropic.APIStatusError) as raised:
        create(client)

    assert raised.value.status_code == status
    assert api.batches.ids == []
    assert create(client).id in api.batches.ids


@pytest.mark.parametrize("billed", [True, False])
@pytest.mark.parametrize("step", [CutBeforeResponse, Hang])
def test_a_creation_can_be_cut_off_after_or_before_it_is_accepted(
    api: AnthropicSimulator, client: anthropic.Anthropic, step: Any, billed: bool
) -> None:
    more = {"seconds": 0.01} if step is Hang else {}
    api.batches.script("create", step(billed=billed, **more))

    with pytest.raises(anthropic.APIConnectionError):
        create(client, count=2)

    assert len(api.batches.ids) == len(list(client.messages.batches.list())) == int(billed)
    assert len(api.billed) == 2 * int(billed)


def test_a_cancellation_can_take_effect_unanswered(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.pace = Pace.never()
    batch = create(client, count=2)
    api.batches.script("cancel", CutBeforeResponse(billed=True))

    with pytest.raises(anthropic.APIConnectionError):
        client.messages.batches.cancel(batch.id)

    assert counts(look(client, batch)) == {"canceled": 2}


def test_a_creations_answer_can_be_cut_in_its_body(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.script("create", CutStream())

    with pytest.raises(anthropic.APIConnectionError):
        create(client)

    assert len(api.batches.ids) == 1


@pytest.mark.parametrize("endpoint", ["list", "retrieve", "cancel", "delete", "results"])
def test_every_endpoint_can_fail(
    api: AnthropicSimulator, client: anthropic.Anthropic, endpoint: Endpoint
) -> None:
    batch = create(client)
    resource = client.messages.batches
    calls: dict[str, Callable[[], object]] = {
        "list": resource.list,
        "retrieve": lambda: resource.retrieve(batch.id),
        "cancel": lambda: resource.cancel(batch.id),
        "delete": lambda: resource.delete(batch.id),
        "results": lambda: resource.results(batch.id),
    }
    api.batches.script(endpoint, Fail(status=529, retry_after=0.5))

    with pytest.raises(anthropic.OverloadedError) as raised:
        calls[endpoint]()

    assert raised.value.response.headers["retry-after"] == "0.5"


def test_a_later_request_can_be_the_one_that_fails(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    batch = create(client)
    api.batches.script("retrieve", Reply(headers={"retry-after": "3"}), lambda _: Fail(status=404))

    first = client.messages.batches.with_raw_response.retrieve(batch.id)

    assert first.headers["retry-after"] == "3"
    with pytest.raises(anthropic.NotFoundError):
        look(client, batch)


def test_results_can_be_cut_in_the_middle_of_a_line(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    batch = create(client, count=10)
    api.batches.script("results", CutStream(after_events=3))

    with pytest.raises(IncompleteRead) as raised:
        request(api, "GET", f"/{batch.id}/results")

    *lines, rest = raised.value.partial.split(b"\n")
    assert [json.loads(line)["result"]["type"] for line in lines] == ["succeeded"] * 3
    assert rest.startswith(b'{"custom_id":')
    assert not rest.endswith(b"}")


def test_the_sdk_reads_until_a_cut(api: AnthropicSimulator, client: anthropic.Anthropic) -> None:
    batch = create(client, count=10)
    api.batches.script("results", CutStream(after_events=3))
    ids: list[str] = []

    def read_on() -> None:
        for line in client.messages.batches.results(batch.id):
            ids.append(line.custom_id)  # noqa: PERF401 - the lines before the error count

    with pytest.raises(httpx2.RemoteProtocolError):
        read_on()

    assert len(ids) == 3
    assert len(read(client, batch)) == 10


@pytest.mark.parametrize(("after", "seen"), [(3, 3), (None, 10)])
def test_a_file_can_end_early(
    api: AnthropicSimulator, client: anthropic.Anthropic, after: int | None, seen: int
) -> None:
    batch = create(client, count=10)
    api.batches.script("results", TruncateCleanly(after_events=after))

    assert len(read(client, batch)) == seen
    assert counts(look(client, batch)) == {"succeeded": 10}


def test_lines_can_come_twice_or_not_at_all(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    batch = create(client, *[item(name) for name in "abcdefgh"])
    api.batches.script("results", Results(times=2), Results(omit={"b", "g"}))

    twice = [line.custom_id for line in read(client, batch)]
    partly = [line.custom_id for line in read(client, batch)]

    assert sorted(twice) == sorted("abcdefgh" * 2)
    assert twice[::2] != twice[1::2]
    assert sorted(partly) == list("acdefh")


def test_lines_can_come_in_order_and_one_by_one(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    batch = create(client, count=5)
    api.batches.script("results", Results(shuffled=False, line_delay=0.005))

    began = time.monotonic()
    assert [line.custom_id for line in read(client, batch)] == [f"item-{n}" for n in range(5)]
    assert time.monotonic() - began >= 0.02


def test_a_reader_may_leave_in_the_middle(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    batch = create(client, count=100)
    api.batches.script("results", Results(line_delay=0.05))

    results = client.messages.batches.results(batch.id)
    next(results)
    results.close()

    api.wait_until_idle()
    assert len(read(client, batch)) == 100


@pytest.mark.parametrize(
    "step", [TruncateCleanly(), Results(), Reply(delay=0.001)], ids=lambda step: type(step).__name__
)
def test_what_means_nothing_to_an_endpoint_changes_nothing(
    api: AnthropicSimulator, client: anthropic.Anthropic, step: BatchStep
) -> None:
    api.batches.script("create", step)
    api.batches.script("results", Reply(delay=0.001))

    assert len(read(client, create(client, count=3))) == 3


# Its place in the simulator


def test_a_reset_forgets_batches_and_scripts(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.batches.pace = Pace.never()
    api.batches.default = Expired()
    batch = create(client)
    api.batches.enqueue(Errored())
    api.batches.script("create", Fail(status=500))

    api.reset()

    assert api.batches.ids == []
    with pytest.raises(anthropic.NotFoundError):
        look(client, batch)
    assert counts(look(client, create(client))) == {"succeeded": 3}


def test_a_bounded_history_bounds_batches() -> None:
    with AnthropicSimulator(history=2) as api:
        created = [request(api, "POST", "", {"requests": [item("a")]})[2]["id"] for _ in range(3)]

        assert api.batches.ids == created[1:]


def test_results_can_be_compressed() -> None:
    with (
        AnthropicSimulator(compress=True) as api,
        anthropic.Anthropic(base_url=api.base_url, api_key="key") as client,
    ):
        assert len(read(client, create(client, count=1_000))) == 1_000


def test_thousands_of_items_come_back(api: AnthropicSimulator, client: anthropic.Anthropic) -> None:
    requests = [item(f"item-{number}") for number in range(5_000)]
    _, _, batch = request(api, "POST", "", {"requests": requests})

    _, _, raw = request(api, "GET", f"/{batch['id']}/results")

    assert len({json.loads(line)["custom_id"] for line in raw.splitlines()}) == 5_000
    assert len(api.billed) == 5_000


@pytest.mark.parametrize(("options", "status"), [((), "in_progress"), (("0",), "ended")])
def test_the_command_serves_batches_at_a_pace(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], status: str
) -> None:
    out = io.StringIO()
    seen: list[str] = []

    def create_then_interrupt() -> None:
        url = f"http://{out.getvalue().split('http://')[1].split(' ')[0]}"
        with anthropic.Anthropic(base_url=url, api_key="key") as client:
            seen.append(look(client, create(client)).processing_status)
        raise KeyboardInterrupt

    monkeypatch.setattr(ai_budget_simulator, "wait_for_interrupt", create_then_interrupt)

    arguments = [f"--batch-seconds={seconds}" for seconds in options]
    call_command(ai_budget_simulator.Command(), "--port=0", *arguments, stdout=out)

    assert seen == [status]
