"""The models the simulated API knows, and the documented limits of each."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

LISTED_MODELS = (
    "claude-fable-5-2",
    "claude-mythos-5-2",
    "claude-haiku-5-5",
    "claude-sonnet-5-5",
    "claude-fable-5-1",
    "claude-opus-5-5",
    "claude-mythos-5-1",
    "claude-sonnet-5",
    "claude-fable-5",
    "claude-mythos-5",
    "claude-opus-5",
    "claude-opus-4-8",
    "claude-opus-4-7",
    "claude-mythos-preview",
    "claude-opus-4-6",
    "claude-sonnet-4-6",
    "claude-haiku-4-5-20251001",
    "claude-opus-4-5-20251101",
    "claude-sonnet-4-5-20250929",
)

_LINE = re.compile(r"haiku|sonnet|opus|fable|mythos")
_VERSION = re.compile(r"(?<=-)(\d{1,2})(?:-(\d{1,2}))?(?!\d)")

# "Cache limitations" on platform.claude.com/docs/en/build-with-claude/prompt-caching, autumn 2026.
# The page's other models follow from `_minimum_cached_prefix`.
_MINIMUM_CACHED_PREFIX = {
    ("opus", (4, 5)): 4_096,
    ("opus", (4, 6)): 4_096,
    ("opus", (4, 7)): 2_048,
    ("haiku", (4, 5)): 4_096,
    ("haiku", (3, 5)): 2_048,
    ("haiku", (3, 0)): 2_048,
    ("mythos", None): 2_048,  # claude-mythos-preview
    ("sonnet", (5, 0)): 1_024,
}


class ModelLimits(NamedTuple):
    """What one model accepts, all in tokens."""

    context_window: int
    max_output: int
    minimum_cached_prefix: int
    largest_image: int


@lru_cache(maxsize=256)
def limits_of(model: str) -> ModelLimits:
    """The limits of `model`; an unknown one has those of the newest generation."""
    line = _LINE.search(model)
    found = _VERSION.search(model)
    version = (int(found[1]), int(found[2] or 0)) if found else None
    generation = version or (5, 0)
    small = generation <= (4, 5)
    return ModelLimits(
        context_window=200_000 if small else 1_000_000,
        max_output=64_000 if small else 128_000,
        minimum_cached_prefix=_minimum_cached_prefix(line[0] if line else "", version),
        # Images are seen in finer detail from Opus 4.7 on.
        largest_image=4_784 if generation >= (4, 7) else 1_568,
    )


def is_claude(model: str) -> bool:
    """Whether the simulated API serves `model`: any name with "claude" in it."""
    return "claude" in model


def describe(model: str) -> dict[str, Any]:
    """`model` as the models endpoints show it."""
    line = _LINE.search(model)
    limits = limits_of(model)
    return {
        "type": "model",
        "id": model,
        "display_name": _display_name(model),
        # The API's own stand-in for a release date it does not know.
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
        "line": line[0] if line else None,
        "deprecated_at": None,
        "retires_at": None,
        "max_input_tokens": limits.context_window,
        "max_tokens": limits.max_output,
        "capabilities": None,
    }


def _minimum_cached_prefix(line: str, version: tuple[int, int] | None) -> int:
    tabled = _MINIMUM_CACHED_PREFIX.get((line, version))
    if tabled is not None:
        return tabled
    # Fable 5.2 and Mythos 5.2 are not on the page: they take the 512 of 5.1 and of the rest of
    # the fifth generation. What is older and not tabled stands there with 1,024.
    return 1_024 if version is not None and version < (5, 0) else 512


def _display_name(model: str) -> str:
    words = re.sub(r"-\d{8}$", "", model)
    words = re.sub(r"(\d)-(\d)", r"\1.\2", words)
    return " ".join(word.capitalize() for word in words.split("-"))
