"""Who pays: a context variable that views, tasks and libraries need not know about."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ai_budget.conf import conf
from ai_budget.values import Charge, Kind, Reservation, Settlement


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

    def charge(self) -> Charge:
        """Return the charge, with the default feature where none was said.

        May query the database: a lazy user is fetched here.
        """
        return Charge(
            feature=self.feature or conf.DEFAULT_FEATURE,
            user_id=user_id_of(self.user),
            subject=self.subject or "",
            tags=dict(self.tags),
        )


def user_id_of(user: Any) -> Any:
    """Return the primary key of a user; None for nobody and for visitors."""
    if user is None or not getattr(user, "is_authenticated", True):
        return None
    return getattr(user, "pk", user)


_payer: ContextVar[Payer | None] = ContextVar("ai_budget_payer", default=None)
_call: ContextVar[OpenCall | None] = ContextVar("ai_budget_call", default=None)


class charge:  # noqa: N801 - a verb that is used with ``with``
    """Say who pays for the calls made inside: ``with ai_budget.charge(feature="chat", user=u):``.

    Nested charges add to each other, the inner one wins. It reaches into ``await``, tasks,
    ``sync_to_async`` and ``asyncio.to_thread``; a thread of your own needs
    ``contextvars.copy_context().run``. A guarded client's own feature, user and subject win
    over it.
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
        # A stack, so that one object may be entered again inside itself.
        self._tokens: list[Token[Payer | None]] = []

    def __enter__(self) -> charge:
        self._tokens.append(_payer.set(self._payer.over(current_payer())))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        token = self._tokens.pop()
        # A generator may be closed in another context than it was started in, where there is
        # nothing to put back.
        with suppress(ValueError):
            _payer.reset(token)


def current_payer() -> Payer:
    """Return what the charges around this code say."""
    return _payer.get() or Payer()


@dataclass(slots=True)
class OpenCall:
    """A call of one of our verbs: what its attempts have in common, and what became of them.

    ``left_open`` names the parameters that the caller leaves to the feature's budget.
    """

    kind: Kind
    left_open: frozenset[str] = frozenset()
    call_id: uuid.UUID = field(default_factory=uuid.uuid4)
    attempts: int = 0
    counted: bool = False
    settled: list[tuple[Reservation, Settlement]] = field(default_factory=list)
    model: str = ""
    requested_model: str = ""
    outer: OpenCall | None = None

    @property
    def cost_nanousd(self) -> int:
        return sum(settlement.cost_nanousd for _, settlement in self.settled)

    def __enter__(self) -> OpenCall:
        self.outer = _call.get()
        _call.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _call.set(self.outer)


def current_call() -> OpenCall | None:
    """Return the call of our verbs that this code runs in."""
    return _call.get()
