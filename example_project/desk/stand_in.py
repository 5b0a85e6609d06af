"""What the local stand-in for Claude says at this desk.

The words are written by hand; that they are counted, priced and held to a budget is real.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ai_budget.testing.steps import Reply
from example_project.desk import samples

_CHUNK_DELAY = 0.05  # seconds between two pieces of a stream: about the pace of reading
_TINY_ANSWERS = {
    "colour": "Apricot, just before it turns to plum.",
    "bird": "The nightingale, and in towns the robin too.",
    "tree": "The yew, which keeps its needles for eight years.",
}
_HONEST = """\
I am the local stand-in for Claude, so I have no answer to “{question}”. But I can tell you what \
has just happened to your question, for that part is real.

Before it was sent, the most it could cost was worked out from its length and set aside in every \
budget that it counts against: yours, the feature’s, the reading room’s and the whole site’s. Had \
one of them been too full, you would be reading a refusal now, and nothing would have been spent.

These words reach you piece by piece. Press Stop, and the connection behind this page is closed: \
what was written until then is booked, with a little for what was on its way.

When I am done, the tokens are counted, their exact price is booked, and what was set aside beyond \
it goes back. Your receipt says how much it was. With a key of the real API you would get a better \
answer, by the same rules."""


# A word of each kind of note, the first of which that it has decides.
_KINDS = {
    "thank": "thanks",
    "patient": "thanks",
    "flicker": "repair",
    "scream": "repair",
    "missing": "repair",
    "buy": "wish",
    "get something": "wish",
    "should like to read": "wish",
    "open": "hours",
    "close": "hours",
    "keep": "lending",
    "borrow": "lending",
    "returned": "lending",
}


def item_reply(custom_id: str, params: Mapping[str, Any]) -> Reply:
    """Answer an item of a batch."""
    return reply(params, chunk_delay=0)


def reply(body: Mapping[str, Any], *, chunk_delay: float = _CHUNK_DELAY) -> Reply:
    """Answer a request of one of the desk's pages."""
    prompt = _last_text(body)
    if _is_to_sort(body):
        text = _sorted(prompt)
    elif prompt.startswith("Summarise this text"):
        text = _shorten(prompt)
    elif prompt in samples.ANSWERS:
        text = samples.ANSWERS[prompt]
    else:
        small = [answer for word, answer in _TINY_ANSWERS.items() if f"Name a {word}" in prompt]
        text = small[0] if small else _HONEST.format(question=_quoted(prompt))
    return Reply(text=text, chunk_delay=chunk_delay)


def _is_to_sort(body: Mapping[str, Any]) -> bool:
    return str(body.get("system", "")).startswith("You sort the notes")


def _sorted(note: str) -> str:
    """Sort a note by its words: how a tired librarian does it."""
    return next((kind for word, kind in _KINDS.items() if word in note.lower()), "other")


def _shorten(prompt: str) -> str:
    """Keep the first sentence of each paragraph: how a hurried reader summarises."""
    wish, _, text = prompt.partition("\n\n")
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    sentences = [re.split(r"(?<=[.!?])\s", part, maxsplit=1)[0] for part in paragraphs]
    if "one sentence" in wish:
        return sentences[0] if sentences else text
    if "three points" in wish:
        return "\n".join(f"• {sentence}" for sentence in sentences[:3])
    return " ".join(sentences)


def _last_text(body: Mapping[str, Any]) -> str:
    messages = body.get("messages") or [{}]
    content = messages[-1].get("content", "")
    if isinstance(content, str):
        return content.strip()
    return " ".join(str(block.get("text", "")) for block in content).strip()


def _quoted(prompt: str) -> str:
    words = " ".join(prompt.split())
    return words if len(words) <= 80 else words[:79] + "…"
