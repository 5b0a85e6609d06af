"""Submitting batches, and asking for their end."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from django.db import connections, transaction
from django.db.models import QuerySet
from django.views.decorators.debug import sensitive_variables

from ai_budget import signals
from ai_budget.arguments import checked_text
from ai_budget.batches.handing import callback_of
from ai_budget.batches.rows import fresh, in_order, submissions
from ai_budget.conf import conf
from ai_budget.exceptions import AIBudgetError, InvalidArgument, LedgerUnavailable
from ai_budget.guard.answers import surroundings_of
from ai_budget.guard.batch.opening import BatchOpening
from ai_budget.guard.batch.requests import Asked
from ai_budget.guard.batch.results import charge_of
from ai_budget.guard.batch.rows import ROWS_AT_ONCE, of_key
from ai_budget.guard.charge import charge, current_payer
from ai_budget.guard.clients import bare
from ai_budget.guard.telling import tell
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.connection import retry
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallText
from ai_budget.values import Charge

log = logging.getLogger("ai_budget")

Request = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A prompt, a list of messages, or the parameters of ``messages.create``."""


@sensitive_variables()
def submit_batch(
    requests: Iterable[Any] | Mapping[Any, Request],
    *,
    feature: str | None = None,
    user: Any = None,
    subject: str | None = None,
    system: str | Sequence[Mapping[str, Any]] | None = None,
    model: str | None = None,
    max_tokens: int | None = None,
    tags: Mapping[str, str] | None = None,
    idempotency_key: str | None = None,
    allow_partial: bool = False,
    on_result: str = "",
    **params: Any,
) -> Batch:
    """Reserve a batch, have it sent, and return it at once; its results come within a day.

    ``requests`` are prompts, lists of messages, or dicts of the parameters of
    ``messages.create``; to find them again, pairs of an id and one of these, a dict by ids, or
    the API's own ``{"custom_id": ..., "params": ...}``. Other ids are positions: "0", "1" ... A
    generator or a queryset of pairs (``values_list("pk", "prompt")``) is read as it comes.
    ``system``, ``model``, ``max_tokens`` and ``params`` are for requests that do not say so
    themselves; ``feature``, ``user``, ``subject`` and ``tags`` as in ``ask``.

    The most that all items can cost, at half the price, is held in one reservation, on this
    day, until they are over. Raises ``BudgetExceeded`` and its kin with how many items would
    fit, and then nothing is sent; with ``allow_partial`` as many as fit are, each in its turn,
    and the others have the status "refused". ``TypeError``, ``ValueError``, ``UnboundedCall`` and
    ``UnpricedModel`` name the first item that cannot be sent.

    ``idempotency_key``: called again with the same, it returns the batch that was submitted
    first. ``on_result`` is the dotted path of a callable that is handed each ``Result`` once it
    is booked, at least once: again, where a worker dies in the middle or it raises.
    """
    client = bare()  # raises without a key, before anything is prepared
    if on_result:
        callback_of(on_result)
    shared = {"system": system, "model": model, "max_tokens": max_tokens, **params}
    shared = {name: value for name, value in shared.items() if value is not None}
    with charge(feature=feature, user=user, subject=subject, tags=tags):
        paying = current_payer().charge()
    if idempotency_key is not None:
        _ensure_key(idempotency_key)
    return _submit(
        paying,
        _asked(requests, shared),
        around=surroundings_of(client),
        allow_partial=allow_partial,
        idempotency_key=idempotency_key,
        on_result=on_result,
    )


def _submit(
    paying: Charge,
    asked: Iterable[Asked],
    *,
    idempotency_key: str | None,
    allow_partial: bool = False,
    **batch: Any,
) -> Batch:
    """Open a batch of what is asked, and have it sent; or return the one with its key."""
    found = None if idempotency_key is None else of_key(idempotency_key, paying)
    if found is not None:
        return found
    opening = BatchOpening(paying, idempotency_key=idempotency_key, **batch)
    try:
        for one in asked:
            opening.add(one)
        opening.ensure_some()
        opened = opening.open(allow_partial=allow_partial)
    except BaseException:
        opening.discard()
        raise
    tell_waiting(opened)
    return opened


def _ensure_key(key: str) -> None:
    if not checked_text(key, "idempotency_key", most=200):
        raise InvalidArgument("idempotency_key", "has to have a character at least.")


def _asked(
    requests: Iterable[Any] | Mapping[Any, Request], shared: Mapping[str, Any]
) -> Iterator[Asked]:
    """Return the requests with their ids, read as they come. Raises for what is only one."""
    if isinstance(requests, (str, bytes)):
        raise TypeError("requests is a list of prompts, not one prompt.")
    if isinstance(requests, Mapping):
        if requests.keys() & {"messages", "params"}:
            raise TypeError("requests is a list of requests, not the parameters of one.")
        requests = requests.items()
    elif isinstance(requests, QuerySet):
        requests = requests.iterator(chunk_size=ROWS_AT_ONCE)
    return _with_ids(requests, shared)


