"""Where ``trim`` cuts a conversation, and what it takes for one; no summaries here."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import anthropic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_budget.conversation import trim
from tests.conversation.talks import (
    WORDS,
    Talk,
    assert_sendable,
    calls,
    question,
    results,
    searches,
    talk,
    talks,
)

SECRET = "Plugh-4c1d"


def cut(messages: Any, **options: Any) -> Talk:
    """What is left, with the tightest steps."""
    return trim(messages, summarise=False, **{"step": 1, **options}).messages  # type: ignore[return-value]


def test_a_short_conversation_is_left_as_it_is() -> None:
    messages = talk(5)

    trimmed = trim(messages, keep=10, summarise=False)

    assert trimmed.messages == messages
    assert (trimmed.dropped, trimmed.saved_tokens, trimmed.reason) == (0, 0, "short")


def test_nothing_said_is_nothing_to_trim() -> None:
    assert trim([], summarise=False).messages == []


@pytest.mark.parametrize("keep", [1, 7, 8, 100])
def test_keeping_more_than_there_is_keeps_all(keep: int) -> None:
    messages = [*talk(1), question()]

    assert cut(messages, keep=keep) == (messages if keep > 1 else messages[2:])


def test_the_kept_part_begins_with_what_a_user_said() -> None:
    messages = talk(10)

    # The last three begin with an answer, so its question is kept too.
    assert cut(messages, keep=3) == messages[-4:]


def test_what_is_dropped_is_said() -> None:
    trimmed = trim(talk(10), keep=4, step=1, summarise=False)

    assert (trimmed.dropped, trimmed.summarised, trimmed.summary) == (16, 0, "")
    assert 16 * 20 < trimmed.saved_tokens < 16 * 26
    assert trimmed.reason == ""
    assert trimmed.cost == 0


def test_a_tool_call_stays_with_its_result() -> None:
    old = talk(3)
    turn = [question(), calls("a", "b"), results("b", "a"), calls("c"), results("c")]

    for keep in range(1, 6):
        assert cut([*old, *turn], keep=keep) == turn


def test_text_beside_a_tools_result_begins_no_turn() -> None:
    answered = results("a")
    answered["content"].append({"type": "text", "text": "and hurry"})
    turn = [question(), calls("a"), answered]

    assert cut([*talk(3), *turn], keep=1) == turn


def test_a_result_whose_call_is_gone_begins_no_turn() -> None:
    turn = [question(), {"role": "assistant", "content": "Let me see."}, results("lost")]

    assert cut([*talk(3), *turn], keep=1) == turn


def test_thinking_is_no_saving() -> None:
    thought = {"type": "thinking", "thinking": WORDS, "signature": "sig"}
    answer = {"role": "assistant", "content": [thought, {"type": "text", "text": WORDS}]}
    plain = {"role": "assistant", "content": WORDS}

    saved = [
        trim([question(), one, *talk(1)], keep=2, step=1, summarise=False).saved_tokens
        for one in (answer, plain)
    ]

    assert saved[0] == saved[1]


def test_a_call_that_waits_for_its_result_stays() -> None:
    turn = [question(), calls("a")]

    assert cut([*talk(3), *turn], keep=1) == turn


def test_a_result_that_comes_late_holds_its_call() -> None:
    turn = [question(), calls("a"), question("Hurry"), {"role": "assistant", "content": "Yes"}]
    late = [question("Well?"), calls("b"), results("a", "b")]

    assert cut([*talk(3), *turn, *late], keep=1) == [*turn, *late]


def test_a_servers_tool_does_not_hold_what_follows() -> None:
    last = [question("Thanks"), {"role": "assistant", "content": "Welcome"}]

    assert cut([question(), searches("s"), *last], keep=2) == last


def test_questions_in_a_row_are_one_turn() -> None:
    turn = [question("The first"), question("The second"), question("The third")]

    assert cut([*talk(3), *turn], keep=1) == turn


def test_instructions_in_the_middle_are_never_left_out() -> None:
    rule = {"role": "system", "content": "Be brief."}
    messages = [*talk(2), question(), rule, {"role": "assistant", "content": "Yes"}, *talk(8)]

    assert cut(messages, keep=2) == messages[4:]


def test_by_default_the_older_part_grows_by_as_many_as_are_kept() -> None:
    lengths = [len(trim(talk(turns), keep=4, summarise=False).messages) for turns in range(1, 9)]

    assert lengths == [2, 4, 6, 4, 6, 4, 6, 4]


@given(messages=talks(), keep=st.integers(1, 12), step=st.integers(1, 6))
def test_what_is_left_can_be_sent(messages: Talk, keep: int, step: int) -> None:
    trimmed = trim(messages, keep=keep, step=step, summarise=False)

    assert_sendable(trimmed.messages)
    # The same objects, and the last ones of them.
    kept = trimmed.messages
    assert [id(one) for one in kept] == [id(one) for one in messages[trimmed.dropped :]]
    assert len(kept) >= min(keep, len(messages))


@given(messages=talks(), keep=st.integers(1, 12), step=st.integers(1, 6))
def test_a_cut_stays_while_the_conversation_grows(messages: Talk, keep: int, step: int) -> None:
    cuts = [
        trim(messages[:length], keep=keep, step=step, summarise=False).dropped
        for length in range(1, len(messages) + 1)
    ]

    assert cuts == sorted(cuts)
    moves = [later - before for before, later in pairwise(cuts) if later > before]
    assert all(move >= step for move in moves)


def test_answers_of_the_sdk_are_messages() -> None:
    answer = anthropic.types.Message.model_validate(
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude-haiku-5-5",
            "content": [{"type": "text", "text": "Four."}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 1, "output_tokens": 1},
        }
    )
    messages = [question(), answer, question(), {"role": "assistant", "content": answer.content}]

    kept = cut([*talk(2), *messages], keep=4)

    assert kept[1] == kept[3] == {"role": "assistant", "content": answer.content}


def test_messages_may_come_from_an_iterator() -> None:
    assert cut(iter(talk(10)), keep=2) == talk(10)[-2:]


MALFORMED: dict[str, tuple[Any, type[Exception], str]] = {
    "no message": (SECRET, TypeError, r"messages\[2\] is no message but str"),
    "no role": ({"content": SECRET}, ValueError, r"messages\[2\] has no role"),
    "an unknown role": ({"role": SECRET, "content": "x"}, ValueError, r"messages\[2\] has no"),
    "no content": ({"role": "user"}, TypeError, r"messages\[2\] has neither"),
    "one block": ({"role": "user", "content": {"type": SECRET}}, TypeError, r"messages\[2\] has"),
    "no blocks": ({"role": "user", "content": [SECRET]}, TypeError, r"messages\[2\] has a block"),
    "no JSON": (
        {"role": "user", "content": [{"type": "text", "text": {SECRET}}]},
        TypeError,
        r"messages\[2\] is not JSON",
    ),
}


@pytest.mark.parametrize("mistake", MALFORMED)
def test_a_malformed_message_is_named_without_its_text(mistake: str) -> None:
    message, error, says = MALFORMED[mistake]

    with pytest.raises(error, match=says) as caught:
        trim([*talk(1), message])

    assert SECRET not in repr(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("messages", [WORDS, b"x", {"role": "user", "content": "x"}])
def test_one_message_is_no_conversation(messages: Any) -> None:
    with pytest.raises(TypeError, match="a list of messages"):
        trim(messages)


@pytest.mark.parametrize("name", ["keep", "step", "summary_tokens"])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_counts_are_whole_and_above_zero(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        trim(talk(1), **{name: value})
