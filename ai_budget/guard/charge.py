"""Who pays: a context variable that views, tasks and libraries need not know about."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.db.backends.base.operations import BaseDatabaseOperations
from django.db.models import Model

from ai_budget import periods
from ai_budget.arguments import LONGEST_FEATURE, checked_caller, checked_tags, checked_text
from ai_budget.conf import conf
from ai_budget.exceptions import InvalidArgument
from ai_budget.values import Charge, Kind, Reservation, Settlement, Usage

HELPERS = frozenset({Kind.ROUTER, Kind.SUMMARY})
"""Requests that only help a call. They are none in quotas, and need room for the one they help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Payer:
    """The parts of a charge that somebody has said; what is None is left to others.

    ``user`` may be lazy: it is looked at only when a call is made.
    """

    feature: str | None = None
    user: Any = None
    subject: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    def over(self, other: Payer) -> Payer:
        """Return what this one says, and where it says nothing, the other."""
        return Payer(
            feature=self.feature if self.feature is not None else other.feature,
            user=self.user if self.user is not None else other.user,
            subject=self.subject if self.subject is not None else other.subject,
            tags={**other.tags, **self.tags},
        )

    def __post_init__(self) -> None:
        if not isinstance(self.tags, Mapping):
            raise InvalidArgument("tags", "have to be a mapping of texts to texts.")

    def feature_or_default(self) -> str:
        """Return the feature, or the settings' where none was said. Raises ``InvalidArgument``."""
        return checked_text(self.feature or conf.DEFAULT_FEATURE, "feature", most=LONGEST_FEATURE)

    def charge(self) -> Charge:
        """Return the charge, with the default feature where none was said.

        May query the database: a lazy user is fetched here. Raises ``InvalidArgument`` for what
        could not be put on record.
        """
        return Charge(
            feature=self.feature_or_default(),
            user_id=user_id_of(self.user),
            subject=checked_caller(self.subject or "", "subject"),
            tags=checked_tags(self.tags),
        )


def user_id_of(user: Any) -> Any:
    """Return the primary key of a user; None for nobody and for visitors.

    A key that is given as such is brought to its own type: one user has one balance. Raises
    ``InvalidArgument`` for who is not in the database, for another model's instance, and for what
    is no key.
    """
    if user is None or not getattr(user, "is_authenticated", True):
        return None
    model = get_user_model()
    if isinstance(user, Model) and not isinstance(user, model):
        raise InvalidArgument("user", f"is a {type(user).__name__}, not a {model.__name__}.")
    if not hasattr(user, "pk"):
        return _user_key(user)
    if user.pk is None:
        raise InvalidArgument("user", "has no primary key: it was not saved yet, or was deleted.")
    return _user_key(user.pk)


def _user_key(given: Any) -> Any:
    """Return a primary key as its field takes it, from one or from its text."""
    field = get_user_model()._meta.pk
    expected = f"has to be a user or a user's primary key, not {type(given).__name__}."
    try:
        key = field.to_python(given)
    except ValidationError:
        raise InvalidArgument("user", expected) from None
    same = isinstance(given, type(key)) and not isinstance(given, bool)
    if not (same or isinstance(given, str)):
        raise InvalidArgument("user", expected)
    least, most = _INTEGERS.get(field.get_internal_type(), (None, None))
    if least is not None and not least <= key <= most:
        raise InvalidArgument("user", "has a primary key that is larger than its column.")
    checked_caller(str(key), "user")
    return key


