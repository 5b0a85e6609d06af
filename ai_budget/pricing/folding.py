"""How many bytes a text can have, as it is or folded to its compatibility form (NFKC).

A tokenizer may fold a text first, in which one letter of three bytes can become eighteen letters.
Folding itself takes quadratic time for a run of combining marks, and a caller chooses the text, so
this adds up what each character can become, which is linear and never less:

- Folding decomposes each character on its own, puts marks in order, and composes pairs again. No
  composition of Unicode has more bytes than its two parts.
- Where no character can join the one before it, each is composed as if it stood alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import NamedTuple

EXACT = 4_000
"""Characters that grow, of one text, which are told apart; the rest are counted by their block."""

_LAST = 0x2FA1D
"""The last character that decomposes; none behind it joins another."""

_ASCII = bytes(range(0x80))
_NOT_FIRST = bytes(range(0xC0))
"""The bytes of UTF-8 with which no character outside ASCII begins."""
_FIRST_OF_FOUR = 0xF0
"""The first byte of a character behind the basic plane, of those that decompose or join."""


class _Growth(NamedTuple):
    """Characters that get longer, and by how many bytes of UTF-8."""

    pattern: re.Pattern[str]
    bytes_of: Mapping[str, int]
    most_by_first_byte: Mapping[int, int]


class _Plane(NamedTuple):
    """What becomes of the characters of the basic plane, or of those behind it.

    They are apart because the regular expressions of Python look a set up in a table only within
    the basic plane, and in a list behind it.
    """

    joining: re.Pattern[str]
    alone: _Growth
    beside_others: _Growth


def most_bytes(text: str) -> int:
    """Return at least the bytes of ``text`` in UTF-8, and at least those of its NFKC form.

    The time is linear in the text. Lone surrogates count three bytes.
    """
    if text.isascii():
        return len(text)
    data = text.encode("utf-8", "surrogatepass")
    rest = data.translate(None, _ASCII)
    letters = rest.decode("utf-8", "surrogatepass")
    planes = _planes() if _FIRST_OF_FOUR in rest else _planes()[:1]
    joined = any(plane.joining.search(letters) for plane in planes)
    return len(data) + sum(
        _growth(letters, plane.beside_others if joined else plane.alone) for plane in planes
    )


def _growth(letters: str, growth: _Growth) -> int:
    """Return the bytes that letters grow by: exact for the first of them, at most for the rest."""
    found: Counter[str] = Counter()
    end = 0
    for match in islice(growth.pattern.finditer(letters), EXACT):
        found[match[0]] += 1
        end = match.end()
    total = sum(growth.bytes_of[letter] * times for letter, times in found.items())
    if found.total() < EXACT:
        return total
    firsts = letters[end:].encode("utf-8", "surrogatepass").translate(None, _NOT_FIRST)
    return total + sum(
        firsts.count(first) * most for first, most in growth.most_by_first_byte.items()
    )


@cache
def _planes() -> Sequence[_Plane]:
    """Read what becomes of each character out of the Unicode data of this Python."""
    alone: dict[str, int] = {}
    beside_others: dict[str, int] = {}
    # The vowels and final consonants of Hangul join by a rule of their own.
    joining = set(map(chr, (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))))
    decomposable: list[str] = []
    for letter in map(chr, range(0x80, _LAST + 1)):
        if unicodedata.combining(letter):
            joining.add(letter)
        decomposition = unicodedata.decomposition(letter)
        if not decomposition:
            continue
        decomposable.append(letter)
        parts = decomposition.split()
        if len(parts) == 2 and not decomposition.startswith("<"):
            joining.add(chr(int(parts[1], 16)))
        size = _size(letter)
        if (composed := _size(unicodedata.normalize("NFKC", letter))) > size:
            alone[letter] = composed - size
        if (apart := _size(unicodedata.normalize("NFKD", letter))) > size:
            beside_others[letter] = apart - size
    joining.update(
        letter for letter in decomposable if unicodedata.normalize("NFKD", letter)[0] in joining
    )
    basic = _any_of(letter for letter in joining if letter <= "\uffff")
    behind = sorted(letter for letter in joining if letter > "\uffff")
    # As a range, which takes in some that do not join: the scripts, but no emoji.
    range_behind = re.compile(f"[{behind[0]}-{behind[-1]}]")
    return (
        _Plane(basic, *(_growing(of, behind=False) for of in (alone, beside_others))),
        _Plane(range_behind, *(_growing(of, behind=True) for of in (alone, beside_others))),
    )


def _growing(every: Mapping[str, int], *, behind: bool) -> _Growth:
    bytes_of = {letter: more for letter, more in every.items() if (letter > "\uffff") == behind}
    most: dict[int, int] = {}
    for letter, more in bytes_of.items():
        first = letter.encode()[0]
        most[first] = max(more, most.get(first, 0))
    return _Growth(pattern=_any_of(bytes_of), bytes_of=bytes_of, most_by_first_byte=most)


def _any_of(letters: Iterable[str]) -> re.Pattern[str]:
    return re.compile(f"[{re.escape(''.join(sorted(letters)))}]")


def _size(text: str) -> int:
    return len(text.encode())
