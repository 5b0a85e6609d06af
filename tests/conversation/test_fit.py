"""``fit``: the best chunks that fit, by a measure that is on the safe side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_budget.conversation import fit, text_tokens
from ai_budget.testing import tokens as local

SECRET = "Plugh-4c1d"
CHUNKS = st.lists(st.text(max_size=60), max_size=12)


@dataclass(frozen=True)
class Found:
    """What a search returns."""

    text: str
    score: float


def test_the_first_are_the_best() -> None:
    fitted = fit(["one two", "three four", "five six"], max_tokens=8)

    # Two tokens, four, three; two for the blank line between.
    assert [text_tokens(one) for one in ("one two", "three four", "five six", "\n\n")] == [
        2,
        4,
        3,
        2,
    ]
    assert fitted.chunks == ("one two", "three four")
    assert fitted.text == str(fitted) == "one two\n\nthree four"
    assert (fitted.tokens, fitted.saved_tokens) == (8, 3)


def test_one_that_is_too_large_leaves_room_for_smaller_ones() -> None:
    assert fit(["one", "word " * 100, "two"], max_tokens=10).chunks == ("one", "two")


def test_separators_take_room_too() -> None:
    assert fit(["one two", "three four", "x"], max_tokens=7).chunks == ("one two", "x")


def test_text_and_score_keep_the_given_order() -> None:
    found = [Found("worse", 0.1), Found("better", 0.9)]

    fitted = fit(found, max_tokens=9, text=lambda it: it.text, score=lambda it: it.score)

    assert fitted.text == "worse\n\nbetter"


def test_one_too_many_by_a_token_is_left_out() -> None:
    assert fit(["one two", "three four"], max_tokens=7).chunks == ("one two",)


def test_the_best_by_score_stay_in_their_order() -> None:
    found = [Found("low", 0.1), Found("high", 0.9), Found("mid", 0.5)]

    fitted = fit(found, max_tokens=5, text=lambda it: it.text, score=lambda it: it.score)

    assert fitted.chunks == (found[1], found[2])
    assert fitted.text == "high\n\nmid"
    assert fit(
        found[::-1], max_tokens=2, text=lambda it: it.text, score=lambda it: it.score
    ).chunks == (found[1],)


def test_of_equal_scores_the_first_is_better() -> None:
    assert fit(["one", "two"], max_tokens=1, score=lambda _: 1).chunks == ("one",)


def test_equal_and_blank_texts_are_kept_once_and_never() -> None:
    fitted = fit(["one", " \n", "one", ""], max_tokens=100)

    assert (fitted.text, fitted.tokens) == ("one", 1)
    assert fitted.saved_tokens == text_tokens("one") + text_tokens(" \n")


def test_of_equal_texts_the_best_is_kept() -> None:
    found = [Found("one", 0.1), Found("one", 0.9)]

    fitted = fit(found, max_tokens=9, text=lambda it: it.text, score=lambda it: it.score)

    assert fitted.chunks == (found[1],)


def test_nothing_fits_in_nothing() -> None:
    fitted = fit(["one", "two"], max_tokens=0)

    assert (fitted.chunks, fitted.text, fitted.tokens, fitted.saved_tokens) == ((), "", 0, 2)


def test_the_measure_and_the_separator_may_be_others() -> None:
    fitted = fit(iter(["one", "two", "three"]), max_tokens=7, tokens=len, separator="-")

    assert (fitted.text, fitted.tokens, fitted.saved_tokens) == ("one-two", 7, 5)


def test_a_measure_that_finds_more_in_the_whole_is_believed() -> None:
    def costly_whole(text: str) -> int:
        return len(text.split()) ** 2

    fitted = fit(["a", "b", "c"], max_tokens=5, tokens=costly_whole)

    assert (fitted.chunks, fitted.tokens) == (("a", "b"), 4)


@given(chunks=CHUNKS, max_tokens=st.integers(0, 60), separator=st.text(max_size=3))
def test_what_is_kept_fits(chunks: list[str], max_tokens: int, separator: str) -> None:
    fitted = fit(chunks, max_tokens=max_tokens, separator=separator)

    assert fitted.tokens == text_tokens(fitted.text) <= max_tokens
    assert fitted.text == separator.join(fitted.chunks)
    kept = iter(chunks)
    assert all(one in kept for one in fitted.chunks)  # in the order they were given
    assert fitted.saved_tokens == sum(map(text_tokens, chunks)) - sum(
        map(text_tokens, fitted.chunks)
    )


@given(chunks=CHUNKS)
def test_all_of_them_fit_where_there_is_room(chunks: list[str]) -> None:
    fitted = fit(chunks, max_tokens=100_000)

    assert fitted.chunks == tuple(dict.fromkeys(one for one in chunks if one.strip()))


SAMPLES: dict[str, tuple[str, int]] = {
    # What Anthropic's tokenizers make of it at most, where it is known, else a floor by hand.
    "greeting": ("hello, world", 4),
    "digits": ("3141592653", 10),
    "table": ('{"a":1,"b":[2,3]}', 17),
    "letters": ("a b c d e", 5),
    "emoji": ("\U0001f600\U0001f600", 6),
    "chinese": ("你好", 4),
    "lines": ("a\n\n\nb", 5),
    "indented": ("if x:\n        y", 6),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_measure_is_on_the_safe_side(sample: str) -> None:
    text, least = SAMPLES[sample]

    assert text_tokens(text) >= least


def test_prose_is_measured_within_twice_the_average() -> None:
    prose = "It was a bright cold day in April, and the clocks were striking thirteen. " * 20

    assert local.text_tokens(prose) <= text_tokens(prose) <= 2 * local.text_tokens(prose)


@pytest.mark.parametrize("text", ["\ud800", "a\ud800b", "\x00", "\r\n", "e\u0301", "\u200d"])
def test_every_text_has_a_size(text: str) -> None:
    assert 1 <= text_tokens(text) <= len(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_max_tokens_is_a_whole_number(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_tokens"):
        fit(["one"], max_tokens=value)


def test_a_chunk_without_a_text_is_named_without_what_it_says() -> None:
    chunks: list[Any] = [SECRET, (SECRET, 0.5)]

    with pytest.raises(
        TypeError, match=r"chunks\[1\] is no text but tuple. Say with text="
    ) as caught:
        fit(chunks, max_tokens=9)

    assert SECRET not in str(caught.value)


def test_a_text_that_is_none_is_named() -> None:
    nothing: Any = None

    with pytest.raises(TypeError, match=r"chunks\[0\] is no text but NoneType.$"):
        fit(["one"], max_tokens=9, text=lambda _: nothing)


@pytest.mark.parametrize(
    ("score", "error"), [(math.nan, ValueError), ("0.9", TypeError), (None, TypeError)]
)
def test_a_score_is_a_number(score: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"chunks\[0\]"):
        fit(["one"], max_tokens=9, score=lambda _: score)


def test_what_was_found_is_in_no_repr() -> None:
    assert SECRET not in repr(fit([SECRET], max_tokens=100))
