"""What becomes of the items of a batch: booked once, whoever reads their results, and how often.

An item is over in the transaction that books it. So results may come twice, in any order, to
two workers at once, or again after a worker has died: what is over is passed by.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any

from django.db import connections
from django.db.models import F, Q

from ai_budget import money
from ai_budget.conf import conf
from ai_budget.exceptions import UnclassifiedUsage, UnpricedModel
from ai_budget.guard.batch.preparing import BYTES_AT_ONCE
from ai_budget.guard.batch.rows import ROWS_AT_ONCE, attempt_of, reservation_row
from ai_budget.guard.overdue import tell_overdue
from ai_budget.guard.telling import tell_parts
from ai_budget.ledger import base as ledgers
from ai_budget.ledger import journal as journals
from ai_budget.ledger.connection import patient_transaction, retry
from ai_budget.ledger.journal import DEADLINE_PASSED
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallLog, CallText
from ai_budget.pricing.cost import cost, uncached
from ai_budget.pricing.rates import ModelRates, resolve
from ai_budget.pricing.usage import read_usage
from ai_budget.values import Charge, Part, Settlement, Status, Usage

log = logging.getLogger("ai_budget")

_TEXTS_AT_ONCE = 100

_MOST_SEARCHES = 2**31 - 1
"""What the column holds."""

_ANSWERED = frozenset({BatchItem.Status.SUCCEEDED, BatchItem.Status.ERRORED})

_ENDED_AS = {
    "errored": BatchItem.Status.ERRORED,
    "canceled": BatchItem.Status.CANCELED,
    "expired": BatchItem.Status.EXPIRED,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Over:
    """An item that is over: how it ended, what it cost, and the JSON of its message.

    ``late`` says that it was given up before, and booked at its bound.
    """

    item: BatchItem
    settlement: Settlement
    message: Mapping[str, Any] | None = field(default=None, repr=False)
    late: bool = False


def settle_results(submission: BatchSubmission, lines: Iterable[Mapping[str, Any]]) -> list[Over]:
    """Book results as the API gives them; return the items that are over by them, and only they.

    Lines of other batches, and of items that are over already, change nothing. Raises
    ``LedgerUnavailable``.
    """
    by_id = {
        custom_id: line.get("result")
        for line in lines
        if isinstance(custom_id := line.get("custom_id"), str) and _is_storable(custom_id)
    }
    read = partial(_read_results, submission, by_id)
    return _settle(submission.batch, read)


def close_items(
    submission: BatchSubmission, status: BatchItem.Status, error: str, *, most: int = ROWS_AT_ONCE
) -> int:
    """Release items of a submission that nobody will answer; return how many, at most some.

    Those that were given up are released, too. Raises ``LedgerUnavailable``.
    """
    released = Settlement(status=Status.RELEASED, cost_nanousd=0, error=error, keep_call=False)

    def read(row: CallLog, prices: _Prices) -> list[Over]:
        items = _items(submission).filter(Q(status=BatchItem.Status.OPEN) | _GIVEN_UP)[:most]
        over = []
        for item in items:
            late = _is_given_up(item)
            item.status, item.error = status, error[:64]
            over.append(Over(item=item, settlement=released, late=late))
        return over

    return len(_settle(submission.batch, read))


def _settle(batch: Batch, read: Callable[[CallLog, _Prices], list[Over]]) -> list[Over]:
    """Book what ``read`` finds to be over, with the rows of its items in the same transaction."""
    row = reservation_row(batch)
    if row is None:
        return []
    over: list[Over] = []
    prices = _Prices(batch)

    def claim(locked: CallLog) -> list[Part]:
        over[:] = read(locked, prices)
        _note(batch, over)
        charge = charge_of(batch)
        return [
            Part(
                attempt=attempt_of(
                    it.item,
                    batch,
                    charge=charge,
                    at=locked.reserved_at,
                    rates=prices.reference(it.item.model),
                    # Each of them was looked for before it was sent.
                    cache_checked=locked.cache_checked,
                ),
                held_nanousd=it.item.reserved_nanousd,
                settlement=it.settlement,
            )
            for it in over
        ]

    booked = ledgers.current().settle_parts(row.pk, claim)
    tell_parts(row.pk, booked, sender=Batch)
    return over if booked else []


def charge_of(batch: Batch) -> Charge:
    """Return who pays for a batch."""
    return Charge(
        feature=batch.feature_id, user_id=batch.user_id, subject=batch.subject, tags=batch.tags
    )


def _items(submission: BatchSubmission) -> Any:
    return BatchItem.objects.using(conf.LEDGER_DATABASE).filter(submission=submission)


_GIVEN_UP = Q(status=BatchItem.Status.EXPIRED, error=DEADLINE_PASSED)
"""Items that were booked at their bound after the deadline."""


def _is_given_up(item: BatchItem) -> bool:
    return item.status == BatchItem.Status.EXPIRED and item.error == DEADLINE_PASSED


def _read_results(
    submission: BatchSubmission, by_id: Mapping[str, Any], row: CallLog, prices: _Prices
) -> list[Over]:
    items = _items(submission).filter(custom_id__in=list(by_id))
    over = []
    for item in items:
        late = _is_given_up(item)
        if item.custom_id not in by_id or not (item.status == BatchItem.Status.OPEN or late):
            continue
        found = by_id[item.custom_id]
        result: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
        settled = _settlement_of(item, result, prices, at=row.reserved_at)
        if not _can_be_written(settled):
            settled = _at_bound(item, "unreadable answer")
        settled = replace(settled, request_id=submission.api_id or "")
        message = None
        if settled.status is Status.RELEASED:
            item.status = _ENDED_AS[str(result["type"])]
        elif result.get("type") == "succeeded":
            item.status, message = BatchItem.Status.SUCCEEDED, _message_of(result)
        else:
            item.status = BatchItem.Status.ERRORED
        item.error = settled.error[:64]
        over.append(Over(item=item, settlement=settled, message=message, late=late))
    return over


def _settlement_of(
    item: BatchItem, result: Mapping[str, Any], prices: _Prices, *, at: datetime
) -> Settlement:
    """Return the booking of one result. What cannot be read may have cost all that is held."""
    kind = str(result.get("type"))
    if kind in _ENDED_AS:
        error = _error_of(result) if kind == "errored" else ""
        return Settlement(status=Status.RELEASED, cost_nanousd=0, error=error, keep_call=False)
    message = _message_of(result)
    usage = None if message is None else message.get("usage")
    if kind != "succeeded" or message is None or not isinstance(usage, Mapping):
        return _at_bound(item, "unreadable answer")
    stop_reason = str(message.get("stop_reason") or "")
    read = Usage()
    try:
        read = read_usage(usage)
        rates = prices.of_answer(item, str(message.get("model") or ""), at)
        spent = cost(rates, read, at=at, batch=True)
        saved, levers = prices.saving(item, rates, read, spent=spent, at=at)
    except (UnclassifiedUsage, UnpricedModel) as error:
        log.warning("An item of a batch is booked at its bound: %s", error)
        return replace(_at_bound(item, type(error).__name__), usage=read, stop_reason=stop_reason)
    if stop_reason == "refusal" and not message.get("content"):
        spent, saved, levers = 0, 0, ""
    if read.unclassified:
        log.warning("Usage has fields without a price rule: %s", ", ".join(read.unclassified))
    return Settlement(
        status=Status.SETTLED,
        cost_nanousd=spent,
        usage=read,
        stop_reason=stop_reason,
        saved_nanousd=saved,
        saved_reason=levers,
    )


def _can_be_written(settlement: Settlement) -> bool:
    """Say whether a booking fits its columns: what the API says may be anything."""
    usage = settlement.usage
    counts = [
        usage.prompt_tokens,
        usage.output_tokens,
        usage.thinking_tokens,
        settlement.cost_nanousd,
        abs(settlement.saved_nanousd),
    ]
    words = [usage.service_tier, usage.speed, usage.inference_geo, settlement.stop_reason]
    few = usage.web_searches <= _MOST_SEARCHES and max(counts) <= money.MAX_NANOUSD
    return few and all(map(_is_storable, words))


def _is_storable(text: str) -> bool:
    """Say whether every database takes a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _message_of(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    message = result.get("message")
    return message if isinstance(message, Mapping) else None


def _at_bound(item: BatchItem, error: str) -> Settlement:
    return Settlement(status=Status.ESTIMATED, cost_nanousd=item.reserved_nanousd, error=error)


def _error_of(result: Mapping[str, Any]) -> str:
    """Return the type of an item's error; its message may quote the prompt."""
    found: Any = result.get("error")
    while isinstance(found, Mapping) and isinstance(found.get("error"), Mapping):
        found = found["error"]
    kind = str(found.get("type") or "error") if isinstance(found, Mapping) else "error"
    return kind if _is_storable(kind) else "error"


class _Prices:
    """The prices of a batch, as they were frozen when it was reserved."""

    def __init__(self, batch: Batch) -> None:
        self._references: Mapping[str, str] = batch.rates
        self._frozen: dict[str, ModelRates] = {}

    def reference(self, model: str) -> str:
        return self._references.get(model, "")

    def of(self, model: str, at: datetime) -> ModelRates:
        found = self._frozen.get(model)
        if found is None:
            with suppress(KeyError, ValueError):
                found = ModelRates.of_reference(self._references[model], provider="anthropic")
            self._frozen[model] = found = found or resolve(model, at=at)
        return found

    def of_answer(self, item: BatchItem, answered: str, at: datetime) -> ModelRates:
        """Return the prices of the model that answered: a fallback, where there are any.

        Elsewhere an answer names the model by another of its names.
        """
        if not item.may_fall_back or answered in ("", item.model):
            return self.of(item.model, at)
        return self.of(answered, at)

    def saving(
        self, item: BatchItem, rates: ModelRates, usage: Usage, *, spent: int, at: datetime
    ) -> tuple[int, str]:
        """Return what the same tokens would have cost more without the levers, and which."""
        levers = ["batch"]
        single = replace(usage, service_tier="")
        plain = uncached(single)
        if cost(rates, plain, at=at) != cost(rates, single, at=at):
            levers.append("prompt cache")
        if item.model != item.requested_model:
            levers.append("downgrade")
            with suppress(UnpricedModel):
                rates = self.of(item.requested_model, at)
        return cost(rates, plain, at=at) - spent, ", ".join(levers)


# Rows


def _note(batch: Batch, over: Sequence[Over]) -> None:
    """Write how items ended, with what is counted of the batch; in the ledger's transaction."""
    alias = conf.LEDGER_DATABASE
    alike: dict[tuple[str, str], list[int]] = {}
    for it in over:
        alike.setdefault((it.item.status, it.item.error), []).append(it.item.pk)
    rows = BatchItem.objects.using(alias)
    for (status, error), ids in alike.items():
        rows.filter(pk__in=ids).update(status=status, error=error)
    # Their callback was told that they had expired.
    answered = [it.item.pk for it in over if it.late and it.item.status in _ANSWERED]
    if answered:
        rows.filter(pk__in=answered).update(handed=False)
    _keep_texts(over)
    late = [it for it in over if it.late]
    ended = Counter(it.item.status for it in over)
    held = sum(it.item.reserved_nanousd for it in over)
    held_late = sum(it.item.reserved_nanousd for it in late)
    spent = sum(it.settlement.cost_nanousd for it in over)
    counts: dict[str, Any] = {status: F(status) + count for status, count in ended.items()}
    if late:
        counts["expired"] = F("expired") + ended["expired"] - len(late)
    Batch.objects.using(alias).filter(pk=batch.pk).update(
        held_nanousd=F("held_nanousd") - (held - held_late),
        spent_nanousd=F("spent_nanousd") + spent - held_late,
        **counts,
    )


def _keep_texts(over: Sequence[Over]) -> None:
    """Keep what was answered, if texts are kept, and forget what was asked, if not.

    Requests that failed stay, to be submitted again.
    """
    texts = CallText.objects.using(conf.LEDGER_DATABASE)
    answered = [it for it in over if it.item.status == BatchItem.Status.SUCCEEDED]
    if not conf.LOG_PROMPTS:
        texts.filter(call_id__in=[it.item.call_id for it in answered]).delete()
        return
    kept = [
        CallText(call_id=it.item.call_id, message=json.dumps(it.message, separators=(",", ":")))
        for it in answered
        if it.message is not None
    ]
    for some in _by_bytes(kept):
        texts.bulk_update(some, ["message"])


def _by_bytes(texts: Iterable[CallText]) -> Iterator[list[CallText]]:
    """Yield texts in lists that a server takes in one statement."""
    some: list[CallText] = []
    size = 0
    for text in texts:
        if some and (len(some) == _TEXTS_AT_ONCE or size + len(text.message) > BYTES_AT_ONCE):
            yield some
            some, size = [], 0
        some.append(text)
        size += len(text.message)
    if some:
        yield some


def book_overdue(batch: Batch) -> None:
    """Book what a batch still holds at its bound, for nobody knows what became of it.

    The truth corrects it, should it come after all.
    """
    row = reservation_row(batch)
    if row is not None and row.status == Status.RESERVED:
        ledgers.current().settle(journals.reservation_of(row), journals.at_bound(row))
        tell_overdue(conf.LEDGER_DATABASE, [row.pk])


def expire_items(batch: Batch) -> int:
    """Give up the items that are still open, whose money was booked; return how many."""
    alias = conf.LEDGER_DATABASE
    rows = BatchItem.objects.using(alias).filter(batch=batch, status=BatchItem.Status.OPEN)
    reservation = CallLog.objects.using(alias).filter(call_id=batch.call_id)

    def expire() -> int:
        with patient_transaction(connections[alias]):
            # Locks it, in every database: nobody books items of the batch meanwhile.
            reservation.update(attempt=F("attempt"))
            some = list(rows[:ROWS_AT_ONCE])
            held = sum(item.reserved_nanousd for item in some)
            count = rows.filter(pk__in=[item.pk for item in some]).update(
                status=BatchItem.Status.EXPIRED, error=DEADLINE_PASSED
            )
            Batch.objects.using(alias).filter(pk=batch.pk).update(
                expired=F("expired") + count,
                held_nanousd=F("held_nanousd") - held,
                spent_nanousd=F("spent_nanousd") + held,
            )
        return count

    total = 0
    while count := retry(connections[alias], expire):
        total += count
    return total


def calls_of(items: Sequence[BatchItem]) -> dict[uuid.UUID, CallLog]:
    """Return the calls that items were booked as, by their ids."""
    rows = CallLog.objects.using(conf.LEDGER_DATABASE)
    return {row.call_id: row for row in rows.filter(call_id__in=[it.call_id for it in items])}
