"""Batches that a guarded client creates and reads itself: reserved, recorded and booked all the
same, whoever reads their results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any

from django.db import connections

from ai_budget.conf import conf
from ai_budget.exceptions import UnboundedCall
from ai_budget.guard.batch.api import may_have_taken, parsed
from ai_budget.guard.batch.opening import BatchOpening
from ai_budget.guard.batch.requests import Asked
from ai_budget.guard.batch.results import settle_results
from ai_budget.guard.batch.rows import ROWS_AT_ONCE, chunks, discard
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.connection import retry
from ai_budget.models import Batch, BatchSubmission
from ai_budget.values import Charge

LOOK_AFTER = timedelta(seconds=30)
"""When a worker looks after it for the first time."""

_OF_RESULTS = re.compile(r"/v1/messages/batches/(?P<id>[\w-]+)/results", re.ASCII)

_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}", re.ASCII)

_OF_A_BATCH = frozenset({"requests"})
_OF_A_REQUEST = frozenset({"custom_id", "params"})
"""All that the API takes. What is added to it may cost something, until somebody classifies it."""


MOST_KEPT = 16 * 2**20
"""Bytes of results that are kept until they are booked; what is more is left to workers."""


class ClientBatch:
    """A batch on its way through a guarded client; booked by whatever became of sending it.

    ``body`` is what is sent: every item within its feature's caps, by the model of its rung.
    """

    asking = None

    def __init__(self, batch: Batch, body: dict[str, Any]) -> None:
        self.batch = batch
        self.body = body

    @classmethod
    def open(cls, body: Mapping[str, Any], charge: Charge, *, workspace_named: bool) -> ClientBatch:
        """Reserve all items of a request that creates a batch. Raises what ``BatchOpening`` does,
        and ``UnboundedCall`` for a body that cannot be read."""
        requests: Any = body.get("requests")
        readable = isinstance(requests, (list, tuple)) and all(map(_is_readable, requests))
        if not readable or not body.keys() <= _OF_A_BATCH:
            raise UnboundedCall(
                "A batch cannot be bounded: requests is a list of dicts, each with a custom_id of "
                "at most 64 letters, digits, hyphens and underscores, and with params; and there "
                "is nothing else in it."
            ) from None
        opening = BatchOpening(charge, workspace_named=workspace_named, at_once=True)
        try:
            sent = [{**request, "params": opening.add(_asked(request))} for request in requests]
            opening.ensure_some()
            batch = opening.open(sending=True)
        except BaseException:
            opening.discard()
            raise
        return cls(batch, {**body, "requests": sent})

    def hear(self, headers: Mapping[str, str]) -> None:
        """Take nothing from what the headers say: batches have rate limits of their own."""

    def book_message(self, created: Any, request_id: str) -> None:
        """Note the batch that the API made, for workers to look after."""
        api_id = created.get("id") if isinstance(created, Mapping) else None
        if not isinstance(api_id, str):
            self.book_lost("unreadable answer")
            return
        self._note(BatchSubmission.Status.SENT, api_id=api_id)

    def book_rejected(self, status: int, request_id: str) -> None:
        """Give everything back, unless the API may have made it before it failed."""
        if may_have_taken(status):
            self.book_lost(f"HTTP {status}")
        else:
            self.book_unsent(f"HTTP {status}")

    def book_unsent(self, reason: str) -> None:
        """Give everything back: there is no such batch."""
        alias = conf.LEDGER_DATABASE
        rows = Batch.objects.using(alias).filter(pk=self.batch.pk)
        # As one that was never opened: should this worker die now, the tick drops it.
        retry(connections[alias], partial(rows.update, status=Batch.Status.PREPARING))
        discard(self.batch)

    def book_lost(self, reason: str) -> None:
        """Keep holding it: workers look for it among the API's batches."""
        self._note(BatchSubmission.Status.UNCERTAIN, error=reason[:64])

    def _note(self, status: BatchSubmission.Status, **values: Any) -> None:
        alias = conf.LEDGER_DATABASE
        # Workers may have found it meanwhile, and know more.
        rows = BatchSubmission.objects.using(alias).filter(
            batch=self.batch,
            api_id=None,
            status__in=[BatchSubmission.Status.SENDING, BatchSubmission.Status.UNCERTAIN],
        )
        look = ledgers.current().now() + LOOK_AFTER
        retry(connections[alias], partial(rows.update, status=status, next_look_at=look, **values))


def _is_readable(request: Any) -> bool:
    return (
        isinstance(request, dict)
        and request.keys() == _OF_A_REQUEST
        and isinstance(request["params"], dict)
        and isinstance(request["custom_id"], str)
        and bool(_CUSTOM_ID.fullmatch(request["custom_id"]))
    )


def _asked(request: Mapping[str, Any]) -> Asked:
    custom_id = request["custom_id"]
    return Asked(key=custom_id, custom_id=custom_id, params=request["params"])


class ResultsReader:
    """Follows the results of a batch while somebody else reads them, line by line."""

    def __init__(self, api_id: str) -> None:
        self._api_id = api_id
        self._rest = b""
        self._lines: list[bytes] = []
        self._kept = 0

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._keep(line)

    def give_up(self) -> None:
        """Read no further: workers will."""

    def _keep(self, line: bytes) -> None:
        found = parsed(line) if self._kept < MOST_KEPT else None
        if found is not None:
            kept = line if conf.LOG_PROMPTS else json.dumps(_slim(found)).encode()
            self._lines.append(kept)
            self._kept += len(kept)

    def settle(self) -> None:
        """Book what was read, if it is a batch of ours."""
        self._keep(self._rest)
        self._rest = b""
        alias = conf.LEDGER_DATABASE
        rows = BatchSubmission.objects.using(alias).select_related("batch")
        submission = retry(connections[alias], rows.filter(api_id=self._api_id).first)
        if submission is not None:
            for some in chunks(self._lines, ROWS_AT_ONCE):
                settle_results(submission, [json.loads(line) for line in some])


def _slim(line: dict[str, Any]) -> dict[str, Any]:
    """Return a result without the text of its answer; whether there is one says what it costs."""
    result = line.get("result")
    message = result.get("message") if isinstance(result, dict) else None
    if not isinstance(result, dict) or not isinstance(message, dict) or not message.get("content"):
        return line
    return {**line, "result": {**result, "message": {**message, "content": [None]}}}


def results_of(method: str, path: str) -> str | None:
    """Return the id of the batch whose results a request reads; None for any other request."""
    found = _OF_RESULTS.fullmatch(path) if method.upper() == "GET" else None
    return found["id"] if found else None
