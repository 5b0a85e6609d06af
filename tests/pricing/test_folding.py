"""How long a text can get: never less than folding it makes it, in time linear in the text."""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_budget.pricing import folding
from ai_budget.pricing.folding import EXACT, most_bytes
from tests.depth import deep

ALL = [chr(number) for number in range(0x80, 0x110000) if not 0xD800 <= number < 0xE000]
GROWING = sorted({letter for plane in folding._planes() for letter in plane.beside_others.bytes_of})
JOINING = [
    letter for letter in ALL if any(plane.joining.match(letter) for plane in folding._planes())
]
LETTERS = st.one_of(
    st.sampled_from(GROWING),
    st.sampled_from(JOINING),
    st.sampled_from("aeo \uac00\ud55c\xe4\xe8\xe7\u1ea1\u1e69"),
    st.characters(),
)

MEGABYTE = {
    "one letter under marks": "a" + "\u0301\u0327" * 250_000,
    "letters under thirty marks": ("a" + "\u0301\u0327" * 15) * 16_000,
    "letters that grow most": "\ufdfa" * 330_000,
    "letters under marks": "\u1ec7\u0301" * 200_000,
    "Chinese": "\u6c49\u5b57\uff0c" * 110_000,
    "Korean": "\ud55c\uae00 " * 140_000,
    "emoji": "\U0001f600" * 250_000,
    "enclosed letters": "\U0001f110" * 250_000,
    "surrogates": "\ud800" * 330_000,
}


def folded_bytes(text: str) -> int:
    forms = (text, unicodedata.normalize("NFKC", text))
    return max(len(form.encode("utf-8", "surrogatepass")) for form in forms)


@settings(max_examples=deep(20_000, else_=1_000))
@given(st.text(LETTERS, max_size=12))
def test_no_text_has_more_bytes_folded(text: str) -> None:
    assert most_bytes(text) >= folded_bytes(text)


@given(st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_long_text_has_more_bytes_folded(texts: list[str]) -> None:
    """What is behind the letters that are told apart is counted by its block."""
    # Nothing joins a digit, so the pieces can be folded one by one.
    pieces = [f"{text}0" for text in texts]

    grown = sum(folded_bytes(unicodedata.normalize("NFKC", piece)) for piece in pieces)
    assert most_bytes("".join(piece * EXACT for piece in pieces)) >= grown * EXACT


@pytest.mark.parametrize(
    "text",
    ["", "plain", "d\xe9j\xe0 vu", "\u6c49\u5b57\uff0c", "\ud55c\uae00", "\U0001f600", "\ufdfa"],
)
def test_it_is_exact_where_nothing_joins(text: str) -> None:
    assert most_bytes(text) == folded_bytes(text)


def test_nothing_behind_the_last_letter_that_is_looked_at_decomposes_or_joins() -> None:
    behind = [letter for letter in ALL if ord(letter) > folding._LAST]

    assert not any(map(unicodedata.decomposition, behind))
    assert not any(map(unicodedata.combining, behind))


def test_no_composition_has_more_bytes_than_its_parts() -> None:
    """On which the sum of what each letter becomes alone relies."""
    for letter in ALL:
        apart = unicodedata.normalize("NFD", letter)
        assert len(unicodedata.normalize("NFC", apart).encode()) <= len(apart.encode()), letter


@pytest.mark.parametrize("text", MEGABYTE.values(), ids=MEGABYTE)
def test_a_megabyte_of_anything_takes_a_bounded_number_of_steps(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step outside the loop over ``EXACT`` letters is one pass of the interpreter's own."""
    folding._planes()
    monkeypatch.setattr(folding, "unicodedata", None)
    steps: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        steps[event] += 1

    sys.setprofile(count)
    try:
        most_bytes(text)
    finally:
        sys.setprofile(None)

    assert steps.total() < 10 * EXACT


def test_a_long_text_that_grows_is_not_counted_as_if_all_grew_most() -> None:
    text = "\u1ec7\u0301" * 3 * EXACT

    assert most_bytes(text) <= 4 * folded_bytes("\u1ec7\u0301") * 3 * EXACT
