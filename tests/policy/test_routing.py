"""Which model does the job: the cheapest that will do, and none dearer than was asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import anthropic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_budget.policy import routing
from ai_budget.policy.routing import Question, Route
from ai_budget.testing import AnthropicSimulator, Reply

HAIKU, SONNET, OPUS = "claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5"
OLD = "claude-opus-4-8"
TIERS = (HAIKU, SONNET, OPUS)
LENGTHS = (1_000, 8_000)
SECRET = "zanzibar"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def question(*messages: dict[str, Any], choices: Sequence[str] = TIERS, **given: Any) -> Question:
    return Question(feature="chat", choices=tuple(choices), messages=messages, **given)


def anything(model: str) -> bool:
    return True


# Which models may answer -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (OPUS, (HAIKU, SONNET, OPUS)),
        (SONNET, (HAIKU, SONNET)),
        (HAIKU, (HAIKU,)),
        (OLD, (HAIKU, SONNET, OPUS, OLD)),
    ],
)
def test_the_tiers_below_the_model_asked_for_may_answer(
    asked: str, expected: tuple[str, ...]
) -> None:
    assert routing.candidates(asked, TIERS, takes=anything) == expected


def test_a_tier_that_is_dearer_or_does_not_take_the_request_is_left_out() -> None:
    assert routing.candidates(OPUS, TIERS, takes=lambda model: model != HAIKU) == (SONNET, OPUS)


def test_the_model_asked_for_is_a_choice_whatever_it_takes() -> None:
    assert routing.candidates(SONNET, TIERS, takes=lambda model: False) == (SONNET,)


def test_a_tier_that_is_named_twice_is_one_choice() -> None:
    assert routing.candidates(OPUS, (HAIKU, HAIKU), takes=anything) == (HAIKU, OPUS)


@pytest.mark.parametrize("tiers", [(), [HAIKU]])
def test_tiers_may_be_any_sequence(tiers: Sequence[str]) -> None:
    assert routing.candidates(OPUS, tiers, takes=anything) == (*tiers, OPUS)


# When a router may choose ------------------------------------------------------------------------

RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "22 degrees"}


@pytest.mark.parametrize(
    "messages",
    [
        [user("How tall is an oak?")],
        [user([text("How tall is an oak?")])],
        [user("Hi"), assistant("Hello"), user("How tall is an oak?")],
        [user([RESULT]), assistant("22 degrees."), user("And tomorrow?")],
        [user("How tall is an oak?"), {"role": "system", "content": "Be brief."}],
    ],
)
def test_a_new_question_may_be_routed(messages: list[dict[str, Any]]) -> None:
    assert routing.may_route(messages, {"tools": [], "thread": None})


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([user("Weather?"), user([RESULT])], id="a tool's result"),
        pytest.param([user([RESULT, text("Go on.")])], id="a tool's result with words"),
        pytest.param(
            [user([RESULT]), {"role": "system", "content": "Be brief."}], id="a note after it"
        ),
        pytest.param([user("Weather?"), assistant("It is")], id="begun by the assistant"),
        pytest.param([], id="nothing"),
    ],
)
def test_within_a_turn_the_model_is_kept(messages: list[dict[str, Any]]) -> None:
    assert not routing.may_route(messages, {})


@pytest.mark.parametrize("kind", ["create", "continue"])
def test_within_a_thread_the_model_is_kept(kind: str) -> None:
    assert not routing.may_route([user("Hi")], {"thread": {"type": kind}})


# How long a question is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "tokens"),
    [
        ([user("")], 0),
        ([user("four")], 1),
        ([user("fives")], 2),
        ([user("éé")], 1),
        ([user([text("four"), text("four")])], 2),
        ([user("four"), assistant("four"), user("four")], 3),
        ([user([{**text("four"), "cache_control": {"type": "ephemeral", "ttl": "1h"}}])], 1),
        ([user([{"type": "image", "source": {"type": "base64", "data": "A" * 90_000}}])], 1_600),
        ([user([{"type": "document", "source": {"type": "text", "data": "four"}}])], 1),
        ([assistant([{"type": "tool_use", "id": "t", "name": "four", "input": {"n": 1}}])], 1),
        ([user([{**RESULT, "content": [text("four")]}])], 1),
    ],
)
def test_four_bytes_of_text_are_about_a_token(messages: list[dict[str, Any]], tokens: int) -> None:
    assert question(*messages).tokens == tokens


def test_blocks_of_the_sdk_are_measured_as_their_json() -> None:
    block = anthropic.types.TextBlock(type="text", text="four")

    assert question(user("four"), assistant([block]), user("four")).tokens == 3


@pytest.mark.parametrize(
    "block",
    [
        {"type": "document", "source": {"type": "base64", "data": "JVBERi0="}},
        {"type": "document", "source": {"type": "url", "url": "https://example.com/a.pdf"}},
        {"type": "document", "source": {"type": "file", "file_id": "file_1"}},
        {"type": "container_upload", "file_id": "file_1"},
    ],
)
def test_what_is_in_a_file_or_elsewhere_has_no_known_length(block: dict[str, Any]) -> None:
    assert question(user([block, text("Summarise.")])).tokens is None


def test_the_system_prompt_and_the_tools_are_no_part_of_the_length() -> None:
    asked = question(user("four"), system="x" * 4_000, params={"tools": [{"name": "y" * 400}]})

    assert asked.tokens == 1


# By length ---------------------------------------------------------------------------------------


def by_length(tokens: int | None, choices: Sequence[str] = TIERS, **given: Any) -> str:
    settings: dict[str, Any] = {"tiers": TIERS, "lengths": LENGTHS, **given}
    return routing.by_length(tokens, choices, **settings).model


@pytest.mark.parametrize(
    ("tokens", "model"),
    [(0, HAIKU), (1_000, HAIKU), (1_001, SONNET), (8_000, SONNET), (8_001, OPUS), (10**9, OPUS)],
)
def test_each_tier_answers_up_to_its_length(tokens: int, model: str) -> None:
    assert by_length(tokens) == model


def test_the_route_says_how_long_the_prompt_is() -> None:
    route = routing.by_length(1_312, TIERS, tiers=TIERS, lengths=LENGTHS)

    assert route == Route(model=SONNET, reason="length: about 1,312 tokens")


def test_an_unknown_length_leaves_the_model() -> None:
    route = routing.by_length(None, TIERS, tiers=TIERS, lengths=LENGTHS)

    assert route == Route(model=OPUS, reason="length: not known")


def test_where_a_tier_is_no_choice_the_next_dearer_answers_in_its_place() -> None:
    """Never a cheaper one, whose own length is shorter."""
    assert [by_length(tokens, [SONNET, OPUS]) for tokens in (500, 5_000)] == [SONNET, SONNET]
    assert [by_length(tokens, [HAIKU, OPUS]) for tokens in (500, 5_000)] == [HAIKU, OPUS]


def test_a_model_outside_the_tiers_answers_what_is_longer_than_all_lengths() -> None:
    choices = (*TIERS, OLD)

    assert [by_length(tokens, choices) for tokens in (1, 5_000, 9_000)] == [HAIKU, SONNET, OLD]


def test_with_fewer_lengths_the_model_asked_for_answers_the_rest() -> None:
    assert [by_length(tokens, lengths=[1_000]) for tokens in (1_000, 1_001)] == [HAIKU, OPUS]


def test_with_more_lengths_than_tiers_the_others_mean_nothing() -> None:
    given: dict[str, Any] = {"tiers": (HAIKU,), "lengths": (1_000, 8_000, 64_000)}

    assert [by_length(n, (HAIKU, OPUS), **given) for n in (1_000, 1_001, 9_000)] == [
        HAIKU,
        OPUS,
        OPUS,
    ]


def test_without_lengths_nothing_is_routed() -> None:
    assert by_length(1, lengths=()) == OPUS


def test_of_lengths_in_disorder_the_first_that_is_enough_decides() -> None:
    assert by_length(500, lengths=(100, 5_000)) == SONNET
    assert by_length(50, lengths=(5_000, 100)) == HAIKU


models = st.sampled_from(["a", "b", "c", "d", "e"])
lengths = st.lists(st.integers(1, 10_000), max_size=6).map(sorted)


@given(models, st.lists(models, unique=True), st.sets(models), lengths, st.data())
def test_a_longer_prompt_is_never_answered_by_a_cheaper_model(
    asked: str, tiers: list[str], taking: set[str], lengths: list[int], data: st.DataObject
) -> None:
    choices = routing.candidates(asked, tiers, takes=lambda model: model in taking)
    less, more = sorted(data.draw(st.tuples(st.integers(0, 20_000), st.integers(0, 20_000))))

    shorter, longer = (
        by_length(tokens, choices, tiers=tiers, lengths=lengths) for tokens in (less, more)
    )

    assert choices.index(shorter) <= choices.index(longer)


# By a classifier: what is asked ------------------------------------------------------------------


def described(asked: Question) -> dict[str, Any]:
    request = routing.classification(asked, model=HAIKU)
    data: dict[str, Any] = json.loads(request["messages"][0]["content"])
    return data


def test_the_classifier_answers_with_a_level_in_a_few_tokens() -> None:
    request = routing.classification(question(user("How tall is an oak?")), model=HAIKU)

    output = request["output_config"]["format"]
    assert request["model"] == HAIKU
    assert output["type"] == "json_schema"
    assert output["schema"] == {
        "type": "object",
        "properties": {"level": {"type": "string", "enum": ["simple", "moderate", "hard"]}},
        "required": ["level"],
        "additionalProperties": False,
    }
    longest = max(len(json.dumps({"level": level})) for level in routing.LEVELS)
    assert longest <= request["max_tokens"] == 32
    assert request["thinking"] == {"type": "disabled"}


def test_between_two_models_there_are_two_levels() -> None:
    request = routing.classification(question(user("Hi"), choices=[HAIKU, OPUS]), model=HAIKU)

    schema = request["output_config"]["format"]["schema"]
    assert schema["properties"]["level"]["enum"] == ["simple", "hard"]


def test_a_short_prompt_is_shown_whole() -> None:
    shown = described(question(user("How tall is an oak?"), system="You know trees."))

    assert shown["request_begins"] == "How tall is an oak?"
    assert shown["request_ends"] == ""
    assert shown["system_begins"] == "You know trees."


def test_of_a_long_prompt_the_beginning_and_the_end_are_shown() -> None:
    shown = described(question(user("a" * 2_000 + "b" * 50_000 + "c" * 2_000)))

    assert shown["request_characters"] == 54_000
    assert shown["request_begins"] == "a" * 2_000
    assert shown["request_ends"] == "c" * 2_000


def test_the_last_question_is_shown_with_the_end_of_the_answer_before() -> None:
    shown = described(
        question(
            user("first"),
            assistant("b" * 50_000 + "Shall I rewrite the scheduler?"),
            user([text("Yes"), text("please")]),
        )
    )

    assert shown["request_begins"] == "Yes\nplease"
    assert shown["answer_before_ends"].endswith("Shall I rewrite the scheduler?")
    assert len(shown["answer_before_ends"]) == 1_000
    assert shown["messages"] == 3


def test_images_documents_and_tools_are_named() -> None:
    shown = described(
        question(
            user([{"type": "image"}, {"type": "document"}, {"type": "image"}, text("Compare.")]),
            params={"tools": [{"name": "search"}, {"type": "web_search_20260209"}]},
        )
    )

    assert shown["attachments"] == ["document", "image"]
    assert shown["tools"] == ["search", "web_search_20260209"]


@given(
    st.text(), st.one_of(st.none(), st.text(), st.lists(st.text().map(text))), st.text(min_size=1)
)
def test_no_text_can_leave_its_quotation(words: str, system: Any, before: str) -> None:
    """The classifier's message is one JSON object with the same keys, whatever the texts are."""
    shown = described(question(assistant(before), user(words), system=system))

    assert list(shown) == list(described(question(user("Hi"))))
    assert shown["request_characters"] == len(words)