_INTEGERS: Mapping[str, tuple[int, int]] = BaseDatabaseOperations.integer_field_ranges
"""The least and largest number of each kind of column, as every database that has bounds has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """One charge that is in force, what it says over the ones around it, and those."""

    owner: charge
    payer: Payer
    outer: Level | None


_level: ContextVar[Level | None] = ContextVar("ai_budget_level", default=None)
_call: ContextVar[OpenCall | None] = ContextVar("ai_budget_call", default=None)


class charge:  # noqa: N801 - a verb that is used with ``with``
    """Say who pays for the calls made inside: ``with ai_budget.charge(feature="chat", user=u):``.

    Nested charges add to each other, the inner one wins. It reaches into ``await``, tasks,
    ``sync_to_async`` and ``asyncio.to_thread``; a thread of your own needs
    ``contextvars.copy_context().run``. A guarded client's own feature, user and subject win
    over it. One object may be entered again, inside itself and by many threads at once.
    """

    def __init__(
        self,
        *,
        feature: str | None = None,
        user: Any = None,
        subject: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._payer = Payer(feature=feature, user=user, subject=subject, tags=tags or {})

    def __enter__(self) -> charge:
        _level.set(self._over(_level.get()))
        return self

    def __exit__(self, *error: object) -> None:
        _level.set(self._left(_level.get()))

    def _over(self, outer: Level | None) -> Level:
        payer = self._payer if outer is None else self._payer.over(outer.payer)
        return Level(owner=self, payer=payer, outer=outer)

    def _left(self, level: Level | None) -> Level | None:
        """Return the levels without the innermost of this charge's.

        It need not be the last one: a generator may be closed while the code that reads it
        has charges of its own. In another context than it was entered in there is none.
        """
        if level is None or level.owner is self:
            return level and level.outer
        outer = self._left(level.outer)
        return level if outer is level.outer else level.owner._over(outer)


def current_payer() -> Payer:
    """Return what the charges around this code say."""
    level = _level.get()
    return Payer() if level is None else level.payer


def current_level() -> Level | None:
    """Return the charges that are in force here."""
    return _level.get()


def exchange_levels(level: Level | None) -> Level | None:
    """Put other charges in force, and return those that were."""
    before = _level.get()
    _level.set(level)
    return before


@dataclass(slots=True)
class OpenCall:
    """A call of one of our verbs: what its attempts have in common, and what became of them.

    ``left_open`` names the parameters that the caller leaves to the feature's budget. ``wait``
    is how many seconds all its attempts together may wait for limits, from the first refusal on.
    ``cache`` and ``ttl`` are how its answer is kept, where it says so itself. ``routed_from`` is
    the model that it would have asked for without its router, and ``notes`` say why.
    """

    kind: Kind
    left_open: frozenset[str] = frozenset()
    wait: float = 0.0
    cache: str | None = None
    ttl: float | None = None
    routed_from: str = ""
    notes: tuple[str, ...] = ()
    deadline: float | None = None
    call_id: uuid.UUID = field(default_factory=uuid.uuid4)
    attempts: int = 0
    counted: bool = False
    settled: list[tuple[Reservation, Settlement]] = field(default_factory=list)
    model: str = ""
    requested_model: str = ""
    cached: bool = False
    outer: OpenCall | None = None

    @property
    def cost_nanousd(self) -> int:
        return sum(settlement.cost_nanousd for _, settlement in self.settled)

    @property
    def usage(self) -> Usage:
        """What the last attempt was booked with; nothing for an answer from the cache."""
        return Usage() if self.cached or not self.settled else self.settled[-1][1].usage

    def helper(self, kind: Kind) -> OpenCall:
        """Return a call that only helps this one: its own request, on this one's bill."""
        return OpenCall(
            kind=kind,
            call_id=self.call_id,
            attempts=self.attempts,
            settled=self.settled,
        )

    def patience(self) -> float:
        """Return how many seconds it may still wait; the first time they begin to run."""
        now = periods.monotonic()
        if self.deadline is None:
            self.deadline = now + self.wait
        return max(0.0, self.deadline - now)

    def __enter__(self) -> OpenCall:
        self.outer = _call.get()
        _call.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _call.set(self.outer)


@contextmanager
def outside_calls() -> Iterator[None]:
    """Run code of others, whose calls are their own."""
    inside = _call.get()
    _call.set(None)
    try:
        yield
    finally:
        _call.set(inside)


def current_call() -> OpenCall | None:
    """Return the call of our verbs that this code runs in."""
    return _call.get()
