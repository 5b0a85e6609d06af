"""What OpenTelemetry is told: the cost on the SDK's own spans, and metrics by the conventions."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anthropic
import pytest
from asgiref.sync import sync_to_async
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import use_span

import ai_budget
from ai_budget import money
from ai_budget.metrics import names, otel
from ai_budget.metrics.otel import Instruments
from ai_budget.testing import AnthropicSimulator, Fail, Hang, Reply, override_budget
from tests.batches.given import over, standing_still
from tests.guard.books import MODEL, QUESTION, only_row, rows

pytestmark = pytest.mark.django_db

LADDER: list[tuple[int, str]] = [(1, MODEL)]


class Spans:
    """A provider of traces, and the spans that are over."""

    def __init__(self) -> None:
        self.provider = TracerProvider(shutdown_on_exit=False)
        self._kept = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self._kept))

    @property
    def over(self) -> tuple[ReadableSpan, ...]:
        return self._kept.get_finished_spans()

    @property
    def only(self) -> dict[str, Any]:
        (span,) = self.over
        return dict(span.attributes or {})


@pytest.fixture
def spans() -> Iterator[Spans]:
    spans = Spans()
    yield spans
    spans.provider.shutdown()


@pytest.fixture
def client(api: AnthropicSimulator, spans: Spans) -> Iterator[anthropic.Anthropic]:
    """A guarded client whose calls are traced."""
    traced: Any = {"tracer_provider": spans.provider}
    with anthropic.Anthropic(api_key="key", base_url=api.base_url, open_telemetry=traced) as bare:
        yield ai_budget.guard(bare, feature="chat")


@pytest.fixture
async def async_client(
    api: AnthropicSimulator, spans: Spans
) -> AsyncIterator[anthropic.AsyncAnthropic]:
    traced: Any = {"tracer_provider": spans.provider}
    url = api.base_url
    async with anthropic.AsyncAnthropic(api_key="key", base_url=url, open_telemetry=traced) as bare:
        yield ai_budget.guard(bare, feature="chat")


class Measured:
    """The points of every metric that were recorded, by the metric's name."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)

    def points(self, name: str) -> list[Any]:
        data = self.reader.get_metrics_data()
        found = []
        for resource in () if data is None else data.resource_metrics:
            for scope in resource.scope_metrics:
                found += [it for it in scope.metrics if it.name == name]
        return [point for metric in found for point in metric.data.data_points]

    def sums(self, name: str, *labels: str) -> dict[Any, Any]:
        """Return the sum of each point, by some of its attributes."""
        return {
            tuple(point.attributes[label] for label in labels): getattr(
                point, "sum", getattr(point, "value", None)
            )
            for point in self.points(name)
        }


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Measured]:
    measured = Measured()
    instruments = Instruments(measured.provider.get_meter(names.SCOPE))
    monkeypatch.setattr(otel, "instruments_in_use", lambda: instruments)
    yield measured
    measured.provider.shutdown()


def dollars(nanousd: int | None) -> float:
    assert nanousd
    return float(money.to_usd(nanousd))


# Spans -------------------------------------------------------------------------------------------


def test_the_sdks_span_says_what_the_call_cost_and_who_paid(
    client: anthropic.Anthropic, spans: Spans
) -> None:
    client.messages.create(**QUESTION)

    row, span = only_row(), spans.only
    assert span["gen_ai.provider.name"] == "anthropic"  # the SDK's own
    ours = {name: value for name, value in span.items() if name.startswith("ai_budget.")}
    assert ours == {
        "ai_budget.call_id": str(row.call_id),
        "ai_budget.feature": "chat",
        "ai_budget.kind": "ask",
        "ai_budget.status": "settled",
        "ai_budget.model": MODEL,
        "ai_budget.decision": row.decision,
        "ai_budget.downgraded": False,
        "ai_budget.cached": False,
        "ai_budget.cost_usd": dollars(row.cost_nanousd),
        "ai_budget.saved_usd": 0.0,
    }


