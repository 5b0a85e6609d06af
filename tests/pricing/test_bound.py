"""The most that a request can cost: what is counted, what is refused, and what refusals say."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ai_budget.exceptions import UnboundedCall, UnpricedModel
from ai_budget.models import ModelRate
from ai_budget.pricing import rates
from ai_budget.pricing.bound import LOOP_TURNS, bound
from ai_budget.pricing.cost import price
from ai_budget.pricing.rates import resolve
from ai_budget.values import Bound
from tests.factories import ModelRateFactory

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
OPUS, SONNET, HAIKU = "claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5"
MILLION = 1_000_000
SECRET = "the launch code is 0000"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"


def request(**fields: Any) -> dict[str, Any]:
    return {
        "model": OPUS,
        "max_tokens": 100,
        "messages": [{"role": "user", "content": SECRET}],
        **fields,
    }


def bound_of(body: dict[str, Any], **options: Any) -> Bound:
    return bound(body, resolve(body["model"], at=NOW), at=NOW, **options)


def with_block(block: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return request(messages=[{"role": "user", "content": [block]}], **fields)


WEB_SEARCH = {"type": "web_search_20260318", "name": "web_search"}
WEB_FETCH = {"type": "web_fetch_20260318", "name": "web_fetch"}
ADVISOR = {
    "type": "advisor_20260301",
    "name": "advisor",
    "model": "claude-fable-5-2",
    "max_uses": 3,
    "max_tokens": 2_048,
}


# Text --------------------------------------------------------------------------------------------


def test_text_is_counted_in_bytes() -> None:
    short, long = bound_of(request(system="")), bound_of(request(system="x" * 1_000))

    assert long.input_tokens - short.input_tokens == 1_000


@pytest.mark.parametrize(
    ("letter", "most"),
    [
        ("é", 2),
        ("語", 3),
        ("😀", 4),
        ("\ufdfa", 33),  # one ligature is eighteen letters in its compatibility form
        ("\u0958", 6),  # decomposes and never composes again
        ("\uff21", 3),  # a wide letter shrinks to one byte
        ("\ud800", 3),
    ],
    ids=ascii,
)
def test_a_letter_is_the_longer_of_its_two_forms(letter: str, most: int) -> None:
    none, many = bound_of(request(system="")), bound_of(request(system=letter * 500))

    assert many.input_tokens - none.input_tokens == 500 * most


def test_a_bound_is_small_for_a_small_request() -> None:
    assert bound_of(request()).nanousd < price(OPUS, {"input_tokens": 1_000, "output_tokens": 100})


def test_room_is_left_for_what_frames_a_request() -> None:
    body = request()

    assert bound_of(body).input_tokens >= len(json.dumps(body)) + 200


def test_the_prompt_is_at_most_the_context_window() -> None:
    body = request(model="claude-haiku-4-5", system="x" * 300_000)

    assert bound_of(body).input_tokens == 200_000


def test_a_window_behind_a_beta_header_is_counted_where_the_table_prices_it() -> None:
    body = request(model="claude-sonnet-4-5", system="x" * 300_000)

    assert bound_of(body).input_tokens > 300_000


def test_tools_of_the_client_bring_a_text_of_their_own() -> None:
    tool = {"name": "add", "input_schema": {"type": "object"}}

    added = bound_of(request(tools=[tool])).input_tokens - bound_of(request()).input_tokens

    assert added > 1_024


def test_a_schema_for_the_output_brings_a_text_of_its_own() -> None:
    schema = {"format": {"type": "json_schema", "schema": {}}}

    added = bound_of(request(output_config=schema)).input_tokens - bound_of(request()).input_tokens

    assert added > 1_024


def test_a_body_that_is_not_json_has_no_bound() -> None:
    with pytest.raises(UnboundedCall, match="not JSON"):
        bound_of(request(system=[{"type": "text", "text": b"bytes"}]))


# Blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "tokens"),
    [(OPUS, 4_784), ("claude-opus-4-7", 4_784), ("claude-opus-4-6", 1_568), (HAIKU, 4_784)],
)
@pytest.mark.parametrize(
    "source",
    [
        {"type": "base64", "media_type": "image/png", "data": PIXEL},
        {"type": "url", "url": "https://example.com/a.png"},
        {"type": "file", "file_id": "file_1"},
    ],
    ids=lambda source: source["type"],
)
def test_an_image_is_the_models_documented_most(
    model: str, tokens: int, source: dict[str, Any]
) -> None:
    body = with_block({"type": "image", "source": source}, model=model)

    assert tokens < bound_of(body).input_tokens < tokens + 1_000


def test_the_bytes_of_an_image_are_not_text() -> None:
    def image(data: str) -> dict[str, Any]:
        source = {"type": "base64", "media_type": "image/png", "data": data}
        return with_block({"type": "image", "source": source})

    assert bound_of(image("A" * 1_000_000)).nanousd == bound_of(image("A")).nanousd


def test_images_are_found_inside_results_and_documents() -> None:
    image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [image, image]}
    document = {"type": "document", "source": {"type": "content", "content": [image]}}

    assert bound_of(with_block(result)).input_tokens > 2 * 4_784
    assert bound_of(with_block(document)).input_tokens > 4_784


@pytest.mark.parametrize(
    "block",
    [
        {"type": "document", "source": {"type": "base64", "data": "JVBERi0="}},
        {"type": "document", "source": {"type": "url", "url": "https://example.com/a.pdf"}},
        {"type": "document", "source": {"type": "file", "file_id": "file_1"}},
        {"type": "document"},
        {"type": "container_upload", "file_id": "file_1"},
        {"type": "hologram"},
        {},
        {
            "type": "document",
            "source": {"type": "text", "media_type": "text/plain", "data": "a"},
            "citations": {"enabled": True},
        },
        {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "hologram"}]},
        {
            "type": "document",
            "source": {"type": "content", "content": [{"type": "hologram"}]},
        },
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_the_context_window(block: dict[str, Any]) -> None:
    found = bound_of(with_block(block))

    assert found.input_tokens == MILLION
    assert found.reasons


def test_a_document_of_plain_text_is_text() -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "x" * 1_000}

    assert 1_000 < bound_of(with_block({"type": "document", "source": source})).input_tokens < 2_000


@pytest.mark.parametrize(
    "fields",
    [
        {"container": "container_1"},
        {"container": {"skills": [{"type": "anthropic", "skill_id": "xlsx"}]}},
        {"thread": {"type": "continue", "previous_message_id": "msg_1"}},
        {"thread": {"type": "fork"}},
        {"thread": "msg_1"},
    ],
    ids=str,
)
def test_what_the_server_holds_is_the_context_window(fields: dict[str, Any]) -> None:
    assert bound_of(request(**fields)).input_tokens == MILLION


def test_a_new_thread_is_what_the_request_shows() -> None:
    assert bound_of(request(thread={"type": "create"})).input_tokens < 1_000


# Rates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "dollars"),
    [
        (None, 4),
        ({"type": "ephemeral"}, 5),
        ({"type": "ephemeral", "ttl": "5m"}, 5),
        ({"type": "ephemeral", "ttl": "1h"}, 8),
        ({"type": "ephemeral", "ttl": "7d"}, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "place",
    [
        lambda mark: request(cache_control=mark),
        lambda mark: request(system=[{"type": "text", "text": "a", "cache_control": mark}]),
        lambda mark: with_block({"type": "text", "text": "a", "cache_control": mark}),
        lambda mark: request(
            tools=[{"name": "add", "input_schema": {}, "cache_control": mark}],
        ),
        lambda mark: with_block(
            {
                "type": "tool_result",
                "tool_use_id": "t",
                "content": [{"type": "text", "text": "a", "cache_control": mark}],
            }
        ),
        lambda mark: with_block(
            {
                "type": "document",
                "source": {
                    "type": "content",
                    "content": [{"type": "text", "text": "a", "cache_control": mark}],
                },
            }
        ),
    ],
    ids=["top", "system", "block", "tool", "result", "document"],
)
def test_the_prompt_is_as_dear_as_the_dearest_write_that_is_marked(
    place: Callable[[Any], dict[str, Any]], mark: dict[str, Any] | None, dollars: int
) -> None:
    found = bound_of({**place(mark), "max_tokens": 0, "inference_geo": "global"})

    assert found.nanousd == found.input_tokens * dollars * 1_000


def test_a_thread_may_be_kept_in_the_dearest_cache() -> None:
    found = bound_of(request(thread={"type": "create"}, max_tokens=0, inference_geo="global"))

    assert found.nanousd == found.input_tokens * 8_000


@pytest.mark.parametrize(
    ("asked", "declared", "us"),
    [
        (None, None, True),
        ("us", None, True),
        ("global", None, False),
        (None, "us", True),
        (None, "global", False),
        ("us", "global", True),
        ("global", "us", False),
        ("eu", None, True),
    ],
)
def test_us_inference_is_counted_unless_another_is_sure(
    asked: str | None, declared: str | None, us: bool
) -> None:
    plain = bound_of(request(inference_geo="global")).nanousd

    found = bound_of(request(inference_geo=asked), declared_geo=declared).nanousd

    # A different geography is also a different number of bytes, at 4,000 nano-dollars each.
    assert (found > plain + 50 * 4_400) == us


def test_a_long_prompt_is_of_the_higher_tier() -> None:
    short = bound_of(request(model=HAIKU, system="x" * 90_000, max_tokens=1_000))
    long = bound_of(request(model=HAIKU, system="x" * 110_000, max_tokens=1_000))

    assert long.nanousd > 5 * short.nanousd


def test_fast_mode_is_charged_as_fast() -> None:
    assert bound_of(request(speed="fast")).nanousd > 1.9 * bound_of(request()).nanousd


def test_fast_mode_without_a_fast_price_is_unpriced() -> None:
    with pytest.raises(UnpricedModel):
        bound_of(request(model=SONNET, speed="fast"))


def add_rate(**fields: Any) -> None:
    ModelRateFactory.create(model=OPUS, valid_from=NOW - timedelta(days=1), **fields)
    rates.forget()


def test_a_read_that_is_dearer_than_input_is_covered() -> None:
    add_rate(input_usd=1, output_usd=1, cache_read_usd=7)

    found = bound_of(request(max_tokens=0, inference_geo="global"))

    assert found.nanousd == found.input_tokens * 7_000


def test_a_tier_that_only_the_sum_of_all_turns_reaches_is_covered() -> None:
    add_rate(prompt_tokens_above=5 * MILLION, input_usd=90, output_usd=90)
    body = request(tools=[{**WEB_FETCH, "max_uses": 1}])

    # Without iterations only the sum is told, and a tier is chosen by what is told.
    assert bound_of(body).nanousd >= price(OPUS, {"input_tokens": 10 * MILLION}, at=NOW)


def test_a_fast_request_that_runs_at_standard_speed_is_covered() -> None:
    add_rate(speed=ModelRate.Speed.FAST, input_usd=1, output_usd=1)

    found = bound_of(request(speed="fast", max_tokens=MILLION))

    assert found.nanousd >= price(OPUS, {"output_tokens": MILLION, "speed": "standard"}, at=NOW)


def test_a_batch_halves_the_bound_but_not_its_searches() -> None:
    body = request(tools=[{**WEB_SEARCH, "max_uses": 5}])
    searches = 5 * 10_000_000

    whole, half = bound_of(body).nanousd, bound_of(body, batch=True).nanousd

    assert half - searches == (whole - searches) // 2


# Loops and helpers -------------------------------------------------------------------------------


@pytest.mark.parametrize(("uses", "turns"), [(0, 10), (1, 10), (9, 10), (10, 11), (50, 51)])
def test_a_loop_is_a_window_and_all_output_for_every_turn(uses: int, turns: int) -> None:
    found = bound_of(request(tools=[{**WEB_SEARCH, "max_uses": uses}]))

    assert found.input_tokens == turns * MILLION
    assert found.output_tokens == turns * 100
    assert found.web_searches == uses
    assert found.hidden


def test_the_uses_of_all_tools_add_up() -> None:
    tools = [{**WEB_SEARCH, "max_uses": 8}, {**WEB_FETCH, "max_uses": 7}]

    found = bound_of(request(tools=tools))

    assert found.output_tokens == 16 * 100
    assert found.web_searches == 8


def test_a_tool_that_is_defined_in_a_message_is_a_tool() -> None:
    definition = {"type": "tool_definition", "definition": {**WEB_SEARCH, "max_uses": 20}}
    addition = {"type": "tool_addition", "tool": definition}
    messages = [
        {"role": "user", "content": SECRET},
        {"role": "system", "content": [addition]},
    ]
    compaction = {"type": "compaction", "content": "so far", "tool_changes": [addition]}

    assert bound_of(request(messages=messages)).web_searches == 20
    assert bound_of(with_block(compaction)).web_searches == 20


@pytest.mark.parametrize(
    "fields",
    [
        {"compaction": {"type": "summarize"}},
        {"context_management": {"edits": [{"type": "compact_20260112"}]}},
        {"context_management": {"edits": [{"type": "rewrite_20270101"}]}},
    ],
    ids=str,
)
def test_compaction_is_one_more_turn_for_every_turn(fields: dict[str, Any]) -> None:
    assert bound_of(request(**fields)).input_tokens == 2 * MILLION
    looping = bound_of(request(tools=[{**WEB_SEARCH, "max_uses": 1}], **fields))
    assert looping.input_tokens == 2 * LOOP_TURNS * MILLION


def test_clearing_old_results_needs_no_turn() -> None:
    edits = [{"type": "clear_tool_uses_20250919"}, {"type": "clear_thinking_20251015"}]

    assert bound_of(request(context_management={"edits": edits})).input_tokens < 1_000


def test_an_advisor_is_its_own_window_for_every_use() -> None:
    without = bound_of(request(tools=[{**WEB_FETCH, "max_uses": 3}], inference_geo="global"))
    found = bound_of(request(tools=[ADVISOR], inference_geo="global"))

    assert found.nanousd - without.nanousd == 3 * (MILLION * 16_000 + 2_048 * 40_000)


def test_every_fallback_reads_the_prompt_again() -> None:
    body = request(fallbacks=[{"model": "claude-opus-4-8"}, {"model": SONNET, "max_tokens": 500}])

    found = bound_of(body)

    assert found.output_tokens == 100 + 100 + 500
    assert found.hidden


def test_a_fallback_with_larger_images_is_counted_by_its_own() -> None:
    image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    body = with_block(image, model="claude-opus-4-6", fallbacks=[{"model": OPUS}])

    assert bound_of(body).input_tokens > 1_568 + 4_784


def test_a_fallback_with_a_wider_window_is_counted_by_its_own() -> None:
    body = request(
        model="claude-opus-4-5", system="x" * 900_000, fallbacks=[{"model": "claude-opus-4-8"}]
    )

    assert bound_of(body).input_tokens > 200_000 + 900_000


def test_a_fast_fallback_may_make_the_whole_answer_fast() -> None:
    body = request(fallbacks=[{"model": "claude-opus-4-8", "speed": "fast"}], max_tokens=MILLION)

    both_fast = 2 * price(OPUS, {"output_tokens": MILLION, "speed": "fast"}, at=NOW)

    assert bound_of(body).nanousd > both_fast


def test_a_fallback_without_fast_mode_does_not_stop_a_fast_request() -> None:
    assert bound_of(request(speed="fast", fallbacks=[{"model": SONNET}])).nanousd > 0


def test_a_fallback_may_use_the_tools_anew() -> None:
    body = request(tools=[{**WEB_SEARCH, "max_uses": 4}], fallbacks=[{"model": SONNET}])

    assert bound_of(body).web_searches == 8


def test_a_fallback_may_ask_the_advisor_anew() -> None:
    body = request(tools=[ADVISOR], fallbacks=[{"model": SONNET}])

    executors = 2 * LOOP_TURNS * MILLION
    assert bound_of(body).input_tokens == executors + 2 * 3 * MILLION


def test_a_schema_for_a_fallback_alone_brings_a_text_of_its_own() -> None:
    schema = {"format": {"type": "json_schema", "schema": {}}}
    plain = request(fallbacks=[{"model": SONNET}])
    formatted = request(fallbacks=[{"model": SONNET, "output_config": schema}])

    assert bound_of(formatted).input_tokens - bound_of(plain).input_tokens > 2 * 1_024


def test_an_unknown_fallback_is_unpriced() -> None:
    with pytest.raises(UnpricedModel, match="claude-nova-9"):
        bound_of(request(fallbacks=[{"model": "claude-nova-9"}]))


def test_an_unknown_advisor_is_unpriced() -> None:
    with pytest.raises(UnpricedModel, match="claude-nova-9"):
        bound_of(request(tools=[{**ADVISOR, "model": "claude-nova-9"}]))


# What has no bound -------------------------------------------------------------------------------

UNBOUNDED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [WEB_SEARCH]}, "Set max_uses on the tool web_search_20260318"),
    ({"tools": [WEB_FETCH]}, "Set max_uses on the tool web_fetch_20260318"),
    ({"tools": [{**WEB_SEARCH, "max_uses": None}]}, "Set max_uses"),
    ({"tools": [{**WEB_SEARCH, "max_uses": -1}]}, "Set max_uses"),
    ({"tools": [{**WEB_SEARCH, "max_uses": True}]}, "Set max_uses"),
    ({"tools": [{**WEB_SEARCH, "max_uses": "5"}]}, "Set max_uses"),
    ({"tools": [{**WEB_SEARCH, "max_uses": 2.5}]}, "Set max_uses"),
    ({"tools": [{"type": "code_execution_20260521", "name": "code_execution"}]}, "leave it out"),
    ({"tools": [{"type": "tool_search_tool_bm25_20251119", "name": "find"}]}, "leave it out"),
    ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "crm"}]}, "leave it out"),
    ({"tools": [{"type": "holodeck_20270101"}]}, "holodeck_20270101 is not classified"),
    ({"tools": [{**ADVISOR, "max_uses": None}]}, "Set max_uses on the tool advisor"),
    ({"tools": [{**ADVISOR, "max_tokens": None}]}, "Set model and max_tokens"),
    ({"tools": [{**ADVISOR, "model": ""}]}, "Set model and max_tokens"),
    ({"mcp_servers": [{"type": "url", "url": "https://example.com"}]}, "leave it out"),
    ({"fallbacks": "default"}, "Name the fallback models"),
    ({"fallbacks": True}, "Name the fallback models"),
    ({"fallbacks": ["claude-opus-4-8"]}, "Name the fallback models"),
    ({"fallbacks": [{"max_tokens": 5}]}, "Name the fallback models"),
    ({"teleport": True}, "The parameter teleport is not classified"),
    ({"speed": "warp"}, "set standard or fast"),
    ({"speed": ["fast"]}, "set standard or fast"),
    ({"fallbacks": [{"model": OPUS, "speed": "warp"}]}, "set standard or fast"),
    (
        {"thread": {"type": "create"}, "tools": [{**WEB_SEARCH, "max_uses": 1}]},
        "Leave out thread",
    ),
]


@pytest.mark.parametrize(("fields", "advice"), UNBOUNDED, ids=lambda value: str(value)[:60])
def test_a_request_without_a_bound_is_refused_with_advice(
    fields: dict[str, Any], advice: str
) -> None:
    with pytest.raises(UnboundedCall) as refused:
        bound_of(request(**fields))

    assert advice in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(("fields", "advice"), UNBOUNDED, ids=lambda value: str(value)[:60])
def test_where_it_is_allowed_what_has_a_bound_is_counted_and_the_rest_is_named(
    fields: dict[str, Any], advice: str
) -> None:
    found = bound_of(request(**fields), allow_unbounded=True)

    assert found.nanousd >= bound_of(request()).nanousd
    assert any(advice in reason for reason in found.reasons)
    assert found.hidden


def test_an_inline_tool_without_a_bound_is_refused() -> None:
    definition = {"type": "tool_definition", "definition": WEB_SEARCH}
    addition = {"type": "tool_addition", "tool": definition}

    with pytest.raises(UnboundedCall, match="Set max_uses"):
        bound_of(request(messages=[{"role": "system", "content": [addition]}]))


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UnboundedCall) as refused:
        bound_of(request(tools=[WEB_SEARCH], fallbacks="default", teleport=1))

    for advice in ("Set max_uses", "Name the fallback models", "teleport"):
        assert advice in str(refused.value)


@pytest.mark.parametrize("value", [None, -1, 1.5, "100", True])
def test_max_tokens_must_be_a_count(value: Any) -> None:
    for allow in (False, True):
        with pytest.raises(UnboundedCall, match="max_tokens must be"):
            bound_of(request(max_tokens=value), allow_unbounded=allow)


def test_max_tokens_of_a_fallback_must_be_a_count() -> None:
    with pytest.raises(UnboundedCall, match="max_tokens must be"):
        bound_of(request(fallbacks=[{"model": OPUS, "max_tokens": -5}]))


def test_an_empty_list_of_servers_or_fallbacks_is_none() -> None:
    body = request(mcp_servers=[], fallbacks=None, tools=[])

    assert bound_of(body).output_tokens == 100


@pytest.mark.parametrize("allow_unbounded", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 2**31},
        {"tools": [{"type": "web_search_20260318", "name": "web_search", "max_uses": 2**40}]},
    ],
    ids=["max_tokens", "max_uses"],
)
def test_what_no_balance_can_hold_is_refused(fields: dict[str, Any], allow_unbounded: bool) -> None:
    with pytest.raises(UnboundedCall, match="more than can be counted"):
        bound_of(request(**fields), allow_unbounded=allow_unbounded)
