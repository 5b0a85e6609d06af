"""One attempt's life once it is reserved: booked by whatever became of it.

Nothing here waits for the network and nothing knows sync from async: the middleware calls one of
the ``book_...`` methods after it has sent.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from ai_budget import money, periods, signals
from ai_budget.exceptions import UnclassifiedUsage, UnpricedModel
from ai_budget.guard import turns
from ai_budget.guard.answers import Asking
from ai_budget.guard.charge import OpenCall
from ai_budget.guard.stream import ALLOWANCE_TOKENS, StreamedAnswer
from ai_budget.guard.telling import tell, tell_settled
from ai_budget.ledger.base import Ledger
from ai_budget.pricing.cost import cost, uncached
from ai_budget.pricing.rates import ModelRates, resolve
from ai_budget.pricing.usage import read_usage
from ai_budget.savings.prompt_cache import Marking
from ai_budget.values import (
    SITE,
    Attempt,
    Bound,
    Kind,
    Level,
    Measure,
    Reservation,
    Settlement,
    Status,
    Usage,
)

log = logging.getLogger("ai_budget")

_LEVEL_HEADERS: Mapping[Measure, tuple[str, ...]] = {
    Measure.REQUESTS: ("anthropic-ratelimit-requests",),
    Measure.TOKENS: ("anthropic-ratelimit-tokens", "anthropic-ratelimit-input-tokens"),
}
"""How the headers begin that say what a limit is and what is left of it, the most telling first.
https://platform.claude.com/docs/en/api/rate-limits#response-headers"""


