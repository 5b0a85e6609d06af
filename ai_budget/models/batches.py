"""Message batches: what was asked for, in which submissions it is sent, and every item of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, ClassVar

from django.conf import settings
from django.db import models
from django.utils.translation import gettext_lazy as _

from ai_budget import money
from ai_budget.models.budgets import FeatureBudget

if TYPE_CHECKING:
    from ai_budget.batches import Result

    _KeyField = models.CharField[str | None, str | None]
else:
    _KeyField = models.CharField


class Batch(models.Model):
    """Requests that are answered within a day, at half the price, on one reservation.

    Its row in the log of calls has its ``call_id`` and holds what its open items may cost; an
    item that was answered has a row of its own.
    """

    class Status(models.TextChoices):
        PREPARING = "preparing", _("Preparing")
        OPEN = "open", _("Open")
        FINISHED = "finished", _("Finished")

    call_id = models.UUIDField(_("call"), default=uuid.uuid4, unique=True, editable=False)
    idempotency_key = _KeyField(
        _("idempotency key"), max_length=200, null=True, blank=True, unique=True
    )
    status = models.CharField(
        _("status"), max_length=9, choices=Status, default=Status.PREPARING, db_index=True
    )
    feature = models.ForeignKey(
        FeatureBudget,
        verbose_name=_("feature"),
        to_field="name",
        on_delete=models.PROTECT,
        db_constraint=False,
        related_name="batches",
    )
    category = models.CharField(_("category"), max_length=64, blank=True)
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        verbose_name=_("user"),
        on_delete=models.DO_NOTHING,
        db_constraint=False,
        null=True,
        blank=True,
        related_name="+",
    )
    subject = models.CharField(_("subject"), max_length=100, blank=True)
    tags = models.JSONField(_("tags"), default=dict, blank=True)
    rates = models.JSONField(
        _("rates"),
        default=dict,
        blank=True,
        help_text=_("The prices of each model, as they were when the batch was reserved."),
    )
    on_result = models.CharField(
        _("callback"),
        max_length=200,
        blank=True,
        help_text=_("The dotted path of a callable that is handed every result."),
    )
    resubmits = models.ForeignKey(
        "self",
        verbose_name=_("resubmits"),
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="resubmitted_as",
    )
    total = models.PositiveIntegerField(_("items"), default=0)
    succeeded = models.PositiveIntegerField(_("succeeded"), default=0)
    cached = models.PositiveIntegerField(_("from the cache"), default=0)
    errored = models.PositiveIntegerField(_("errored"), default=0)
    canceled = models.PositiveIntegerField(_("canceled"), default=0)
    expired = models.PositiveIntegerField(_("expired"), default=0)
    refused = models.PositiveIntegerField(_("refused"), default=0)
    reserved_nanousd = models.BigIntegerField(_("reserved"), default=0)
    held_nanousd = models.BigIntegerField(_("held"), default=0)
    spent_nanousd = models.BigIntegerField(_("spent"), default=0)
    created_at = models.DateTimeField(_("created at"), db_index=True)
    touched_at = models.DateTimeField(_("touched at"))
    reserved_at = models.DateTimeField(_("reserved at"), null=True, blank=True)
    day = models.DateField(_("day"), null=True, blank=True)
    deadline = models.DateTimeField(_("deadline"), null=True, blank=True)
    finished_at = models.DateTimeField(_("finished at"), null=True, blank=True)
    told_at = models.DateTimeField(
        _("told at"),
        null=True,
        blank=True,
        help_text=_("When the signal batch_finished had been sent."),
    )

    class Meta:
        verbose_name = _("batch")
        verbose_name_plural = _("batches")
        ordering = ["-id"]

    def __str__(self) -> str:
        return f"{self.feature_id} #{self.pk}"

    @property
    def reserved_usd(self) -> Decimal:
        """The most that all its items together could have cost."""
        return money.to_usd(self.reserved_nanousd)

    @property
    def held_usd(self) -> Decimal:
        """The most that its open items can still cost."""
        return money.to_usd(self.held_nanousd)

    @property
    def spent_usd(self) -> Decimal:
        return money.to_usd(self.spent_nanousd)

    @property
    def open(self) -> int:
        """How many items are not over yet."""
        return self.total - (
            self.succeeded
            + self.cached
            + self.errored
            + self.canceled
            + self.expired
            + self.refused
        )

    # The short forms of the verbs in ``ai_budget.batches``.

    def results(self) -> Iterator[Result]:
        """Yield the result of every item, in the order in which they were submitted."""
        from ai_budget import batches

        return batches.results(self)

    def cancel(self) -> None:
        """Have what is not answered yet canceled; what is answered meanwhile is still booked."""
        from ai_budget import batches

        batches.cancel(self)

    def resubmit(self, *, allow_partial: bool = False) -> Batch:
        """Submit the items that were not answered once more, as a batch of their own."""
        from ai_budget import batches

        return batches.resubmit(self, allow_partial=allow_partial)


class BatchSubmission(models.Model):
    """One message batch at the API: as much of a batch as is sent at once.

    Only one worker at a time has it: whoever moves ``next_look_at`` on. ``sent_at`` is written
    before anything is sent, so that a worker that dies leaves it behind.
    """

    class Status(models.TextChoices):
        WAITING = "waiting", _("Waiting to be sent")
        SENDING = "sending", _("Being sent")
        UNCERTAIN = "uncertain", _("Uncertain: sent, and nobody heard the answer")
        SENT = "sent", _("At the API")
        CANCELING = "canceling", _("Being canceled")
        ENDED = "ended", _("Ended, results to be read")
        DONE = "done", _("Done")

    batch = models.ForeignKey(
        Batch, verbose_name=_("batch"), on_delete=models.CASCADE, related_name="submissions"
    )
    number = models.PositiveIntegerField(_("number"))
    status = models.CharField(_("status"), max_length=9, choices=Status, default=Status.WAITING)
    api_id = _KeyField(_("id at the API"), max_length=128, null=True, blank=True, unique=True)
    items_count = models.PositiveIntegerField(_("items"), default=0)
    request_bytes = models.PositiveBigIntegerField(_("bytes"), default=0)
    cancel_requested = models.BooleanField(_("cancel requested"), default=False)
    sent_at = models.DateTimeField(_("sent at"), null=True, blank=True)
    ended_at = models.DateTimeField(_("ended at"), null=True, blank=True)
    next_look_at = models.DateTimeField(_("next look at"), null=True, blank=True)
    tries = models.PositiveSmallIntegerField(_("tries"), default=0)
    error = models.CharField(_("error"), max_length=64, blank=True)

    class Meta:
        verbose_name = _("submission")
        verbose_name_plural = _("submissions")
        ordering = ["batch", "number"]
        indexes: ClassVar = [
            models.Index(fields=["next_look_at"], name="ai_budget_submission_due"),
        ]
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["batch", "number"], name="ai_budget_submission_number_unique"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.batch_id}/{self.number}"


class BatchItem(models.Model):
    """One request of a batch. What it asks and was answered is in the texts, by ``call_id``."""

    class Status(models.TextChoices):
        OPEN = "open", _("Open")
        SUCCEEDED = "succeeded", _("Succeeded")
        CACHED = "cached", _("Answered from the cache")
        ERRORED = "errored", _("Errored")
        CANCELED = "canceled", _("Canceled")
        EXPIRED = "expired", _("Expired")
        REFUSED = "refused", _("Refused: did not fit the budget")

    batch = models.ForeignKey(
        Batch, verbose_name=_("batch"), on_delete=models.CASCADE, related_name="items"
    )
    submission = models.ForeignKey(
        BatchSubmission,
        verbose_name=_("submission"),
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="items",
    )
    position = models.PositiveIntegerField(_("position"))
    key = models.CharField(
        _("key"), max_length=200, help_text=_("The item's id, as it was submitted.")
    )
    custom_id = models.CharField(_("id at the API"), max_length=64)
    call_id = models.UUIDField(_("call"), default=uuid.uuid4)
    status = models.CharField(_("status"), max_length=9, choices=Status, default=Status.OPEN)
    requested_model = models.CharField(_("requested model"), max_length=128)
    model = models.CharField(_("model"), max_length=128)
    max_tokens = models.PositiveIntegerField(_("most output tokens"), default=0)
    inference_geo = models.CharField(_("inference geography"), max_length=32, blank=True)
    may_fall_back = models.BooleanField(
        _("may fall back"), default=False, help_text=_("Whether another model may answer instead.")
    )
    decision = models.CharField(_("decision"), max_length=200, blank=True)
    reserved_nanousd = models.BigIntegerField(_("reserved"), default=0)
    error = models.CharField(_("error"), max_length=64, blank=True)
    handed = models.BooleanField(
        _("handed on"), default=False, help_text=_("Whether the callback has had the result.")
    )

    class Meta:
        verbose_name = _("item of a batch")
        verbose_name_plural = _("items of batches")
        ordering = ["batch", "position"]
        indexes: ClassVar = [
            models.Index(fields=["batch", "status"], name="ai_budget_item_status"),
            models.Index(fields=["call_id"], name="ai_budget_item_call"),
            # Not unique: to a collation two ids may be one that are two at the API.
            models.Index(fields=["submission", "custom_id"], name="ai_budget_item_custom_id"),
        ]
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["batch", "position"], name="ai_budget_item_position_unique"
            ),
        ]

    def __str__(self) -> str:
        return self.key

    @property
    def reserved_usd(self) -> Decimal:
        return money.to_usd(self.reserved_nanousd)
