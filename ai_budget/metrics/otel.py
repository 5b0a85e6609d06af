"""What OpenTelemetry is told of a booking: the SDK's own span of it, and three metrics.

The SDK makes a span of every call, with its model and tokens; it is told here what it cost, and
who paid. No span is made of our own: it would be the same request twice. Without a configured
OpenTelemetry all of this does nothing.
"""

from __future__ import annotations

from contextvars import Context
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Any

import ai_budget
from ai_budget import money
from ai_budget.exceptions import AIBudgetError
from ai_budget.metrics import names
from ai_budget.values import Attempt, Charge, Reservation, Settlement, Status

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter
    from opentelemetry.trace import Span


def tell_settled(
    *,
    reservation: Reservation,
    settlement: Settlement,
    context: Context | None,
    **kwargs: object,
) -> None:
    """Record a booking; a receiver of ``call_settled``."""
    instruments = instruments_in_use()
    if instruments is None:
        return
    instruments.record(reservation.attempt, settlement)
    span = None if context is None else context.run(_span_of_a_call)
    if span is not None:
        describe(span, reservation.attempt, settlement)


def tell_refused(*, charge: Charge, error: AIBudgetError, **kwargs: object) -> None:
    """Record a refusal; a receiver of ``call_refused``."""
    instruments = instruments_in_use()
    if instruments is None:
        return
    reason = type(error).__name__
    instruments.refusals.add(1, {names.FEATURE: charge.feature, names.ERROR_TYPE: reason})
    span = _span_of_a_call()
    if span is not None:
        span.set_attributes({names.FEATURE: charge.feature, names.REFUSED: reason})


class Instruments:
    """Our metrics of one meter. Their labels are features and models, never who called."""

    def __init__(self, meter: Meter) -> None:
        self.tokens = meter.create_histogram(
            names.TOKEN_USAGE,
            unit="{token}",
            description="Tokens of a settled request; those of the prompt cache are input, too.",
            explicit_bucket_boundaries_advisory=names.TOKEN_BUCKETS,
        )
        self.duration = meter.create_histogram(
            names.OPERATION_DURATION,
            unit="s",
            description="How long a request to the API took.",
            explicit_bucket_boundaries_advisory=names.SECOND_BUCKETS,
        )
        self.cost = meter.create_counter(
            names.COST,
            unit="{USD}",
            description="What requests cost. An estimate may be followed by the truth: tell them "
            "apart by their status.",
        )
        self.calls = meter.create_counter(
            names.CALLS, unit="{call}", description="Bookings, answers from the cache among them."
        )
        self.refusals = meter.create_counter(
            names.REFUSALS, unit="{call}", description="Calls that this site itself refused."
        )

    def record(self, attempt: Attempt, settlement: Settlement) -> None:
        """Record one booking. An answer from the cache is a call, and no request to the API."""
        own = {
            names.OPERATION_NAME: names.CHAT,
            names.PROVIDER_NAME: names.PROVIDERS.get(attempt.provider, attempt.provider),
            names.REQUEST_MODEL: attempt.requested_model,
            names.RESPONSE_MODEL: attempt.model,
            names.FEATURE: attempt.charge.feature,
            names.KIND: attempt.kind.value,
        }
        status = {**own, names.STATUS: settlement.status.value}
        self.calls.add(1, status)
        if settlement.cost_nanousd:
            self.cost.add(float(money.to_usd(settlement.cost_nanousd)), status)
        usage = settlement.usage
        if settlement.status is Status.SETTLED and usage.total_tokens:
            self.tokens.record(usage.prompt_tokens, {**own, names.TOKEN_TYPE: names.INPUT})
            self.tokens.record(usage.output_tokens, {**own, names.TOKEN_TYPE: names.OUTPUT})
        if settlement.latency_ms is not None and settlement.status is not Status.CACHED:
            error = {names.ERROR_TYPE: settlement.error} if settlement.error else {}
            self.duration.record(settlement.latency_ms / 1000, {**own, **error})


@cache
def instruments_in_use() -> Instruments | None:
    """Return our instruments; None where OpenTelemetry is not installed.

    They do nothing until a provider of metrics is configured, and then record, whenever that is.
    """
    try:
        from opentelemetry import metrics
    except ImportError:
        return None
    return Instruments(metrics.get_meter(names.SCOPE, ai_budget.__version__))


def describe(span: Span, attempt: Attempt, settlement: Settlement) -> None:
    """Tell the span of a call about one of its attempts, which cost something together."""
    before = _dollars(span, names.COST_USD)
    saved = _dollars(span, names.SAVED_USD)
    usage = settlement.usage
    written = usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
    span.set_attributes(
        {
            names.CALL_ID: str(attempt.call_id),
            names.FEATURE: attempt.charge.feature,
            names.KIND: attempt.kind.value,
            names.STATUS: settlement.status.value,
            names.MODEL: attempt.model,
            names.DECISION: attempt.decision,
            names.DOWNGRADED: attempt.model != attempt.requested_model,
            names.CACHED: settlement.status is Status.CACHED,
            names.COST_USD: float(before + money.to_usd(settlement.cost_nanousd)),
            names.SAVED_USD: float(saved + money.to_usd(settlement.saved_nanousd)),
            # The SDK has another name for it.
            **({names.CACHE_CREATION_INPUT_TOKENS: written} if written else {}),
        }
    )


def _dollars(span: Span, name: str) -> Decimal:
    """Return what a span says already: the text of a float this small has every nano-dollar."""
    return Decimal(repr(_attributes(span).get(name, 0.0)))


def _span_of_a_call() -> Span | None:
    """Return the current span, if it is that of a call to a model and can still be told anything.

    Where the SDK makes none it is somebody else's, of a whole page perhaps.
    """
    from opentelemetry import trace

    span = trace.get_current_span()
    called = span.is_recording() and names.REQUEST_MODEL in _attributes(span)
    return span if called else None


def _attributes(span: Span) -> Any:
    return getattr(span, "attributes", None) or {}