@dataclass(slots=True, kw_only=True)
class OpenAttempt:
    """A reservation whose request is on its way, and all that booking it needs.

    ``asking`` is whoever waits for the same answer in the response cache; ``percent`` is the share
    of a limit that made the model a cheaper one, and ``window_end`` when that begins anew.
    ``context`` is the one of whoever made the request, which a stream may outlive.
    """

    ledger: Ledger
    reservation: Reservation
    rates: ModelRates
    bound: Bound
    body: dict[str, Any] = field(repr=False)
    call: OpenCall | None
    region: str
    started: float = field(default_factory=periods.monotonic)
    asking: Asking | None = None
    marking: Marking | None = None
    percent: int = 0
    window_end: datetime | None = None
    heard: Mapping[Measure, int] = field(default_factory=dict)
    heard_at: float = 0.0
    context: Context = field(default_factory=copy_context, repr=False)
    booked: bool = False
    lock: Any = field(default_factory=threading.Lock)

    @property
    def attempt(self) -> Attempt:
        return self.reservation.attempt

    def hear(self, headers: Mapping[str, str]) -> None:
        """Keep what an answer says of the organisation's limits, until it is booked.

        Anthropic limits each model by itself: a limit that is smaller than the site's own is
        about one model, and what is left of it says nothing about the others.
        """
        own = {it.measure: it.amount for it in self.reservation.buckets if it.scope == SITE}
        self.heard = {
            measure: remaining
            for measure, (limit, remaining) in _told(headers).items()
            if limit >= own.get(measure, 0)
        }
        self.heard_at = periods.monotonic()

    def book_unsent(self, reason: str) -> None:
        """Give everything back: the request never left."""
        self._book(
            Settlement(
                status=Status.RELEASED, cost_nanousd=0, error=reason, keep_call=False, tokens=0
            ),
            unbilled=True,
        )

    def book_lost(self, reason: str) -> None:
        """Book the bound: the request may have been answered, and nobody will know."""
        self._book(self._at_bound(reason))

    def book_rejected(self, status: int, request_id: str) -> None:
        """Book nothing: an answer that is no success costs nothing."""
        self._book(
            Settlement(
                status=Status.SETTLED,
                cost_nanousd=0,
                request_id=request_id,
                latency_ms=self._elapsed(),
                error=f"HTTP {status}",
                tokens=0,
            ),
            unbilled=True,
        )

    def book_message(self, message: Any, request_id: str) -> None:
        """Book an answer that was read whole."""
        usage = message.get("usage") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or not isinstance(usage, Mapping):
            self._book(self._at_bound("unreadable answer", request_id=request_id))
            return
        stop_reason = str(message.get("stop_reason") or "")
        content = message.get("content") or []
        self._remember_turn(_tool_use_ids(content))
        refused = stop_reason == "refusal" and not content
        self._book(
            self._of_usage(
                usage,
                answered=str(message.get("model") or ""),
                free=refused,
                stop_reason=stop_reason,
                request_id=request_id,
            ),
            message=message,
        )

    def book_stream(
        self, answer: StreamedAnswer, *, ended: bool, failure: str, request_id: str
    ) -> None:
        """Book a stream, whole or not."""
        self._remember_turn(answer.tool_use_ids)
        seen: dict[str, Any] = {
            "stop_reason": answer.stop_reason,
            "request_id": request_id,
            "first_token_ms": None
            if answer.first_token_at is None
            else self._elapsed(answer.first_token_at),
        }
        if answer.complete:
            refused = answer.stop_reason == "refusal" and not answer.blocks
            settlement = self._of_usage(answer.usage, answered=answer.model, free=refused, **seen)
            self._book(settlement, message=answer.message)
            return
        error = answer.error or failure or ("incomplete" if ended else "closed early")
        self._book(self._of_part(answer, error=error, seen=seen))

    def _remember_turn(self, tool_use_ids: list[str]) -> None:
        """Note who called tools, where another model would be asked with their results."""
        if self.downgraded or self._routed_from not in ("", self.attempt.model):
            turns.remember(self.attempt.model, tool_use_ids)

    @property
    def _routed_from(self) -> str:
        return "" if self.call is None else self.call.routed_from

    def _of_part(self, answer: StreamedAnswer, *, error: str, seen: dict[str, Any]) -> Settlement:
        """Book a stream that nobody read to its end: what is known, and what may be on its way.

        Bytes are at least as many as tokens. Where tokens may be hidden the bound is booked.
        """
        if not answer.begun or self._may_hide(answer):
            return self._at_bound(error, **seen)
        usage = dict(answer.usage)
        if not answer.final_usage:
            most = answer.shown_tokens + ALLOWANCE_TOKENS
            usage["output_tokens"] = min(most, self.bound.output_tokens)
        settlement = self._of_usage(usage, answered=answer.model, partly=True, **seen)
        return replace(
            settlement,
            status=Status.ESTIMATED,
            cost_nanousd=min(settlement.cost_nanousd, self.reservation.amounts.nanousd),
            error=error,
        )

    def _may_hide(self, answer: StreamedAnswer) -> bool:
        """Say whether tokens may have been made that the stream has not shown."""
        thinking = self.body.get("thinking")
        kind = thinking.get("type") if isinstance(thinking, Mapping) else None
        if kind == "disabled":
            thinks = False
        elif kind is None:
            # Some models think unasked; a first block that is not thinking says this did not.
            thinks = answer.thinking or not answer.blocks
        else:
            thinks = True
        hidden = thinks or self.bound.hidden or answer.unreadable or "iterations" in answer.usage
        return hidden and not answer.final_usage

    def _of_usage(
        self,
        raw: Mapping[str, Any],
        *,
        answered: str,
        free: bool = False,
        partly: bool = False,
        **seen: Any,
    ) -> Settlement:
        usage = Usage()
        saved, levers = 0, list[str]()
        try:
            usage = read_usage(raw)
            rates = self._rates_of(answered)
            spent = 0 if free else self._cost(rates, usage)
            plain = self._cost(rates, uncached(usage))
            if not free:
                saved, levers = self._saving(rates, usage, spent=spent, plain=plain)
        except (UnclassifiedUsage, UnpricedModel) as error:
            log.warning("A call to %s is booked at its bound: %s", self.attempt.model, error)
            return self._at_bound(type(error).__name__, usage=usage, **seen)
        self._book_marks(rates, usage, spent=spent, plain=plain, free=free, partly=partly)
        if usage.unclassified:
            log.warning("Usage has fields without a price rule: %s", ", ".join(usage.unclassified))
        return Settlement(
            status=Status.SETTLED,
            cost_nanousd=spent,
            usage=usage,
            latency_ms=self._elapsed(),
            tokens=usage.metered_tokens,
            saved_nanousd=saved,
            saved_reason=", ".join(levers),
            **seen,
        )

    def _book_marks(
        self, rates: ModelRates, usage: Usage, *, spent: int, plain: int, free: bool, partly: bool
    ) -> None:
        """Book what the marks cost and saved. Of a part only the prompt is known for sure."""
        if self.marking is None:
            return
        if free:
            self.marking.cancel()
            return
        if partly:
            prompt = replace(usage, output_tokens=0)
            spent, plain = self._cost(rates, prompt), self._cost(rates, uncached(prompt))
        self.marking.book(usage, cost_nanousd=spent, cost_plain_nanousd=plain)

    def _cost(self, rates: ModelRates, usage: Usage) -> int:
        return cost(rates, usage, at=self.attempt.reserved_at, region=self.region)

    def _saving(
        self, rates: ModelRates, usage: Usage, *, spent: int, plain: int
    ) -> tuple[int, list[str]]:
        """Return what the same tokens would have cost more without the levers, and which.

        ``plain`` is their cost without the prompt cache. A router's request is what routing costs.
        """
        attempt = self.attempt
        if attempt.kind is Kind.ROUTER:
            return -spent, ["routing"]
        asked = self._routed_from or attempt.requested_model
        levers = ["routing"] if asked != attempt.requested_model else []
        levers += ["downgrade"] if self.downgraded else []
        levers += ["prompt cache"] if plain != spent else []
        if asked != attempt.model and rates is self.rates:
            with suppress(UnpricedModel):
                instead = resolve(
                    asked, at=attempt.reserved_at, provider=attempt.provider, region=self.region
                )
                plain = self._cost(instead, uncached(usage))
        return plain - spent, levers

    def _rates_of(self, answered: str) -> ModelRates:
        """Return the prices of the model that answered: a fallback, where there are any.

        Elsewhere an answer names the model by another of its names, and never by its region.
        """
        if not self.body.get("fallbacks") or answered in ("", self.attempt.model):
            return self.rates
        return resolve(
            answered,
            at=self.attempt.reserved_at,
            provider=self.attempt.provider,
            region=self.region,
        )

    def _at_bound(self, error: str, **seen: Any) -> Settlement:
        return Settlement(
            status=Status.ESTIMATED,
            cost_nanousd=self.reservation.amounts.nanousd,
            latency_ms=self._elapsed(),
            error=error,
            **seen,
        )

    @property
    def downgraded(self) -> bool:
        """Whether another model answers than the one asked for."""
        return self.attempt.model != self.attempt.requested_model

    def _elapsed(self, until: float | None = None) -> int:
        return _milliseconds(self.started, periods.monotonic() if until is None else until)

    def _levels(self) -> tuple[Level, ...]:
        age = _milliseconds(self.heard_at, periods.monotonic())
        return tuple(
            Level(measure=measure, remaining=remaining, milliseconds_ago=age)
            for measure, remaining in self.heard.items()
        )

    def _book(self, settlement: Settlement, *, message: Any = None, unbilled: bool = False) -> None:
        """Settle once. What fails here is settled by the tick: the answer is not lost for it.

        ``message`` is a whole answer, for others who ask the same; ``unbilled`` says that nothing
        was used, so that nothing of what was set aside is.
        """
        with self.lock:
            if self.booked:
                return
            self.booked = True
        if unbilled and self.marking is not None:
            self.marking.cancel()
        settlement = replace(settlement, levels=self._levels())
        try:
            settled = self._settle(settlement)
        finally:
            self._pass_on(settlement, message)
        # Who listens may ask the same, and must not wait for this one.
        self._tell(settlement, settled=settled)

    def _pass_on(self, settlement: Settlement, message: Any) -> None:
        """Keep the answer for those who ask the same, or let one of them ask."""
        if self.asking is None:
            return
        if settlement.status is not Status.SETTLED or settlement.error:
            self.asking.give_up()
            return
        if not isinstance(message, Mapping):
            self.asking.cannot_keep()
            return
        left = math.inf
        if self.window_end is not None:
            left = (self.window_end - self.attempt.reserved_at).total_seconds()
            left -= periods.monotonic() - self.started
        self.asking.keep(message, left, cost=settlement.cost_nanousd, model=self.attempt.model)

    def _settle(self, settlement: Settlement) -> bool:
        """Book it in the ledger; say whether that worked."""
        if self.call is not None:
            self.call.settled.append((self.reservation, settlement))
            if not settlement.keep_call and self.reservation.amounts.calls:
                self.call.counted = False
        held = self.reservation.amounts.nanousd
        if settlement.cost_nanousd > held:
            log.error(
                "The bound of call %s was too low: %s were reserved and %s were spent.",
                self.reservation.id,
                money.format_usd(held, decimals=6),
                money.format_usd(settlement.cost_nanousd, decimals=6),
            )
        try:
            self.ledger.settle(self.reservation, settlement)
        except Exception as error:
            log.error(
                "Call %s could not be settled (%s); ai_budget_tick will book it.",
                self.reservation.id,
                type(error).__name__,
            )
            return False
        return True

    def _tell(self, settlement: Settlement, *, settled: bool) -> None:
        if self.downgraded and settlement.status is not Status.RELEASED:
            tell(
                signals.call_downgraded,
                sender=OpenAttempt,
                charge=self.attempt.charge,
                requested_model=self.attempt.requested_model,
                model=self.attempt.model,
                percent=self.percent,
            )
        if settled:
            tell_settled(self.reservation, settlement, sender=OpenAttempt, context=self.context)


def _tool_use_ids(content: Any) -> list[str]:
    return [
        str(block["id"])
        for block in content
        if isinstance(block, Mapping) and block.get("type") == "tool_use" and block.get("id")
    ]


def _milliseconds(since: float, until: float) -> int:
    return max(0, round((until - since) * 1000))


def _told(headers: Mapping[str, str]) -> dict[Measure, tuple[int, int]]:
    """Return each limit that the headers tell whole, and what is left of it."""
    found = {}
    for measure, names in _LEVEL_HEADERS.items():
        for name in names:
            said = headers.get(f"{name}-limit", ""), headers.get(f"{name}-remaining", "")
            if all(text.isdecimal() for text in said):
                limit, remaining = map(int, said)
                found[measure] = limit, remaining
                break
    return found
