"""One line of the log for every booking, with fields that a machine can read.

The fields are attributes of the record, under names that begin with ``ai_budget_`` so that they
clash with nothing of the standard library. No text of a prompt or an answer is among them.
"""

from __future__ import annotations

import logging
from typing import Any

from ai_budget import money
from ai_budget.values import Reservation, Settlement

PREFIX = "ai_budget_"

log = logging.getLogger("ai_budget.calls")


def write_line(*, reservation: Reservation, settlement: Settlement, **kwargs: object) -> None:
    """Write the line of a booking; a receiver of ``call_settled``.

    Where nobody listens to the logger at INFO it is not even put together.
    """
    if not log.isEnabledFor(logging.INFO):
        return
    attempt = reservation.attempt
    log.info(
        "%s %s: %s %s for %s",
        attempt.charge.feature,
        attempt.kind.value,
        attempt.model,
        settlement.status.value,
        money.format_usd(settlement.cost_nanousd, decimals=6),
        extra={PREFIX + name: value for name, value in fields(reservation, settlement).items()},
    )


def fields(reservation: Reservation, settlement: Settlement) -> dict[str, Any]:
    """Return what the line says, by names without their prefix, in types that JSON has.

    Amounts are whole nano-dollars, and the cost in dollars also as a text: none is ever a float.
    """
    attempt, usage = reservation.attempt, settlement.usage
    charge = attempt.charge
    user_id = charge.user_id
    return {
        "call_id": str(attempt.call_id),
        "attempt": attempt.number,
        "reservation": reservation.id,
        "status": settlement.status.value,
        "kind": attempt.kind.value,
        "feature": charge.feature,
        "category": attempt.category,
        "user_id": user_id if user_id is None or isinstance(user_id, int) else str(user_id),
        "subject": charge.subject,
        "tags": dict(charge.tags),
        "provider": attempt.provider,
        "model": attempt.model,
        "requested_model": attempt.requested_model,
        "downgraded": attempt.model != attempt.requested_model,
        "decision": attempt.decision,
        "cost_usd": f"{money.to_usd(settlement.cost_nanousd):f}",
        "cost_nanousd": settlement.cost_nanousd,
        "reserved_nanousd": reservation.amounts.nanousd,
        "saved_nanousd": settlement.saved_nanousd,
        "saved_reason": settlement.saved_reason,
        "input_tokens": usage.input_tokens,
        "cache_write_5m_tokens": usage.cache_write_5m_tokens,
        "cache_write_1h_tokens": usage.cache_write_1h_tokens,
        "cache_read_tokens": usage.cache_read_tokens,
        "output_tokens": usage.output_tokens,
        "thinking_tokens": usage.thinking_tokens,
        "web_searches": usage.web_searches,
        "max_tokens": attempt.max_tokens,
        "service_tier": usage.service_tier,
        "speed": usage.speed or attempt.speed,
        "inference_geo": usage.inference_geo or attempt.inference_geo,
        "stop_reason": settlement.stop_reason,
        "request_id": settlement.request_id,
        "reserved_at": attempt.reserved_at.isoformat(),
        "latency_ms": settlement.latency_ms,
        "first_token_ms": settlement.first_token_ms,
        "error": settlement.error,
    }
