"""How a batch comes to be reserved: every item decided and bounded, all of them taken at once.

Nothing counts and nothing is sent before the batch is opened.
"""

from __future__ import annotations

import json
import logging
import uuid
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from django.views.decorators.debug import sensitive_variables

from ai_budget import periods, signals
from ai_budget.conf import conf
from ai_budget.exceptions import (
    AIBudgetError,
    BudgetExceeded,
    FeatureDisabled,
    LedgerUnavailable,
    LimitReached,
    QuotaExceeded,
    UnboundedCall,
    UnpricedModel,
)
from ai_budget.guard.answers import Surroundings, place_of, setting_of
from ai_budget.guard.batch.fitting import fitting
from ai_budget.guard.batch.preparing import Preparation
from ai_budget.guard.batch.requests import (
    LARGEST_ITEM,
    LONGEST_KEY,
    Asked,
    ensure_key,
    plain,
    to_json,
)
from ai_budget.guard.batch.rows import (
    LEASE,
    ROWS_AT_ONCE,
    attempt_of,
    chunks,
    discard,
    of_key,
    release,
)
from ai_budget.guard.deciding import Decision, Outgoing, completed, decide
from ai_budget.guard.refusals import count_refusal
from ai_budget.guard.rules import create_if_new, read_rules
from ai_budget.guard.telling import tell, tell_parts, tell_recorded
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.base import Ledger
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallLog, CallText
from ai_budget.policy.limits import Rules, ensure_enabled, limits_in_force, only_counting
from ai_budget.savings import response_cache
from ai_budget.savings.response_cache import Kept
from ai_budget.values import (
    Amounts,
    Attempt,
    BalanceKey,
    Balances,
    Charge,
    Kind,
    Limit,
    Part,
    Reservation,
    Settlement,
    Status,
)

log = logging.getLogger("ai_budget")

OPEN_FOR = timedelta(hours=48)
"""After which the reservation of a batch counts as abandoned: a day to be sent, and the day after
which the API ends what it has not answered."""

_TRIES = 5
"""How often a part is taken that others leave no room for at the same moment."""

_SEVERAL = "several models"

_LONGEST_MODEL = 128

_OF_AN_ITEM = (TypeError, ValueError, UnboundedCall, UnpricedModel)
"""What is wrong with one item, and is told with its id."""


