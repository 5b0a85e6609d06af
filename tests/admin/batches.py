"""Batches for the pages and the command: rows as they stand, and some that were really sent."""

# factory_boy ships its types half written: its declarations have none.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import uuid
from datetime import timedelta

from factory.declarations import LazyAttribute, LazyFunction, SelfAttribute, Sequence, SubFactory
from factory.django import DjangoModelFactory

from ai_budget import batches, periods
from ai_budget.models import Batch, BatchItem, BatchSubmission
from ai_budget.testing import AnthropicSimulator, CutBeforeResponse, freeze
from tests.factories import HAIKU, FeatureBudgetFactory


class BatchFactory(DjangoModelFactory[Batch]):
    """An open batch of nothing; what it counts, a test says itself."""

    class Meta:
        model = Batch

    feature = SubFactory(FeatureBudgetFactory, name="nightly")
    status = Batch.Status.OPEN
    created_at = LazyFunction(periods.now)
    touched_at = SelfAttribute("created_at")
    reserved_at = SelfAttribute("created_at")
    day = LazyAttribute(lambda it: it.created_at.date())
    finished_at = LazyAttribute(
        lambda it: it.created_at if it.status == Batch.Status.FINISHED else None
    )


class BatchSubmissionFactory(DjangoModelFactory[BatchSubmission]):
    """A submission that the API has."""

    class Meta:
        model = BatchSubmission

    batch = SubFactory(BatchFactory)
    number = 0
    status = BatchSubmission.Status.SENT
    api_id = LazyAttribute(
        lambda it: (
            None
            if it.status in {"waiting", "uncertain"}
            else f"msgbatch_{it.batch.pk:04d}{it.number:02d}"
        )
    )
    items_count = 1
    sent_at = LazyFunction(periods.now)
    next_look_at = LazyFunction(periods.now)


class BatchItemFactory(DjangoModelFactory[BatchItem]):
    class Meta:
        model = BatchItem

    batch = SubFactory(BatchFactory)
    position = Sequence(int)
    key = LazyAttribute(lambda it: f"ticket-{it.position}")
    custom_id = LazyAttribute(lambda it: f"{it.batch.call_id.hex}-{it.position}")
    call_id = LazyFunction(uuid.uuid4)
    requested_model = HAIKU
    model = SelfAttribute("requested_model")
    max_tokens = 64
    reserved_nanousd = 1_000_000


def work(*, after: timedelta = timedelta()) -> None:
    """Do all steps that are due, as a worker does so long after now, and end what is over."""
    with freeze(periods.now() + after):
        while ids := batches.due():
            for submission_id in ids:
                batches.advance(submission_id)
        batches.tidy()


def submit_and_end(*prompts: str) -> Batch:
    """Return a batch whose results have been read."""
    batch = batches.submit_batch(prompts, feature="nightly", max_tokens=50)
    work()
    work(after=timedelta(minutes=1))
    batch.refresh_from_db()
    return batch


def submit_unheard(api: AnthropicSimulator, *, taken: bool) -> BatchSubmission:
    """Return the submission of a batch after the API's answer to it was lost."""
    api.batches.script("create", CutBeforeResponse(billed=taken))
    batch = batches.submit_batch(["one", "two"], feature="nightly", max_tokens=50)
    work()
    return batch.submissions.get()
