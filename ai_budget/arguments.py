"""What callers say of a call is checked here, before anything is done with it.

A name that a database or Redis would not take has to fail as a mistake of the caller's. Found by
the store, it would look as if the store had failed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ai_budget.exceptions import InvalidArgument

LONGEST_FEATURE = 64
LONGEST_MODEL = 128
LONGEST_SUBJECT = 100
"""Characters that are kept of a subject, or of the key of a user; a comma counts as two."""
LONGEST_TAG = 200
"""Characters of a tag's name or value."""
MOST_TAGS = 32

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, which forge lines of a log, ends of lines, and halves of a character."""


def checked_text(value: Any, argument: str, *, most: int) -> str:
    """Return a text that every store and every log takes as it is.

    Raises ``InvalidArgument`` for what is no text, is longer than ``most`` characters, or has a
    control character or half of a surrogate pair in it.
    """
    if not isinstance(value, str):
        raise InvalidArgument(argument, f"has to be a text, not {type(value).__name__}.")
    if len(value) > most:
        raise InvalidArgument(argument, f"has {len(value):,} characters, and may have {most}.")
    found = _UNPRINTABLE.search(value)
    if found is not None:
        code = f"U+{ord(found[0]):04X}"
        raise InvalidArgument(argument, f"has a character that cannot be put on record: {code}.")
    return value


def checked_caller(value: Any, argument: str) -> str:
    """Return the name of a subject, or the key of a user, that fits where balances are kept.

    A comma is written twice there. Raises ``InvalidArgument``.
    """
    text = checked_text(value, argument, most=LONGEST_SUBJECT)
    if len(text) + text.count(",") > LONGEST_SUBJECT:
        raise InvalidArgument(
            argument, f"may have {LONGEST_SUBJECT} characters, and each comma counts as two."
        )
    return text


def checked_tags(tags: Mapping[Any, Any]) -> dict[str, str]:
    """Return the names and values of tags, all of them texts. Raises ``InvalidArgument``."""
    if len(tags) > MOST_TAGS:
        raise InvalidArgument("tags", f"are {len(tags)}, and may be {MOST_TAGS}.")
    return {
        checked_text(name, "The name of a tag", most=LONGEST_TAG): checked_text(
            value, f"The tag {name!r}", most=LONGEST_TAG
        )
        for name, value in tags.items()
    }