def test_no_prompt_and_no_user_is_on_it(client: anthropic.Anthropic, spans: Spans) -> None:
    with ai_budget.charge(subject="hunter2"):
        client.messages.create(
            model=MODEL, max_tokens=9, messages=[{"role": "user", "content": "hunter2"}]
        )

    assert "hunter2" not in str(spans.only)


def test_all_attempts_of_a_call_are_on_its_one_span(
    client: anthropic.Anthropic, api: AnthropicSimulator, spans: Spans
) -> None:
    api.enqueue(Fail(status=529, retry_after=0.001), Hang(seconds=30))
    client.messages.create(**QUESTION, timeout=0.2)

    costs = [row.cost_nanousd or 0 for row in rows()]
    assert [row.status for row in rows()] == ["settled", "estimated", "settled"]
    assert spans.only["ai_budget.cost_usd"] == dollars(sum(costs))
    assert spans.only["ai_budget.status"] == "settled"


def test_a_downgraded_call_says_so(client: anthropic.Anthropic, spans: Spans) -> None:
    with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
        ai_budget.ask("Hello " * 4_000, feature="chat", model="claude-opus-5-5")
        client.messages.create(**{**QUESTION, "model": "claude-opus-5-5"})

    span = spans.only
    assert span["ai_budget.downgraded"] is True
    assert (span["gen_ai.request.model"], span["ai_budget.model"]) == ("claude-opus-5-5", MODEL)
    assert span["ai_budget.saved_usd"] > 0


def test_a_cached_answer_says_so(client: anthropic.Anthropic, spans: Spans) -> None:
    with override_budget("chat", cache_scope="shared"):
        client.messages.create(**QUESTION)
        client.messages.create(**QUESTION)

    asked, found = (dict(span.attributes or {}) for span in spans.over)
    assert (asked["ai_budget.cached"], found["ai_budget.cached"]) == (False, True)
    assert found["ai_budget.cost_usd"] == 0
    assert found["ai_budget.saved_usd"] == asked["ai_budget.cost_usd"]


def test_a_refused_call_says_so(client: anthropic.Anthropic, spans: Spans) -> None:
    with override_budget("chat", daily_limit_usd=0), pytest.raises(ai_budget.BudgetExceeded):
        client.messages.create(**QUESTION)

    assert spans.only["ai_budget.refused"] == "BudgetExceeded"
    assert spans.only["ai_budget.feature"] == "chat"
    assert "ai_budget.cost_usd" not in spans.only


def test_what_was_written_to_the_prompt_cache_has_the_name_of_the_conventions(
    client: anthropic.Anthropic, api: AnthropicSimulator, spans: Spans
) -> None:
    api.enqueue(Reply(usage={"cache_creation_input_tokens": 7}))
    client.messages.create(**QUESTION)

    assert spans.only["gen_ai.usage.cache_creation.input_tokens"] == 7


def test_a_stream_that_is_read_to_its_end_says_what_it_cost(
    client: anthropic.Anthropic, spans: Spans
) -> None:
    with client.messages.stream(**QUESTION) as stream:
        for _ in stream:
            pass

    assert spans.only["ai_budget.cost_usd"] == dollars(only_row().cost_nanousd)


def test_one_that_is_closed_early_is_over_before_anybody_knows(
    client: anthropic.Anthropic, spans: Spans
) -> None:
    with client.messages.stream(**QUESTION) as stream:
        next(iter(stream))

    assert only_row().status == "estimated"
    assert "ai_budget.cost_usd" not in spans.only


def test_a_body_that_the_caller_reads_itself_says_what_it_cost(
    client: anthropic.Anthropic, spans: Spans
) -> None:
    with client.messages.with_streaming_response.create(**QUESTION) as response:
        response.read()

    assert spans.only["ai_budget.cost_usd"] == dollars(only_row().cost_nanousd)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("stream", [False, True])
async def test_async_calls_say_it_too(
    async_client: anthropic.AsyncAnthropic, spans: Spans, stream: bool
) -> None:
    if stream:
        async with async_client.messages.stream(**QUESTION) as answer:
            async for _ in answer:
                pass
    else:
        await async_client.messages.create(**QUESTION)

    row = await sync_to_async(only_row)()
    assert spans.only["ai_budget.cost_usd"] == dollars(row.cost_nanousd)


