"""The levers one at a time and together, on a trace of prompts without texts.

The feature asks for the dearest of three tiers whose prices differ by a factor only (as Haiku
5.5, Sonnet 5 and Opus 5 do), so that a bill at one is a bill at another, scaled:

- response cache: whole prompts that are equal, shared for an hour, through the real store;
- routing: by length, with the default lengths; what the answers are worth is not measured;
- prompt cache: "auto", learning in each model for itself, as the API's cache is the model's;
- batches: half of every price, if all answers could wait.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import TYPE_CHECKING

from ai_budget.conf import DEFAULTS
from ai_budget.policy.routing import by_length

if TYPE_CHECKING:
    from benchmarks.prompts import Prompt

TIERS = ("haiku", "sonnet", "opus")
SCALE = dict(zip(TIERS, (Fraction(1, 20), Fraction(1), Fraction(5, 2)), strict=True))
KEPT_SECONDS = 3_600.0
BATCH = Fraction(1, 2)
_BEGINS = datetime(2026, 1, 1, tzinfo=UTC)

Auto = Callable[[Sequence["Prompt"]], list[int]]


def replay_levers(trace: Sequence[Prompt], auto: Auto) -> None:
    """Print the bill of each lever by itself, and of all together, relative to naive."""
    asked = TIERS[-1]
    naive = _plain(trace, asked)
    paid = _not_answered_from_cache(trace)
    routed = _routed(trace)
    paid_and_routed = _routed(paid)
    print("each lever by itself, and together, relative to naive:")
    print(f"  {'response cache':24}  {_share(_plain(paid, asked), naive)}")
    print(f"  {'routing by length':24}  {_share(_of_models(routed, _plain_bills), naive)}")
    print(f"  {'prompt cache auto':24}  {_share(SCALE[asked] * sum(auto(trace)), naive)}")
    together = _of_models(paid_and_routed, auto)
    print(f"  {'the three together':24}  {_share(together, naive)}")
    print(f"  {'batches':24}  {_share(BATCH * naive, naive)}")
    print(f"  {'all together':24}  {_share(BATCH * together, naive)}", flush=True)


def _plain(trace: Sequence[Prompt], model: str) -> Fraction:
    return SCALE[model] * sum(_plain_bills(trace))


def _plain_bills(trace: Sequence[Prompt]) -> list[int]:
    return [prompt.plain_nanousd for prompt in trace]


def _share(bill: Fraction, naive: Fraction) -> str:
    return f"{float(bill / naive):6.4f}"


def _of_models(routed: dict[str, list[Prompt]], bills: Auto) -> Fraction:
    return sum((SCALE[model] * sum(bills(own)) for model, own in routed.items()), Fraction(0))


def _routed(trace: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Return each model's prompts, as routing by length sends them."""
    routed: dict[str, list[Prompt]] = {}
    for prompt in trace:
        route = by_length(
            sum(prompt.tokens), TIERS, tiers=TIERS, lengths=DEFAULTS["ROUTING_LENGTHS"]
        )
        routed.setdefault(route.model, []).append(prompt)
    return routed


def _not_answered_from_cache(trace: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts that the response cache has no answer for."""
    from django.core.cache import cache
    from django.test import override_settings

    from ai_budget.savings.response_cache import Claim, Kept, claim, look_up, place_of

    memory = {
        "BACKEND": "django.core.cache.backends.locmem.LocMemCache",
        "LOCATION": "levers",
        "OPTIONS": {"MAX_ENTRIES": 10**8},
    }
    asked = []
    with override_settings(CACHES={"default": memory}):
        for prompt in trace:
            at = _BEGINS + timedelta(seconds=prompt.at)
            question = {"blocks": prompt.ids, "tokens": prompt.tokens}
            place = place_of(question, scope="shared", feature="replay", owner=(), versions=())
            assert place is not None
            if look_up(place, at=at, ttl=KEPT_SECONDS) is not None:
                continue
            asked.append(prompt)
            right = claim(place, at=at, seconds=1)
            assert isinstance(right, Claim)
            message = json.dumps({"stop_reason": "end_turn"})
            kept = Kept(message=message, cost_nanousd=0, model="", kept_at=at)
            right.store(kept, seconds=KEPT_SECONDS)
        cache.clear()
    return asked