def test_what_is_not_text_for_the_wire_is_replaced() -> None:
    assert described(question(user("half \ud83d")))["request_begins"] == "half ?"


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_the_classifiers_request_stays_small(size: int) -> None:
    asked = question(
        user("a" * size),
        assistant("b" * size),
        user("c" * size),
        system="d" * size,
        params={"tools": [{"name": "e" * size}] * 100},
    )

    request = routing.classification(asked, model=HAIKU)

    assert len(json.dumps(request)) < 10_000


def test_the_local_api_and_the_sdk_take_the_request(anthropic_api: AnthropicSimulator) -> None:
    asked = question(user("How tall is an oak?"))
    anthropic_api.enqueue(Reply(text='{"level":"moderate"}'))
    client = anthropic.Anthropic(base_url=anthropic_api.base_url, api_key="any", max_retries=0)

    with client:
        message = client.messages.create(**routing.classification(asked, model=HAIKU))

    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens <= routing.CLASSIFIER_TOKENS
    assert routing.read_level(message.model_dump(mode="json")) == "moderate"


# By a classifier: what it is worth ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("classifier", "asked", "cheapest", "worth"),
    [(99, 200, 100, True), (100, 200, 100, False), (101, 200, 100, False), (0, 100, 100, False)],
)
def test_a_classifier_is_asked_where_it_costs_less_than_it_can_save(
    classifier: int, asked: int, cheapest: int, worth: bool
) -> None:
    decision = routing.is_worth_asking(classifier, asked_nanousd=asked, cheapest_nanousd=cheapest)

    assert decision is worth


