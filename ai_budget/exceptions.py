"""What can go wrong, each with a type of its own.

AIBudgetError
 ├── LimitReached                 a limit said no; carries the numbers
 │    ├── BudgetExceeded          the money of a feature, a category or the site
 │    ├── QuotaExceeded           what one user or subject may use
 │    └── RateLimited             requests or tokens per minute
 ├── FeatureDisabled              the feature is paused, or unknown and refused
 ├── UnpricedModel                no price is known for this model
 ├── UnclassifiedUsage            the answer reports usage that nobody has priced yet
 ├── UnboundedCall                the most this request can cost cannot be told
 ├── UnpricedEndpoint             an endpoint that costs money in ways nobody has priced yet
 ├── InvalidArgument              an argument that could not be put on record
 ├── LedgerUnavailable            balances cannot be read or written now
 └── CallInsideTransaction        the caller's transaction could undo the record of the spend

Messages name features, models, limits and parameters. They never carry prompt text or keys.
The guard raises all of them ``from None``: the SDK retries an exception that has one of its
own connection errors in its ``__cause__`` chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from ai_budget import money


class AIBudgetError(Exception):
    """The base of every error that ai_budget raises on purpose."""


class LimitReached(AIBudgetError):
    """A limit would have been passed, so nothing was sent.

    ``measure`` is "nanousd", "calls", "requests" or "tokens", and tells the unit of ``limit``,
    ``spent``, ``held`` (by calls in flight) and ``requested``. ``exhausted`` means that what is
    spent leaves no room for this call until ``resets_at``; otherwise the limit is only
    *saturated* by calls in flight, and trying again in ``retry_after`` seconds may succeed.
    ``delay`` is the soonest that trying again may, in seconds and parts of them; None where the
    call is larger than the whole limit, so that no waiting helps. ``retry_after`` is for people
    and for the header, in whole seconds and always a number. ``items_fit`` is how many items of a
    batch would fit; None for any other call.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.describe())
        self.refusal = refusal
        self.scope = refusal.scope
        self.period = refusal.period
        self.measure = refusal.measure
        self.limit = refusal.limit
        self.spent = refusal.spent
        self.held = refusal.held
        self.requested = refusal.requested
        self.exhausted = refusal.exhausted
        self.resets_at = refusal.resets_at
        self.retry_after = refusal.retry_after
        self.delay = refusal.delay
        self.items_fit = refusal.items_fit

    @property
    def saturated(self) -> bool:
        """Whether only calls in flight are in the way."""
        return not self.exhausted

    def __reduce__(self) -> tuple[type[LimitReached], tuple[Refusal]]:
        # Exceptions cross process borders (Celery, multiprocessing) by their arguments.
        return type(self), (self.refusal,)


class BudgetExceeded(LimitReached):
    """The money of a feature, a category or the whole site does not cover this call."""


class QuotaExceeded(LimitReached):
    """A user or subject has used what they may use."""


class RateLimited(LimitReached):
    """Too many requests or tokens in too short a time."""


class FeatureDisabled(AIBudgetError):
    """The feature is paused by its budget, or unknown and the settings refuse such."""


class UnpricedModel(AIBudgetError):
    """No price is known for the model, so no budget can hold it."""


class UnclassifiedUsage(AIBudgetError):
    """The usage has an entry of a type that has no price rule."""


class UnboundedCall(AIBudgetError):
    """The most that the request can cost cannot be told in advance."""


class UnpricedEndpoint(AIBudgetError):
    """The endpoint may cost money and has no price rule, so a guarded client refuses it."""


class InvalidArgument(AIBudgetError, ValueError):
    """A name or another argument that cannot be put on record; ``argument`` is which one.

    It is raised before anything is reserved, and on every store alike.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument} {problem}")
        self.argument = argument
        self.problem = problem

    def __reduce__(self) -> tuple[type[InvalidArgument], tuple[str, str]]:
        return type(self), (self.argument, self.problem)


class LedgerUnavailable(AIBudgetError):
    """The store of the balances does not answer, or did not within its time limit."""


class CallInsideTransaction(AIBudgetError):
    """A paid call inside the caller's transaction, whose rollback would forget the spend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Which limit said no, and the numbers it decided by.

    ``delay`` is when trying again may succeed, in seconds; None where the call is larger than
    the whole limit. ``items_fit`` is how many items of a batch would fit, in its order; None for
    other calls.
    """

    scope: str
    period: str
    measure: str
    limit: int
    spent: int
    held: int
    requested: int
    exhausted: bool
    resets_at: datetime
    retry_after: int
    delay: float | None = None
    items_fit: int | None = None

    def describe(self) -> str:
        state = "is held by calls in flight"
        if self.exhausted:
            some_left = self.spent + self.held < self.limit
            state = "has too little left" if some_left else "is used up"
        what, fit = "call", ""
        if self.items_fit is not None:
            what, fit = "batch", f" {self.items_fit:,} of its items would fit."
        return (
            f"The {_PERIODS.get(self.period, self.period)} limit of {self.scope} {state}: "
            f"limit {self._show(self.limit)}, spent {self._show(self.spent)}, "
            f"held {self._show(self.held)}, this {what} needs up to {self._show(self.requested)}; "
            f"it resets at {self.resets_at:%Y-%m-%d %H:%M %Z}.{fit}"
        )

    def _show(self, amount: int) -> str:
        if self.measure == "nanousd":
            return money.format_usd(amount, decimals=4)
        return f"{amount:,} {self.measure}"


_PERIODS = {"day": "daily", "month": "monthly", "minute": "per-minute"}
