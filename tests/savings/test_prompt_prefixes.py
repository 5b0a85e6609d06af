from __future__ import annotations

import copy
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from django.test import override_settings
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_budget.savings.prompt_cache import Marking, mark
from ai_budget.savings.prompt_prefixes import is_marked, read_prefixes
from ai_budget.testing.prompt_cache_model import PromptCache
from ai_budget.testing.tokens import prompt_blocks
from tests.depth import deep
from tests.savings.prompt_api import RATES

AT = datetime(2026, 11, 22, 12, tzinfo=UTC)
MODEL = "claude-sonnet-5"
LONG = "a stable text of some length. " * 200  # 1,500 tokens of the local API
CACHE = {"type": "ephemeral"}
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
)
TOOL = {"name": "look_up", "description": LONG, "input_schema": {"type": "object"}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
THINKING = {"type": "thinking", "thinking": "hm", "signature": "x"}


def ask(text: str = "And now?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def say(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def body(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 64, "messages": list(messages), **more}


def marked(given: dict[str, Any], mode: str = "5m") -> Marking | None:
    return mark(given, mode=mode, rates=RATES, feature="chat", at=AT)


def marks_of(given: dict[str, Any]) -> list[str]:
    """The paths of the blocks that carry a mark."""
    return [block.path for block in prompt_blocks(given) if "cache_control" in block.content]


SHAPES = {
    "a system prompt as text": (body(ask(), system=LONG), ["system.0"]),
    "a system prompt in blocks": (
        body(ask(), system=[text("Be kind."), text(LONG)]),
        ["system.1"],
    ),
    "tools alone": (body(ask(), tools=[TOOL, {**TOOL, "name": "other"}]), ["tools.1"]),
    "tools and a system prompt": (body(ask(), tools=[TOOL], system=LONG), ["system.0"]),
    "one long message": (body(ask(LONG)), []),
    "one message in blocks": (
        body({"role": "user", "content": [text(LONG), text("What is it?")]}),
        ["messages.0.content.0"],
    ),
    "a conversation": (
        body(ask(LONG), say(text("Yes.")), ask(), system=LONG),
        ["system.0", "messages.1.content.0"],
    ),
    "a conversation in strings": (
        body(ask(LONG), {"role": "assistant", "content": "Yes."}, ask()),
        ["messages.1.content.0"],
    ),
    "thinking at the end of the prefix": (
        body(ask(LONG), say(text("Yes."), THINKING), ask()),
        ["messages.1.content.0"],
    ),
    "empty text at the end of the prefix": (
        body({"role": "user", "content": [text(LONG), text(" "), text("And?")]}),
        ["messages.0.content.0"],
    ),
    "a tool's call and its result": (
        body(
            ask(LONG),
            say({"type": "tool_use", "id": "t1", "name": "look_up", "input": {}}),
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "found"},
                    text("Go on."),
                ],
            },
        ),
        ["messages.2.content.0"],
    ),
    "an image": (
        body({"role": "user", "content": [text(LONG), IMAGE, text("What is it?")]}),
        ["messages.0.content.1"],
    ),
    "a tool that is loaded later": (
        body(ask(), tools=[TOOL, {**TOOL, "name": "later", "defer_loading": True}]),
        ["tools.0"],
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_end_of_the_stable_prefix_is_marked(shape: str) -> None:
    given, expected = SHAPES[shape]
    marking = marked(given)
    assert (marks_of(marking.body) if marking else []) == expected


def test_an_hour_is_asked_for_by_its_ttl() -> None:
    marking = marked(body(ask(), system=LONG), "1h")
    assert marking is not None
    assert marking.body["system"][0]["cache_control"] == {"type": "ephemeral", "ttl": "1h"}
    assert marking.note == "prompt cache 1h at 1"


def test_five_minutes_are_what_a_mark_without_ttl_means() -> None:
    marking = marked(body(ask(), system=LONG))
    assert marking is not None
    assert marking.body["system"] == [{"type": "text", "text": LONG, "cache_control": CACHE}]


@pytest.mark.parametrize("mode", ["off", "", "forever"])
def test_any_other_mode_leaves_the_body_alone(mode: str) -> None:
    assert marked(body(ask(), system=LONG), mode) is None


def test_a_prefix_below_the_minimum_is_not_marked() -> None:
    assert marked(body(ask(), system="Be kind.")) is None


CALLERS = [
    body(ask(), system=LONG, cache_control=CACHE),
    body(ask(), system=[{**text(LONG), "cache_control": CACHE}]),
    body(ask(), system=LONG, tools=[{**TOOL, "cache_control": CACHE}]),
    body({"role": "user", "content": [{**text("x"), "cache_control": CACHE}]}, system=LONG),
    body(
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t",
                    "content": [{**text("x"), "cache_control": CACHE}],
                }
            ],
        },
        system=LONG,
    ),
]


@pytest.mark.parametrize("given", CALLERS)
@pytest.mark.parametrize("mode", ["5m", "1h", "auto"])
def test_a_body_with_a_mark_of_the_callers_is_left_as_it_is(
    given: dict[str, Any], mode: str
) -> None:
    assert is_marked(given)
    marking = marked(given, mode)
    assert marking is None or marking.body == given


@pytest.mark.parametrize(
    "given",
    [
        {"model": MODEL},
        body("no message"),
        body({"role": "user"}, system=LONG),
        body(ask(), system=[LONG]),
        body({"role": "user", "content": [object()]}, system=LONG),
        body(ask(), system=LONG, tools=["no tool"]),
    ],
)
@pytest.mark.parametrize("mode", ["5m", "auto"])
def test_what_is_no_request_is_left_to_the_api_to_judge(given: dict[str, Any], mode: str) -> None:
    marking = marked(given, mode)
    assert marking is None or marking.body == given


