"""Which model a name means, taken as a whole, in the spelling of every platform.

The price library looks at how a name begins, so it would price ``claude-haiku-4-5-turbo`` as
``claude-haiku-4-5``. A name is one of a known model only if nothing of it is left over.
https://platform.claude.com/docs/en/about-claude/models/overview
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_SUFFIX = r"(?:[-@](?:\d{8}|\d{4}-\d\d-\d\d|latest|default))?(?:-v\d{1,2}(?::\d{1,3}k?){0,2})?"
"""A date, or another word for the newest, and Bedrock's version."""

_NAME = re.compile(
    # Where it is: an address of Bedrock or of Google Cloud, and Bedrock's geography.
    r"(?:arn:aws[a-z-]*:bedrock:[a-z0-9-]*:\d*:[a-z-]+/)?(?:publishers/anthropic/models/)?"
    r"(?:[a-z]+(?:-gov)?\.)?(?:anthropic[./])?"
    # The family with the version behind or, of older models, in front of it.
    r"claude-(?:(?P<family>[a-z]+)-(?P<version>\d{1,2}(?:[.-]\d{1,2})?)"
    r"|(?P<version_first>\d{1,2}(?:[.-]\d{1,2})?)-(?P<family_last>[a-z]+))" + _SUFFIX,
    re.ASCII,
)


def means(name: str, known: Any) -> bool:
    """Say whether a name means a model of ``genai-prices``, in one of its spellings."""
    model = _family_and_version(name)
    if model is None:
        return bool(name == known.id)
    return any(_family_and_version(text) == model for text in (known.id, *_texts(known.match)))


def is_spelling_of(name: str, base: str) -> bool:
    """Say whether a name is another, as it is or with a date or version behind it."""
    return name.startswith(base) and re.fullmatch(_SUFFIX, name[len(base) :], re.ASCII) is not None


def _family_and_version(name: str) -> tuple[str, str, str] | None:
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    version = found["version"] or found["version_first"]
    major, _, minor = version.replace(".", "-").partition("-")
    return found["family"] or found["family_last"], major, minor or "0"


def _texts(clause: Any) -> Iterator[str]:
    """Yield the names that a rule of the library looks for."""
    for kind in ("equals", "starts_with", "ends_with", "contains"):
        text = getattr(clause, kind, None)
        if text is not None:
            yield text
    for part in (*getattr(clause, "or_", ()), *getattr(clause, "and_", ())):
        yield from _texts(part)