@pytest.mark.django_db(transaction=True)
async def test_calls_at_the_same_time_are_told_apart(
    async_client: anthropic.AsyncAnthropic, api: AnthropicSimulator, spans: Spans
) -> None:
    api.enqueue(*[Reply(output_tokens=count) for count in (5, 10, 20)])
    await asyncio.gather(*[async_client.messages.create(**QUESTION) for _ in range(3)])

    found = await sync_to_async(rows)()
    by_call = {str(row.call_id): (row.output_tokens, dollars(row.cost_nanousd)) for row in found}
    told = {
        attributes["ai_budget.call_id"]: (
            attributes["gen_ai.usage.output_tokens"],
            attributes["ai_budget.cost_usd"],
        )
        for attributes in (dict(span.attributes or {}) for span in spans.over)
    }
    assert told == by_call
    assert len(by_call) == 3


def test_a_span_of_somebody_else_is_left_alone(api: AnthropicSimulator, spans: Spans) -> None:
    """That of a whole page, where the SDK's own are switched off."""
    page = spans.provider.get_tracer("site").start_span("GET /ask/")
    with (
        anthropic.Anthropic(api_key="key", base_url=api.base_url, open_telemetry=False) as bare,
        use_span(page, end_on_exit=True),
    ):
        guarded = ai_budget.guard(bare, feature="chat")
        guarded.messages.create(**QUESTION)
        with guarded.messages.stream(**QUESTION) as stream:
            for _ in stream:
                pass
        with override_budget("chat", daily_limit_usd=0), pytest.raises(ai_budget.BudgetExceeded):
            guarded.messages.create(**QUESTION)

    assert spans.only == {}


def test_so_is_the_one_in_which_a_stream_is_read(client: anthropic.Anthropic, spans: Spans) -> None:
    with client.messages.stream(**QUESTION) as stream:
        page = spans.provider.get_tracer("site").start_span("GET /ask/")
        with use_span(page, end_on_exit=True):
            for _ in stream:
                pass

    call, page_of_it = (dict(span.attributes or {}) for span in spans.over)
    assert "ai_budget.cost_usd" in call
    assert page_of_it == {}


def test_items_of_batches_have_no_span(api: AnthropicSimulator, spans: Spans) -> None:
    job = spans.provider.get_tracer("site").start_span("job", attributes={names.REQUEST_MODEL: "x"})
    with use_span(job, end_on_exit=True), standing_still() as clock:
        over(clock)

    assert list(spans.only) == [names.REQUEST_MODEL]


# Metrics -----------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_bill(
    client: anthropic.Anthropic, api: AnthropicSimulator, measured: Measured
) -> None:
    api.enqueue(Reply(usage={"cache_read_input_tokens": 900, "cache_creation_input_tokens": 80}))
    client.messages.create(**QUESTION)

    row = only_row()
    assert measured.sums(names.TOKEN_USAGE, names.TOKEN_TYPE) == {
        ("input",): row.input_tokens + 980,
        ("output",): row.output_tokens,
    }
    (point, _) = measured.points(names.TOKEN_USAGE)
    assert point.explicit_bounds == names.TOKEN_BUCKETS
    assert point.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.token.type": "input",
        "ai_budget.feature": "chat",
        "ai_budget.kind": "ask",
    }


def test_the_buckets_are_those_that_the_conventions_advise() -> None:
    assert (names.TOKEN_BUCKETS[0], names.TOKEN_BUCKETS[-1]) == (1, 67_108_864)
    assert (names.SECOND_BUCKETS[0], names.SECOND_BUCKETS[-1]) == (0.01, 81.92)


def test_durations_are_seconds_and_name_what_went_wrong(
    client: anthropic.Anthropic, api: AnthropicSimulator, measured: Measured
) -> None:
    api.enqueue(Fail(status=529, retry_after=0.001))
    client.messages.create(**QUESTION)

    failed, answered = rows()
    points = {
        it.attributes.get("error.type"): it for it in measured.points(names.OPERATION_DURATION)
    }
    assert set(points) == {"HTTP 529", None}
    assert points["HTTP 529"].sum == (failed.latency_ms or 0) / 1000
    assert points[None].sum == (answered.latency_ms or 0) / 1000