def test_the_last_turns_mark_is_found_again_over_many_blocks() -> None:
    """Between two turns an agent may add more blocks than a mark looks back."""
    first = [ask(LONG), say(text("I begin.")), ask()]
    steps = [part for number in range(18) for part in (say(text(f"{number}")), ask(f"{number}"))]
    cache = PromptCache()
    for at, messages in enumerate([first, [*first, *steps]]):
        marking = marked(body(*messages))
        assert marking is not None
        blocks = prompt_blocks(marking.body)
        use = cache.plan(tenant="t", body=marking.body, blocks=blocks, at=float(at))
        cache.commit(use)
    assert use.read > 1_500


def test_fingerprints_tell_features_models_and_settings_apart() -> None:
    given = body(ask(), system=LONG)
    others = [
        ("chat", given),
        ("mail", given),
        ("chat", {**given, "model": "claude-opus-5-5"}),
        ("chat", {**given, "system": LONG + "!"}),
        ("chat", {**given, "tools": [TOOL]}),
        ("chat", {**given, "speed": "fast"}),
    ]
    found = []
    for feature, one in others:
        prefixes = read_prefixes(one, rates=RATES, feature=feature)
        assert prefixes is not None
        found.append(prefixes.positions[-1].fingerprint)
    with override_settings(SECRET_KEY="another"):
        prefixes = read_prefixes(given, rates=RATES, feature="chat")
        assert prefixes is not None
        found.append(prefixes.positions[-1].fingerprint)
    assert len(set(found)) == len(found)


def test_the_most_tokens_of_all_positions_are_no_fewer_than_the_prompt_has() -> None:
    for one, _ in SHAPES.values():
        prefixes = read_prefixes(one, rates=RATES, feature="chat")
        assert prefixes is not None
        most = sum(position.most for position in prefixes.positions)
        assert most >= sum(block.tokens for block in prompt_blocks(one))


def most_of(*content: Any) -> int:
    given = body({"role": "user", "content": [*content, text("What?")]})
    prefixes = read_prefixes(given, rates=RATES, feature="chat")
    assert prefixes is not None
    return prefixes.positions[0].most


def test_what_may_have_any_number_of_tokens_has_the_window() -> None:
    pdf = {"type": "base64", "media_type": "application/pdf", "data": "AA=="}
    assert most_of({"type": "document", "source": pdf}) == RATES.context_window
    assert most_of({**text("x"), "citations": {"enabled": True}}) == RATES.context_window
    assert most_of({"type": "of tomorrow"}, text("x")) == RATES.context_window


def test_letters_that_fold_into_many_count_as_many() -> None:
    assert most_of(text("\ufdfa" * 1_000)) >= 33_000


def test_an_image_counts_as_the_largest_and_not_as_its_bytes() -> None:
    source = {**IMAGE["source"], "data": PIXEL * 10_000}  # type: ignore[dict-item]
    most = most_of({"type": "image", "source": source})
    assert RATES.image_tokens <= most < RATES.image_tokens + 1_000


BLOCKS = st.one_of(
    st.sampled_from([text(LONG), text("short"), text(""), text(" "), THINKING, IMAGE]),
    st.sampled_from(
        [
            {"type": "redacted_thinking", "data": "x"},
            {"type": "tool_use", "id": "t", "name": "look_up", "input": {"a": 1}},
            {"type": "tool_result", "tool_use_id": "t", "content": [text("found"), IMAGE]},
            {"type": "tool_result", "tool_use_id": "t"},
            {"type": "document", "source": {"type": "text", "data": LONG}},
            {"type": "of tomorrow", "text": "x"},
        ]
    ),
)
CONTENT = st.one_of(st.sampled_from(["", "short", LONG]), st.lists(BLOCKS, max_size=5))
MESSAGES = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "assistant"]),
        CONTENT,
    ),
    min_size=1,
    max_size=30,
)
SYSTEM = st.one_of(st.sampled_from([None, "short", LONG]), st.lists(BLOCKS, max_size=3))
TOOLS = st.lists(st.sampled_from([TOOL, {**TOOL, "defer_loading": True}]), max_size=3)
BODIES = st.builds(
    lambda messages, system, tools: body(
        *messages,
        **({"system": system} if system is not None else {}),
        **({"tools": tools} if tools else {}),
    ),
    MESSAGES,
    SYSTEM,
    TOOLS,
)


def rendered(given: dict[str, Any]) -> list[Any]:
    """The prompt as the model reads it."""
    return [
        (
            block.section,
            block.role,
            block.opens,
            {name: value for name, value in block.content.items() if name != "cache_control"},
        )
        for block in prompt_blocks(given)
    ]


@settings(max_examples=deep(200, else_=40))
@given(given=BODIES, mode=st.sampled_from(["5m", "1h", "auto"]))
def test_marks_never_change_the_prompt_and_are_always_ones_that_the_api_takes(
    given: dict[str, Any], mode: str
) -> None:
    before = copy.deepcopy(given)
    marking = marked(given, mode)
    assert given == before
    if marking is None:
        return
    assert rendered(marking.body) == rendered(given)
    assert json.dumps(marking.body).count('"cache_control"') <= 4
    # Raises where the API answers 400.
    PromptCache().plan(tenant="t", body=marking.body, blocks=prompt_blocks(marking.body), at=0.0)
