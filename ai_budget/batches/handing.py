"""Results: read by whoever asks, and handed to the callback of their batch."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any

from django.db import connections
from django.utils.module_loading import import_string

from ai_budget import money, periods
from ai_budget.batches.rows import in_order
from ai_budget.conf import conf
from ai_budget.exceptions import AIBudgetError
from ai_budget.guard.batch import api
from ai_budget.guard.batch.api import as_message
from ai_budget.guard.batch.results import calls_of
from ai_budget.guard.charge import outside_calls
from ai_budget.ledger.connection import retry
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallLog, CallText

if TYPE_CHECKING:
    from anthropic.types import Message

log = logging.getLogger("ai_budget")

NOTED_EVERY = 10.0
"""Seconds after which it is noted which results the callback has had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """How one item of a batch ended.

    ``key`` is its id as it was submitted, ``status`` one of ``BatchItem.Status``. ``message`` is
    the SDK's; None where there is no answer, or its text is no longer kept.
    """

    key: str
    status: str
    call_id: uuid.UUID
    model: str
    error: str = ""
    cost_nanousd: int = 0
    message: Message | None = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The text of the answer; empty where there is none."""
        content = getattr(self.message, "content", None) or ()
        return "".join(block.text for block in content if block.type == "text")

    @property
    def cost(self) -> Decimal:
        """Exact dollars."""
        return money.to_usd(self.cost_nanousd)

    @property
    def ok(self) -> bool:
        """Whether it was answered."""
        return self.status in (BatchItem.Status.SUCCEEDED, BatchItem.Status.CACHED)


def results(batch: Batch) -> Iterator[Result]:
    """Yield the result of every item, in the order in which they were submitted.

    Texts that are not stored are read from the API again, which keeps them for 29 days; after
    that there are results without a message. An item that is not over has the status "open" and
    no message. Raises ``AIBudgetError`` where the API cannot be read now.
    """
    alias = conf.LEDGER_DATABASE
    items = BatchItem.objects.using(alias).filter(batch=batch).select_related("submission")
    with closing(_Elsewhere()) as elsewhere:
        for some in in_order(items):
            texts = CallText.objects.using(alias).in_bulk([item.call_id for item in some])
            calls = calls_of(some)
            for item in some:
                text = texts.get(item.call_id)
                found: Any = json.loads(text.message) if text is not None and text.message else None
                if found is None and item.status == BatchItem.Status.SUCCEEDED:
                    found = elsewhere.message_of(item)
                yield _result_of(item, found, calls.get(item.call_id))


class _Elsewhere:
    """Answers that are not stored, as the API has them: those of one submission at a time.

    They come in any order, and may be more than memory holds: so they are kept in a file without
    a name meanwhile, which is gone with the process.
    """

    def __init__(self) -> None:
        self._submission: BatchSubmission | None = None
        self._file: IO[bytes] | None = None
        self._places: dict[str, int] = {}

    def message_of(self, item: BatchItem) -> Any:
        """Return the answer of an item; None where the API keeps it no more."""
        if item.submission is None:
            return None
        if self._submission is None or self._submission.pk != item.submission.pk:
            self._read(item.submission)
        place = self._places.get(item.custom_id)
        if place is None or self._file is None:
            return None
        self._file.seek(place)
        return json.loads(self._file.readline())

    def _read(self, submission: BatchSubmission) -> None:
        self.close()
        self._submission, self._places = submission, {}
        self._file = SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - see close()
        try:
            for line in api.results(str(submission.api_id)):
                result = line.get("result")
                message = result.get("message") if isinstance(result, Mapping) else None
                self._places[str(line.get("custom_id"))] = self._file.tell()
                self._file.write(json.dumps(message).encode() + b"\n")
        except api.Unavailable as error:
            if not error.gone:
                raise AIBudgetError(
                    f"The results of {submission.api_id} cannot be read now: {error.reason}."
                ) from None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


_IN_MEMORY = 16 * 2**20
"""Bytes of answers that need no file."""


def _result_of(item: BatchItem, message: Any, call: CallLog | None) -> Result:
    return Result(
        key=item.key,
        status=item.status,
        call_id=item.call_id,
        model=item.model,
        error=item.error,
        cost_nanousd=0 if call is None else call.cost_nanousd or 0,
        message=as_message(message) if isinstance(message, Mapping) else None,
    )


# The callback


def callback_of(path: str) -> Any:
    """Return the callable of a dotted path; raises ``TypeError`` for what is none."""
    try:
        found = import_string(path) if isinstance(path, str) else None
    except ImportError:
        found = None
    if not callable(found):
        raise TypeError(f"on_result is the dotted path of a callable, not {path!r}.")
    return found


def hand_results(
    submission: BatchSubmission,
    lines: Sequence[Mapping[str, Any]],
    *,
    keep: Callable[[], None],
) -> None:
    """Hand booked results to the batch's callback, those that it has not had. See ``hand``."""
    batch = submission.batch
    if not batch.on_result:
        return
    by_id = {str(line.get("custom_id")): line.get("result") for line in lines}
    items = BatchItem.objects.using(conf.LEDGER_DATABASE).filter(
        submission=submission, custom_id__in=list(by_id), handed=False
    )
    waiting = [
        item for item in items.exclude(status=BatchItem.Status.OPEN) if item.custom_id in by_id
    ]
    messages = {}
    for item in waiting:
        result = by_id[item.custom_id]
        if item.status == BatchItem.Status.SUCCEEDED and isinstance(result, Mapping):
            messages[item.pk] = result.get("message")
    hand(batch, waiting, messages, keep=keep)


def hand(
    batch: Batch,
    items: Sequence[BatchItem],
    messages: Mapping[int, Any],
    *,
    keep: Callable[[], None],
) -> bool:
    """Call the callback with each result, and note who had one; say whether it took them all.

    ``keep`` is called now and then, so that nobody else begins with the same ones; what it
    raises ends it.
    """
    if not items:
        return True
    try:
        callback = callback_of(batch.on_result)
    except TypeError as error:
        log.error("%s", error)
        return False
    calls = calls_of(items)
    taken: list[int] = []
    failed = False
    since = periods.monotonic()
    for item in items:
        result = _result_of(item, messages.get(item.pk), calls.get(item.call_id))
        try:
            with outside_calls():
                callback(result)
        except Exception as error:
            failed = True
            log.error("The callback %s failed: %s", batch.on_result, type(error).__name__)
        else:
            taken.append(item.pk)
        if periods.monotonic() - since > NOTED_EVERY:
            _note_handed(taken)
            taken, since = [], periods.monotonic()
            keep()
    _note_handed(taken)
    return not failed


def _note_handed(items: Sequence[int]) -> None:
    rows = BatchItem.objects.using(conf.LEDGER_DATABASE).filter(pk__in=items)
    if items:
        retry(connections[conf.LEDGER_DATABASE], partial(rows.update, handed=True))