def _with_ids(requests: Iterable[Any], shared: Mapping[str, Any]) -> Iterator[Asked]:
    for position, request in enumerate(requests):
        key, own = str(position), request
        if isinstance(request, Mapping) and "params" in request and "messages" not in request:
            key, own = str(request.get("custom_id", key)), request["params"]
        elif _is_pair(request):
            key, own = str(request[0]), request[1]
        yield Asked(key=key, params=_params(own, shared, key))


def _is_pair(request: Any) -> bool:
    """Say whether it is an id and a request, and no list of messages."""
    return isinstance(request, tuple) and len(request) == 2 and not isinstance(request[0], Mapping)


def _params(request: Any, shared: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if isinstance(request, str):
        return {**shared, "messages": [{"role": "user", "content": request}]}
    if isinstance(request, Mapping):
        return {**shared, **request}
    if isinstance(request, Sequence) and not isinstance(request, (bytes, bytearray)):
        return {**shared, "messages": list(request)}
    raise TypeError(
        f"Item {key!r} is a {type(request).__name__}: give a prompt, a list of messages or a dict "
        "of parameters, and its id before it, as in (id, prompt)."
    )


@sensitive_variables()
def resubmit(batch: Batch, *, allow_partial: bool = False) -> Batch:
    """Submit what was not answered of a batch once more, as a batch of its own.

    Those are the items that are errored, canceled, expired or refused; with ``allow_partial`` as
    many of them as fit. Called again it returns the same batch; what that one leaves unanswered
    is its own to submit once more. Raises what ``submit_batch`` raises, and ``AIBudgetError``
    where the batch is not over, or nothing of it can be sent again.
    """
    batch = fresh(batch)
    if batch.status != Batch.Status.FINISHED:
        raise AIBudgetError("The batch is not over: resubmit it once it is finished.")
    around = surroundings_of(bare())
    asked = _unanswered(batch)
    first = next(asked, None)
    if first is None:
        raise AIBudgetError("Nothing of the batch can be sent again: all is answered or forgotten.")
    return _submit(
        charge_of(batch),
        chain([first], asked),
        around=around,
        allow_partial=allow_partial,
        idempotency_key=f"resubmit {batch.call_id}",
        on_result=batch.on_result,
        resubmits=batch,
    )


def _unanswered(batch: Batch) -> Iterator[Asked]:
    alias = conf.LEDGER_DATABASE
    failed = BatchItem.objects.using(alias).filter(
        batch=batch,
        status__in=[
            BatchItem.Status.ERRORED,
            BatchItem.Status.CANCELED,
            BatchItem.Status.EXPIRED,
            BatchItem.Status.REFUSED,
        ],
    )
    for some in in_order(failed):
        texts = CallText.objects.using(alias).in_bulk([item.call_id for item in some])
        for item in some:
            text = texts.get(item.call_id)
            if text is not None and text.request:
                # The ladder and the caps decide anew.
                params = {**json.loads(text.request), "model": item.requested_model}
                yield Asked(key=item.key, params=params)


def cancel(batch: Batch) -> None:
    """Have what is open of a batch canceled, by whoever works on it next.

    What has not been sent is released, what the API has is canceled there; what it answers
    meanwhile is booked.
    """
    alias = conf.LEDGER_DATABASE
    now = ledgers.current().now()
    rows = submissions().filter(batch=batch).exclude(status=BatchSubmission.Status.DONE)
    retry(connections[alias], partial(rows.update, cancel_requested=True))
    # Whoever is sending one just now will see it then.
    others = rows.exclude(status=BatchSubmission.Status.SENDING)
    retry(connections[alias], partial(others.update, next_look_at=now))
    tell_waiting(batch)


def tell_waiting(batch: Batch) -> None:
    """Tell workers of submissions that are due, once their rows are committed."""
    alias = conf.LEDGER_DATABASE
    rows = submissions().filter(batch=batch, next_look_at__isnull=False)
    rows = rows.exclude(status=BatchSubmission.Status.SENDING)
    ids = rows.values_list("pk", flat=True)
    try:
        waiting: list[int] = retry(connections[alias], lambda: list(ids))
    except LedgerUnavailable as error:
        # The batch is what was asked for; the tick finds what is due.
        log.error("Workers were not told of batch %s: %s", batch, error)
        return
    if waiting:
        send = partial(tell, signals.batch_waiting, sender=Batch, submission_ids=waiting)
        transaction.on_commit(send, using=alias)