def test_cost_is_counted_by_how_sure_it_is(client: anthropic.Anthropic, measured: Measured) -> None:
    client.messages.create(**QUESTION)
    with client.messages.stream(**QUESTION, thinking={"type": "disabled"}) as stream:
        next(iter(stream))

    settled, estimated = rows()
    assert measured.sums(names.COST, names.STATUS) == {
        ("settled",): dollars(settled.cost_nanousd),
        ("estimated",): dollars(estimated.cost_nanousd),
    }
    # Its tokens are known in part, and the truth may come.
    assert estimated.input_tokens > 0
    assert [point.count for point in measured.points(names.TOKEN_USAGE)] == [1, 1]


def test_a_cached_answer_is_a_call_and_no_request(
    client: anthropic.Anthropic, measured: Measured
) -> None:
    with override_budget("chat", cache_scope="shared"):
        for _ in range(3):
            client.messages.create(**QUESTION)

    assert measured.sums(names.CALLS, names.STATUS) == {("settled",): 1, ("cached",): 2}
    (duration,) = measured.points(names.OPERATION_DURATION)
    assert duration.count == 1
    assert [point.count for point in measured.points(names.TOKEN_USAGE)] == [1, 1]


def test_items_of_batches_have_tokens_and_no_duration(
    api: AnthropicSimulator, measured: Measured
) -> None:
    with standing_still() as clock:
        batch = over(clock)

    assert measured.sums(names.CALLS, names.KIND, names.STATUS) == {("batch", "settled"): 3}
    cost = measured.sums(names.COST, names.KIND)
    assert cost == {("batch",): pytest.approx(dollars(batch.spent_nanousd))}
    assert [point.count for point in measured.points(names.TOKEN_USAGE)] == [3, 3]
    assert measured.points(names.OPERATION_DURATION) == []


def test_refusals_are_counted_by_their_reason(
    client: anthropic.Anthropic, measured: Measured
) -> None:
    with override_budget("chat", daily_limit_usd=0), pytest.raises(ai_budget.BudgetExceeded):
        client.messages.create(**QUESTION)
    with override_budget("chat", enabled=False), pytest.raises(ai_budget.FeatureDisabled):
        client.messages.create(**QUESTION)

    assert measured.sums(names.REFUSALS, names.FEATURE, names.ERROR_TYPE) == {
        ("chat", "BudgetExceeded"): 1,
        ("chat", "FeatureDisabled"): 1,
    }


def test_no_user_is_a_label(client: anthropic.Anthropic, measured: Measured) -> None:
    with ai_budget.charge(subject="hunter2", tags={"plan": "hunter2"}):
        client.messages.create(**QUESTION)

    for name in (names.TOKEN_USAGE, names.OPERATION_DURATION, names.COST, names.CALLS):
        assert "hunter2" not in str(measured.points(name))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("anthropic", "anthropic"),
        ("bedrock", "aws.bedrock"),
        ("vertex", "gcp.vertex_ai"),
        ("foundry", "azure.ai.inference"),
    ],
)
def test_providers_have_the_names_of_the_conventions(ours: str, theirs: str) -> None:
    assert names.PROVIDERS.get(ours, ours) == theirs


# Without OpenTelemetry ---------------------------------------------------------------------------


def test_without_a_provider_nothing_is_recorded_and_nothing_fails(
    client: anthropic.Anthropic, caplog: pytest.LogCaptureFixture
) -> None:
    assert otel.instruments_in_use() is not None

    client.messages.create(**QUESTION)

    assert "failed" not in caplog.text


def test_where_it_is_not_installed_nothing_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    otel.instruments_in_use.cache_clear()
    try:
        assert otel.instruments_in_use() is None
        context = contextvars.copy_context()
        otel.tell_settled(reservation=None, settlement=None, context=context)  # type: ignore[arg-type]
        otel.tell_refused(charge=None, error=None)  # type: ignore[arg-type]
    finally:
        otel.instruments_in_use.cache_clear()