class BatchOpening:
    """A batch that is being prepared: ``add`` its items, then ``open`` it, or ``discard`` it."""

    def __init__(
        self,
        charge: Charge,
        *,
        on_result: str = "",
        idempotency_key: str | None = None,
        resubmits: Batch | None = None,
        around: Surroundings | None = None,
        workspace_named: bool = False,
        at_once: bool = False,
    ) -> None:
        """Begin a batch; raises what reading the budgets of ``charge`` raises.

        ``around`` is what an ordinary call would be sent with: answers to it are found, if the
        feature keeps any. None looks nowhere. ``at_once`` says that all of it is sent at once,
        however large it is.
        """
        self._charge = charge
        self._around = around
        self._workspace_named = workspace_named
        self._ledger = ledgers.current()
        with self._telling():
            self._ledger.ensure_durable()
            self._at = self._ledger.now()
            self._rules = self._read_rules(self._at)
        self._limits = limits_in_force(charge, self._rules, at=self._at, zone=conf.TIME_ZONE)
        self._books = _Remembered(self._ledger)
        self._setting = None if around is None else setting_of(None, self._rules.feature)
        self._holds = array("q")
        self._keys: set[str] = set()
        self._hits: dict[int, tuple[int, str]] = {}  # what each saves, and why it stopped
        self._rates: dict[str, str] = {}
        self._models: set[str] = set()
        self.batch = Batch(
            feature_id=charge.feature,
            category=self._rules.category_name,
            user_id=charge.user_id,
            subject=charge.subject,
            tags=dict(charge.tags),
            on_result=on_result,
            resubmits=resubmits,
            created_at=self._at,
            touched_at=self._at,
        )
        self._prepared = Preparation(self.batch, at_once=at_once)
        # Not before it is opened: until then the same may be submitted elsewhere.
        self.batch.idempotency_key = idempotency_key

    def _read_rules(self, at: datetime) -> Rules:
        rules = read_rules(self._charge, at=at)
        try:
            ensure_enabled(rules)
        except FeatureDisabled:
            count_refusal(self._ledger, self._charge, at)
            raise
        return rules

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell of a refusal."""
        try:
            yield
        except AIBudgetError as error:
            tell(signals.call_refused, sender=BatchOpening, charge=self._charge, error=error)
            raise

    # Preparing

    @sensitive_variables()
    def add(self, asked: Asked) -> dict[str, Any] | None:
        """Decide on an item and keep it; return what is to be sent, None for a cached answer.

        Raises ``TypeError`` and ``ValueError`` for what is no request, and what ``decide`` raises
        for one without a price or a bound, with the item's id before it.
        """
        with self._telling():
            try:
                return self._add(asked)
            except _OF_AN_ITEM as error:
                # What is too long for an id may be a prompt.
                known = len(asked.key) <= LONGEST_KEY
                name = repr(asked.key) if known else f"at position {len(self._holds)}"
                kind = next(kind for kind in _OF_AN_ITEM if isinstance(error, kind))
                raise kind(f"Item {name}: {error}") from None

    def _add(self, asked: Asked) -> dict[str, Any] | None:
        ensure_key(asked.key)
        if asked.key in self._keys:
            raise ValueError("Two items of a batch have this id.")
        params = plain(asked.params)
        position = len(self._holds)
        item = BatchItem(
            batch=self.batch,
            position=position,
            key=asked.key,
            custom_id=asked.custom_id or f"{self.batch.call_id.hex}-{position}",
            call_id=uuid.uuid4(),
        )
        text = CallText(call_id=item.call_id, kept_at=self._at)
        hit = self._look_up(params)
        if hit is not None:
            self._keep_hit(item, text, params, hit)
            body = None
        else:
            body = self._keep(item, text, self._decide(params))
        self._keys.add(asked.key)
        return body

    def _decide(self, params: Mapping[str, Any]) -> Decision:
        outgoing = Outgoing(
            body=params,
            stream=False,
            retries=0,
            key="",
            timeout=None,
            provider="anthropic",
            region="",
            workspace_named=self._workspace_named,
            batch=True,
        )
        return decide(
            outgoing,
            self._charge,
            self._rules,
            ledger=self._books,
            at=self._at,
            limits=self._limits,
        )

    def _keep(self, item: BatchItem, text: CallText, decision: Decision) -> dict[str, Any]:
        """Fill in the rows of an item that is to be sent; return what is sent."""
        body, model = decision.body, decision.choice.model
        text.request = to_json(body)
        size = len(text.request.encode()) + 2 * len(item.custom_id) + 40
        if size > LARGEST_ITEM:
            raise ValueError("The request is larger than the 256 MB that the API takes.")
        item.requested_model, item.model = decision.requested_model, model
        item.max_tokens = body["max_tokens"]
        item.inference_geo = str(body.get("inference_geo") or "")[: _length("inference_geo")]
        item.may_fall_back = bool(body.get("fallbacks"))
        item.decision = _joined(decision.notes)
        item.reserved_nanousd = decision.bound.nanousd
        self._prepared.send(item, text, size=size)
        if self._rates.setdefault(model, decision.rates.reference) != decision.rates.reference:
            raise AIBudgetError(f"The prices of {model} have changed meanwhile: submit it again.")
        self._models.add(model)
        self._holds.append(decision.bound.nanousd)
        return body

    def _look_up(self, params: Mapping[str, Any]) -> Kept | None:
        """Return the answer from the cache."""
        if self._setting is None or self._around is None:
            return None
        body, _ = completed(params, self._rules)
        if not isinstance(body["max_tokens"], int):
            return None  # refused with the bound, which says why
        scope = self._setting.scope
        place = place_of(body, self._around, self._charge, self._rules, scope=scope, stream=False)
        if place is None:
            return None
        return response_cache.look_up(place, at=self._at, ttl=self._setting.ttl)

    def _keep_hit(
        self, item: BatchItem, text: CallText, params: Mapping[str, Any], kept: Kept
    ) -> None:
        """Fill in the rows of an item that the response cache answers."""
        body, notes = completed(params, self._rules)
        text.request, text.message = to_json(body), kept.message
        item.requested_model, item.model = str(body["model"]), kept.model
        item.max_tokens = body["max_tokens"]
        scope = "" if self._setting is None else self._setting.scope
        item.decision = _joined([*notes, f"response cache, {scope}"])
        self._prepared.keep(item, text)
        stop_reason = str(json.loads(kept.message).get("stop_reason") or "")
        self._hits[item.position] = (kept.cost_nanousd, stop_reason)
        self._holds.append(0)

    def ensure_some(self) -> None:
        """Raise ``ValueError`` where nothing was added."""
        if not self._holds:
            raise ValueError("A batch needs at least one request.")

    def discard(self) -> None:
        """Give back and delete what was prepared, unless it was opened."""
        with suppress(LedgerUnavailable):  # the tick will
            discard(self.batch)

    # Opening

    def open(self, *, allow_partial: bool = False, sending: bool = False) -> Batch:
        """Reserve all items at once, and leave the batch to whoever sends it.

        Raises ``BudgetExceeded`` and its kin with how many items would fit; with
        ``allow_partial`` as many as fit are taken, in their order, and the others are refused.
        ``sending`` says that the caller sends it itself, at once. Where another batch has the
        idempotency key by now, this one is discarded and the other is returned.
        """
        with self._telling():
            self._prepared.write()
            at = self._ledger.now()
            self._rules = self._read_rules(at)
            self.batch.category = self._rules.category_name
            try:
                reservation, chosen = self._reserve(at, allow_partial=allow_partial)
            except LimitReached as error:
                other = self._other()  # may have taken what is missing
                if other is None:
                    count_refusal(self._ledger, self._charge, at, scope=error.scope)
                    raise
                self.discard()
                return other
            create_if_new(self._rules.feature)
            if not self._open_or_release(reservation, chosen, at=at, sending=sending):
                other = self._other()
                if other is None:
                    raise LedgerUnavailable(
                        "The batch with this idempotency key cannot be read. Nothing was sent."
                    )
                self.discard()
                return other
            self._book_hits(reservation, at)
            return self.batch

    def _other(self) -> Batch | None:
        key = self.batch.idempotency_key
        return None if key is None else of_key(key, self._charge)

    def _reserve(
        self, at: datetime, *, allow_partial: bool
    ) -> tuple[Reservation | None, Sequence[int]]:
        """Take what the items may cost; return the reservation, and the places that it is for."""
        limits = limits_in_force(self._charge, self._rules, at=at, zone=conf.TIME_ZONE)
        chosen = [place for place in range(len(self._holds)) if place not in self._hits]
        counting = len(self._hits) if self._rules.feature.cache_counts else 0
        tries = _TRIES if allow_partial else 1
        while True:
            tries -= 1
            if not chosen:
                if not counting:
                    return None, []
                # As elsewhere, an answer from the cache asks for no money.
                limits = [only_counting(it) for it in limits if isinstance(it, Limit)]
            amounts = Amounts(
                nanousd=sum(self._holds[place] for place in chosen), calls=len(chosen) + counting
            )
            try:
                return self._ledger.reserve(limits, amounts, self._attempt(chosen, at)), chosen
            except (BudgetExceeded, QuotaExceeded) as error:
                fit = fitting(chosen, self._holds, limits, self._ledger, calls=counting)
                if not tries or not (fit or self._hits):
                    count = len(fit) + len(self._hits)
                    raise type(error)(replace(error.refusal, items_fit=count)) from None
                chosen = fit

    def _open_or_release(
        self, reservation: Reservation | None, chosen: Sequence[int], *, at: datetime, sending: bool
    ) -> bool:
        try:
            return self._open(chosen, at=at, sending=sending)
        except LedgerUnavailable:
            raise  # it may be open, or the tick gives it up
        except AIBudgetError:
            # Given up before it was reserved: nobody else knows that there is something to release.
            if reservation is not None:
                release(self._ledger, reservation.id)
            raise

    def _attempt(self, chosen: Sequence[int], at: datetime) -> Attempt:
        """Return the row that holds what the open items may cost."""
        model = next(iter(self._models)) if len(self._models) == 1 else _SEVERAL
        return Attempt(
            call_id=self.batch.call_id,
            number=0,
            charge=self._charge,
            category=self._rules.category_name,
            kind=Kind.BATCH,
            requested_model=model,
            model=model,
            provider="anthropic",
            max_tokens=0,
            speed="",
            inference_geo="",
            decision=f"batch of {len(chosen)}",
            rates=self._rates.get(model, ""),
            reserved_at=at,
            day=periods.day(at, conf.TIME_ZONE).first_day,
            deadline=at + OPEN_FOR,
            cache_checked=self._setting is not None,
        )

    def _open(self, chosen: Sequence[int], *, at: datetime, sending: bool) -> bool:
        """Make it a batch that counts; say whether no other one has its idempotency key."""
        batch = self.batch
        refused = set(range(len(self._holds))).difference(chosen, self._hits)
        batch.status = Batch.Status.OPEN
        batch.total = len(self._holds)
        batch.cached, batch.refused = len(self._hits), len(refused)
        batch.rates = self._rates
        held = sum(self._holds[place] for place in chosen)
        batch.reserved_nanousd = batch.held_nanousd = held
        batch.reserved_at = batch.touched_at = at
        batch.day = periods.day(at, conf.TIME_ZONE).first_day
        batch.deadline = at + OPEN_FOR
        sent = {
            "status": BatchSubmission.Status.SENDING if sending else BatchSubmission.Status.WAITING,
            "sent_at": at if sending else None,
            "next_look_at": at + LEASE if sending else at,
        }
        return self._prepared.open(refused=refused, cached=self._hits, sending=sent)

    def _book_hits(self, reservation: Reservation | None, at: datetime) -> None:
        """Journal what the cache answers. It costs nothing, and the batch is open already."""
        counts = self._rules.feature.cache_counts
        items = BatchItem.objects.using(conf.LEDGER_DATABASE).filter(batch=self.batch)
        try:
            for places in chunks(self._hits, ROWS_AT_ONCE):
                parts = [self._part(item, at) for item in items.filter(position__in=places)]
                if reservation is not None and counts:
                    booked = self._ledger.settle_parts(reservation.id, partial(_unbooked, parts))
                    tell_parts(reservation.id, booked, sender=BatchOpening)
                    continue
                for part in parts:
                    self._ledger.record(part.attempt, part.settlement)
                    tell_recorded(part.attempt, part.settlement, sender=BatchOpening)
        except LedgerUnavailable as error:
            log.error("Answers from the cache could not be booked: %s", error)

    def _part(self, item: BatchItem, at: datetime) -> Part:
        saved, stop_reason = self._hits[item.position]
        return Part(
            attempt=attempt_of(
                item, self.batch, charge=self._charge, at=at, rates="", cache_checked=True
            ),
            held_nanousd=0,
            settlement=Settlement(
                status=Status.CACHED,
                cost_nanousd=0,
                saved_nanousd=saved,
                saved_reason="response cache",
                stop_reason=stop_reason,
            ),
        )


class _Remembered:
    """Balances as they were when they were first asked for."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: dict[BalanceKey, Balances] = {}

    def balances(self, keys: Iterable[BalanceKey], /) -> Mapping[BalanceKey, Balances]:
        wanted = set(keys)
        if not wanted <= self._known.keys():
            nothing = dict.fromkeys(wanted, Balances())
            self._known.update({**nothing, **self._ledger.balances(wanted)})
        return {key: self._known[key] for key in wanted}


def _unbooked(parts: list[Part], row: CallLog) -> list[Part]:
    """Return those without a row: the connection may have broken after they were booked."""
    rows = CallLog.objects.using(conf.LEDGER_DATABASE)
    known = rows.filter(call_id__in=[part.attempt.call_id for part in parts])
    booked = set(known.values_list("call_id", flat=True))
    return [part for part in parts if part.attempt.call_id not in booked]


def _joined(notes: Iterable[str]) -> str:
    return "; ".join(notes)[: _length("decision")]


def _length(name: str) -> int:
    field: Any = BatchItem._meta.get_field(name)
    return int(field.max_length)
