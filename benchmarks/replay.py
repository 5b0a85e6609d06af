"""What the levers do to the bill of a trace, on a simulated clock and without HTTP.

    python -m benchmarks.replay [--trace FILE] [--shapes]

A trace is recognised by its columns, and may be gzipped:

- ``timestamp``, ``input_length``, ``output_length``, ``hash_ids`` (JSON lines): prompt caching,
  and then every lever by itself and all together (``benchmarks.levers``).
- Date, Query, IsImplicitIntent, Country, PopularityScore (TSV): the response cache.

For prompt caching the code that decides in a site decides here too, on Django's cache in memory,
beside reference policies: never mark, always, on the second touch, and one that knows what
comes. Bills are relative to naive, which is no caching. "worst" is the highest that the bill was
at any time, relative to naive's at that time: promised is 1.01.

The constants of ``ai_budget.savings.prompt_reuse`` were chosen on the first 20 minutes of one
trace of conversations, and the kinds of positions by a look at what came again in its first 40.
So its first 20 minutes, the rest, and what comes after 40 minutes ("unseen") are printed apart.
Texts are taken to have four bytes a token, so that four times the tokens are set aside before a
write; until the first one can be paid for, calls cost what they cost without caching.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.stage import configure

if TYPE_CHECKING:
    from ai_budget.savings.prompt_reuse import Position
    from benchmarks import prompts

CHOSEN_ON_SECONDS = 20 * 60
LOOKED_AT_SECONDS = 40 * 60
BYTES_PER_TOKEN = 4
BEGINS = 1_800_000_000.0  # a moment like any other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--shapes", action="store_true", help="replay traces of other shapes too")
    options = parser.parse_args()
    configure("sqlite")
    if options.trace is not None and _columns(options.trace).startswith("Date\t"):
        from benchmarks.lookups import replay_queries

        replay_queries(options.trace)
        return
    if options.trace is not None:
        _replay_blocks(options.trace)
    if options.shapes or options.trace is None:
        _replay_shapes()


def _columns(path: Path) -> str:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as file:
        return str(file.readline())


def _replay_blocks(path: Path) -> None:
    from benchmarks import prompts
    from benchmarks.levers import replay_levers

    trace = prompts.read_blocks(path)
    naive = [prompt.plain_nanousd for prompt in trace]
    print(f"prompt caching: {len(trace)} requests over {trace[-1].at / 60:.0f} minutes")
    print(f"  constants chosen on the first {CHOSEN_ON_SECONDS // 60} minutes,", end="")
    print(f" kinds on the first {LOOKED_AT_SECONDS // 60}; reported apart")
    print(f"  {'':24}   whole   first    rest  unseen   worst")
    split = [sum(one.at < end for one in trace) for end in (CHOSEN_ON_SECONDS, LOOKED_AT_SECONDS)]
    for name, bills in _references(trace).items():
        _print_split(name, bills, naive, split)
    began = time.perf_counter()
    bills = auto(trace)
    taken = (time.perf_counter() - began) / len(trace)
    _print_split("auto", bills, naive, split)
    print(f"  (auto took {taken * 1e6:.0f} microseconds a request, cache and booking included)")
    replay_levers(trace, auto)
    print("five times over, with other prompts of the same shape each time:")
    _print_whole(prompts.repeated(trace, 5, anew=True))
    print("five times over, with the same prompts each time:")
    _print_whole(prompts.repeated(trace, 5, anew=False))


def _replay_shapes() -> None:
    from benchmarks import prompts

    for name, trace in prompts.shapes():
        print(f"{name}: {len(trace)} requests")
        _print_whole(trace)


def _print_split(name: str, bills: Sequence[int], naive: Sequence[int], split: list[int]) -> None:
    chosen, looked = split
    parts = (slice(None), slice(None, chosen), slice(chosen, None), slice(looked, None))
    ratios = "  ".join(f"{sum(bills[part]) / max(sum(naive[part]), 1):6.4f}" for part in parts)
    print(f"  {name:24}  {ratios}  {_worst(bills, naive):6.4f}")


def _print_whole(trace: list[prompts.Prompt]) -> None:
    naive = [prompt.plain_nanousd for prompt in trace]
    whole = sum(naive)
    references = {name: sum(bills) / whole for name, bills in _references(trace).items()}
    bills = auto(trace)
    ratio = sum(bills) / whole
    cheapest = min(value for name, value in references.items() if "clairvoyant" not in name)
    print("  " + ", ".join(f"{name} {value:.4f}" for name, value in references.items()))
    print(f"  auto {ratio:.4f}, {ratio / cheapest:.4f} of the cheapest that knows nothing", end="")
    print(f"; worst {_worst(bills, naive):.4f}", flush=True)


def _worst(bills: Sequence[int], naive: Sequence[int]) -> float:
    sums = zip(itertools.accumulate(bills), itertools.accumulate(naive), strict=True)
    return max(bill / max(plain, 1) for bill, plain in sums)


def _references(trace: list[prompts.Prompt]) -> dict[str, list[int]]:
    from benchmarks import prompts

    found = {"never": prompts.bill(trace, prompts.never, prompts.MINUTES)}
    for said, lifetime in (("5m", prompts.MINUTES), ("1h", prompts.HOUR)):
        found |= {
            f"always {said}": prompts.bill(trace, prompts.always, lifetime),
            f"second touch {said}": prompts.bill(trace, prompts.second_touch(lifetime), lifetime),
            f"clairvoyant {said}": prompts.bill(
                trace, prompts.clairvoyant(trace, lifetime), lifetime
            ),
        }
    return found


def auto(trace: Sequence[prompts.Prompt]) -> list[int]:
    """Return what each prompt costs under a site's policy, booked as it is billed."""
    from django.core.cache import cache
    from django.test import override_settings

    from ai_budget.savings.prompt_cache import decide
    from ai_budget.savings.prompt_reuse import HOUR, Prices
    from ai_budget.values import Usage
    from benchmarks import prompts

    memory = {
        "BACKEND": "django.core.cache.backends.locmem.LocMemCache",
        "LOCATION": "replay",
        "OPTIONS": {"MAX_ENTRIES": 10**8},
    }
    api, bills, prices = prompts.ApiCache(), [], Prices(rates=(prompts.PER,))
    with override_settings(CACHES={"default": memory}):
        cache.clear()
        for prompt in trace:
            positions, ends = _positions(prompt)
            decision = decide(
                positions,
                prices=prices,
                minimum=prompts.MINIMUM_TOKENS,
                feature="replay",
                at=BEGINS + prompt.at,
            )
            assert decision is not None
            marked = {
                ttl: max((ends[m.index] for m in decision.plan.marks if m.ttl == ttl), default=0)
                for ttl in ("1h", "5m")
            }
            billed = api.bill(prompt, hour=marked[HOUR], minutes=marked["5m"])
            bills.append(billed.nanousd(prompt.output))
            usage = Usage(
                input_tokens=billed.plain,
                cache_read_tokens=billed.read,
                cache_write_5m_tokens=billed.written_5m,
                cache_write_1h_tokens=billed.written_1h,
                output_tokens=prompt.output,
            )
            decision.book(usage, cost_nanousd=bills[-1], cost_plain_nanousd=prompt.plain_nanousd)
        cache.clear()
    return bills


def _positions(prompt: prompts.Prompt) -> tuple[list[Position], list[int]]:
    """Return the positions that a site would look at, and the blocks before the end of each."""
    from ai_budget.savings.prompt_prefixes import FIRST, LAST
    from ai_budget.savings.prompt_reuse import Position

    count = len(prompt.ids)
    kept = [index for index in range(count) if index < FIRST or index >= count - LAST]
    positions, before = [], 0
    for index in kept:
        tokens = sum(prompt.tokens[before : index + 1])
        before = index + 1
        positions.append(
            Position(
                fingerprint=prompt.ids[index].replace(" ", "_"),
                expected=tokens,
                most=tokens * BYTES_PER_TOKEN,
                part="e" if index == count - 1 else "m",
            )
        )
    return positions, [index + 1 for index in kept]


if __name__ == "__main__":
    main()
