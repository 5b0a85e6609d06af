"""The best of what could go into a prompt, as much as fits. Pure: nothing is asked or spent."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from django.views.decorators.debug import sensitive_variables

from ai_budget.conversation.turns import check_count

Chunk = TypeVar("Chunk")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted(Generic[Chunk]):
    """The chunks that fit, in the order they were given, and their ``text`` put together.

    ``tokens`` is the size of the text, ``saved_tokens`` that of the chunks left out.
    """

    chunks: tuple[Chunk, ...] = field(repr=False)
    text: str = field(repr=False)
    tokens: int
    saved_tokens: int

    def __str__(self) -> str:
        return self.text


@sensitive_variables()
def fit(
    chunks: Iterable[Chunk],
    *,
    max_tokens: int,
    text: Callable[[Chunk], str] | None = None,
    score: Callable[[Chunk], float] | None = None,
    tokens: Callable[[str], int] | None = None,
    separator: str = "\n\n",
) -> Fitted[Chunk]:
    """Keep the best chunks whose text, put together, has at most ``max_tokens`` tokens.

    The first are the best, or those of the highest ``score``; one that is too large is left
    out and others may still fit. Of equal texts the best is kept, blank ones never. ``text``
    says what the text of a chunk is where it is no text itself. ``tokens`` measures a text; the
    measure of its own is on the safe side for prose, code and tables (``text_tokens``). Spends
    nothing. Raises ``TypeError`` or ``ValueError`` for chunks without a text or a score.
    """
    check_count("max_tokens", max_tokens, least=0)
    measure = tokens or text_tokens
    given = list(chunks)
    texts = [_text_of(chunk, index, text) for index, chunk in enumerate(given)]
    sizes = [measure(one) for one in texts]
    between = measure(separator) if separator else 0
    chosen: list[int] = []
    seen: set[str] = set()
    left = max_tokens + between  # one separator fewer than chunks
    for index in _best_first(given, score):
        if not texts[index].strip() or texts[index] in seen or sizes[index] + between > left:
            continue
        chosen.append(index)
        seen.add(texts[index])
        left -= sizes[index] + between
    # A measure may find more in the whole than in its parts.
    while measure(whole := separator.join(texts[index] for index in sorted(chosen))) > max_tokens:
        if not chosen:
            break
        chosen.pop()
    return Fitted(
        chunks=tuple(given[index] for index in sorted(chosen)),
        text=whole,
        tokens=measure(whole) if chosen else 0,
        saved_tokens=sum(sizes) - sum(sizes[index] for index in chosen),
    )


_PARTS = re.compile(r"[A-Za-z]+|[^\S\n]+|.", re.DOTALL)

_LETTERS_A_TOKEN = 3


def text_tokens(text: str) -> int:
    """Return an estimate of the tokens of a text, on the safe side for every usual kind of it.

    A token for every three letters of a word begun, for every digit, sign and line break, and
    for every byte but one of any other character; none for the spaces between words. Prose
    has about a third less.
    """
    return sum(_part_tokens(part) for part in _PARTS.findall(text))


def _part_tokens(part: str) -> int:
    if not part.isascii():
        return sum(max(1, len(one.encode("utf-8", "surrogatepass")) - 1) for one in part)
    if part.isalpha():
        return -(-len(part) // _LETTERS_A_TOKEN)
    if part.isspace():
        # The space before a word is part of it; indentation is not.
        return len(part) - 1 if part != "\n" else 1
    return 1


def _text_of(chunk: Any, index: int, text: Callable[[Any], str] | None) -> str:
    found = chunk if text is None else text(chunk)
    if not isinstance(found, str):
        hint = "" if text else " Say with text= what its text is."
        raise TypeError(f"chunks[{index}] is no text but {type(found).__name__}.{hint}")
    return found


def _best_first(chunks: Sequence[Any], score: Callable[[Any], float] | None) -> Sequence[int]:
    if score is None:
        return range(len(chunks))
    scores = [score(chunk) for chunk in chunks]
    for index, one in enumerate(scores):
        if isinstance(one, str) or not hasattr(one, "__float__"):
            raise TypeError(f"The score of chunks[{index}] is no number.")
        if math.isnan(one):
            raise ValueError(f"The score of chunks[{index}] is not a number.")
    return sorted(range(len(chunks)), key=lambda index: -scores[index])