def test_a_classifier_that_is_skipped_leaves_the_model_and_says_so() -> None:
    route = routing.not_worth_asking(TIERS)

    assert route.model == OPUS
    assert "skipped" in route.reason


# By a classifier: what it answered ---------------------------------------------------------------


@pytest.mark.parametrize("level", routing.LEVELS)
def test_a_level_is_read_from_text_and_from_a_message(level: str) -> None:
    answer = json.dumps({"level": level})

    assert routing.read_level(answer) == level
    assert routing.read_level({"content": [text(answer)], "stop_reason": "end_turn"}) == level


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "hard",
        '"hard"',
        '["hard"]',
        '{"level":"har',
        '{"level":"easy"}',
        '{"level":0}',
        '{"level":["hard"]}',
        '{"level":{}}',
        '{"level":"hard","because":"it says so"}',
        '{"tier":"hard"}',
        "{}",
        "null",
        "[" * 100_000,
    ],
)
def test_anything_else_is_no_level(answer: str) -> None:
    assert routing.read_level(answer) is None


def test_a_message_without_text_has_no_level() -> None:
    assert routing.read_level({"content": [], "stop_reason": "refusal"}) is None
    assert routing.read_level({}) is None


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([HAIKU, SONNET, OPUS], [HAIKU, SONNET, OPUS]),
        ([HAIKU, OPUS], [HAIKU, OPUS, OPUS]),
        ([HAIKU, SONNET, OPUS, OLD], [HAIKU, OPUS, OLD]),
        ([OPUS], [OPUS, OPUS, OPUS]),
    ],
)
def test_each_level_has_a_model(choices: list[str], expected: list[str]) -> None:
    routes = [routing.by_level(level, choices) for level in routing.LEVELS]

    assert [route.model for route in routes] == expected
    assert [route.reason for route in routes] == [
        "classifier: simple",
        "classifier: moderate",
        "classifier: hard",
    ]


