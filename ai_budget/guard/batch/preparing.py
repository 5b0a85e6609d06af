"""The rows of a batch before it counts: written while its items are read, some at a time, so that
a hundred thousand of them need no more memory than a few."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, TypeVar

from django.db import IntegrityError, connections

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.exceptions import AIBudgetError
from ai_budget.guard.batch.rows import ROWS_AT_ONCE, chunks
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.connection import patient_transaction, retry
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallText

Result = TypeVar("Result")

MOST_ITEMS = 100_000
"""What the API takes at once."""

MOST_BYTES = 32 * 2**20
"""How large a submission may grow. The API takes 256 MB, of which a worker would need several
times as much memory; a single item that is larger is sent by itself."""

BYTES_AT_ONCE = 4 * 2**20
"""Bytes of requests that are written together: servers of MySQL and MariaDB take 16 MB."""

_TOUCHED_EVERY = 60.0
"""Seconds after which what is being prepared says that it goes on."""


class Preparation:
    """A batch that is being prepared. It counts once it is opened; until then it can be dropped.

    ``at_once`` says that all of it is sent at once, however large it is.
    """

    def __init__(self, batch: Batch, *, at_once: bool) -> None:
        self._batch = batch
        self._at_once = at_once
        self._alias = conf.LEDGER_DATABASE
        self._submission: BatchSubmission | None = None
        self._rows: list[tuple[BatchItem, CallText]] = []
        self._bytes = 0
        self._written = periods.monotonic()
        self._run(partial(batch.save, using=self._alias, force_insert=True))

    def send(self, item: BatchItem, text: CallText, *, size: int) -> None:
        """Keep an item that is sent as so many bytes, with the submission that it fits in."""
        item.submission = self._submission_for(size)
        self.keep(item, text)

    def keep(self, item: BatchItem, text: CallText) -> None:
        """Keep an item; it is written with the next ones."""
        self._rows.append((item, text))
        self._bytes += len(text.request) + len(text.message)
        quiet = periods.monotonic() - self._written
        many = len(self._rows) >= ROWS_AT_ONCE or self._bytes >= BYTES_AT_ONCE
        if many or quiet > _TOUCHED_EVERY:
            self.write()

    def write(self) -> None:
        """Write the rows that are waiting, and say that the batch goes on."""
        self._run(self._write)
        self._rows.clear()
        self._bytes = 0
        self._written = periods.monotonic()

    def open(
        self, *, refused: Collection[int], cached: Collection[int], sending: dict[str, Any]
    ) -> bool:
        """Make it a batch that counts; say whether no other one has its idempotency key.

        The items at those positions are not sent. ``sending`` are columns of its submissions.
        """

        def open_unless_taken() -> bool:
            try:
                self._open(refused, cached, sending)
            except IntegrityError:
                if self._batch.idempotency_key is None:
                    raise
                return False
            return True

        return self._run(open_unless_taken)

    def _run(self, step: Callable[[], Result]) -> Result:
        return retry(connections[self._alias], step)

    def _submission_for(self, size: int) -> BatchSubmission:
        last = self._submission
        if last is None or self._is_full(last, size):
            number = 0 if last is None else last.number + 1
            if last is not None:
                self.write()
            last = self._submission = BatchSubmission(batch=self._batch, number=number)
            self._run(partial(last.save, using=self._alias, force_insert=True))
        last.items_count += 1
        last.request_bytes += size
        return last

    def _is_full(self, submission: BatchSubmission, size: int) -> bool:
        if self._at_once:
            return False
        many = submission.items_count >= MOST_ITEMS
        return many or submission.request_bytes + size > MOST_BYTES

    def _write(self) -> None:
        with patient_transaction(connections[self._alias]):
            if not self._goes_on():
                raise _given_up()
            BatchItem.objects.using(self._alias).bulk_create([item for item, _ in self._rows])
            CallText.objects.using(self._alias).bulk_create([text for _, text in self._rows])
            if self._submission is not None:
                self._submission.save(
                    using=self._alias, update_fields=["items_count", "request_bytes"]
                )

    def _goes_on(self) -> bool:
        """Say that it goes on, and keep it so for now; False where it was given up."""
        mine = Batch.objects.using(self._alias).filter(
            pk=self._batch.pk, status=Batch.Status.PREPARING, finished_at__isnull=True
        )
        return bool(mine.update(touched_at=ledgers.current().now()))

    def _open(
        self, refused: Collection[int], cached: Collection[int], sending: dict[str, Any]
    ) -> None:
        with patient_transaction(connections[self._alias]):
            if not self._goes_on():
                if self._is_open():
                    return  # the connection broke before it could say so
                raise _given_up()
            self._leave_out(refused, BatchItem.Status.REFUSED)
            self._leave_out(cached, BatchItem.Status.CACHED)
            submissions = BatchSubmission.objects.using(self._alias).filter(batch=self._batch)
            if refused:
                for submission in submissions:
                    count = BatchItem.objects.using(self._alias).filter(submission=submission)
                    submissions.filter(pk=submission.pk).update(items_count=count.count())
                submissions.filter(items_count=0).delete()
            submissions.update(**sending)
            self._batch.save(using=self._alias, force_update=True)

    def _is_open(self) -> bool:
        rows = Batch.objects.using(self._alias).filter(pk=self._batch.pk)
        return rows.filter(status=Batch.Status.OPEN).exists()

    def _leave_out(self, places: Iterable[int], status: BatchItem.Status) -> None:
        items = BatchItem.objects.using(self._alias).filter(batch=self._batch)
        for some in chunks(sorted(places), ROWS_AT_ONCE):
            items.filter(position__in=some).update(status=status, submission=None)


def _given_up() -> AIBudgetError:
    return AIBudgetError(
        "The batch was given up meanwhile: its requests came too slowly. Nothing was sent."
    )