@pytest.mark.parametrize("level", [None, "", "easy"])
def test_no_level_leaves_the_model(level: str | None) -> None:
    route = routing.by_level(level, TIERS)

    assert route == Route(model=OPUS, reason="classifier: no clear answer")


# By a callable -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "model"), [(HAIKU, HAIKU), (OPUS, OPUS), (0, HAIKU), (1, SONNET), (2, OPUS)]
)
def test_a_callable_names_or_numbers_a_choice(result: Any, model: str) -> None:
    route = routing.by_callable(result, TIERS)

    assert route == Route(model=model, reason=f"callable: {model}")


def test_a_callable_without_a_preference_leaves_the_model() -> None:
    assert routing.by_callable(None, TIERS) == Route(model=OPUS, reason="callable: no preference")


@pytest.mark.parametrize("result", [OLD, SECRET, 3, -1, True, False, 1.0, "0", [HAIKU], b"x"])
def test_whatever_is_no_choice_leaves_the_model_and_is_not_quoted(result: Any) -> None:
    route = routing.by_callable(result, TIERS)

    assert route.model == OPUS
    assert route.reason == f"callable: no choice ({type(result).__name__})"


def test_a_callable_sees_the_question() -> None:
    asked = question(user("first"), assistant("so"), user("How tall is an oak?"))

    assert (asked.text, asked.asked, asked.choices) == ("How tall is an oak?", OPUS, TIERS)
    assert asked.feature == "chat"


# What may go wrong -------------------------------------------------------------------------------


def test_a_router_that_fails_leaves_the_model_and_quotes_nothing() -> None:
    route = routing.failed(TimeoutError(SECRET), TIERS)

    assert route == Route(model=OPUS, reason="router failed (TimeoutError)")


def test_a_question_is_not_shown_by_its_repr() -> None:
    asked = question(user(SECRET), system=SECRET, params={"metadata": SECRET})

    assert SECRET not in repr(asked)


@given(
    st.lists(models, min_size=1, unique=True),
    st.one_of(st.none(), st.text(), st.integers(), models, st.booleans(), st.sampled_from(TIERS)),
)
def test_every_router_answers_with_a_choice(choices: list[str], result: Any) -> None:
    routes = [
        routing.by_callable(result, choices),
        routing.by_level(routing.read_level(str(result)), choices),
        routing.failed(ValueError(), choices),
        routing.not_worth_asking(choices),
    ]

    assert all(route.model in choices and route.reason for route in routes)
