"""One reservation for many items, which are over by and by: each chunk of them is one step.

Its row holds what the open items may cost, and counts them; an item that is over has a row of
its own. So whatever is open and whatever is over, the journal adds up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from ai_budget import money
from ai_budget.ledger.journal import journal
from ai_budget.models import CallLog
from ai_budget.values import Amounts, Part, Status

log = logging.getLogger("ai_budget")

PARTED = frozenset({Status.RESERVED.value, Status.ESTIMATED.value})
"""How a reservation stands whose items can be booked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Parts that were booked together. ``row`` is as it was before, ``left`` what it has now.

    ``held`` is what the row has less of in nano-dollars, ``cost`` what the parts' own rows say,
    ``released`` how many calls were given back. ``left`` is None where nothing is.
    """

    row: CallLog
    parts: Sequence[Part]
    held: int
    cost: int
    released: int
    left: Amounts | None

    @property
    def before(self) -> Amounts:
        return Amounts(nanousd=self.row.reserved_nanousd, calls=self.row.counted)

    @property
    def spent(self) -> int:
        """What is spent more now: of an estimate, everything was."""
        return self.cost - (self.held if self.row.status == Status.ESTIMATED else 0)

    @property
    def given_back(self) -> int:
        """What is held less now: of an estimate, nothing was."""
        return 0 if self.row.status == Status.ESTIMATED else self.held

    def told(self) -> Sequence[Part]:
        """Say which bounds were too low, and return the parts."""
        for part in self.parts:
            cost = part.settlement.cost_nanousd
            if cost > part.held_nanousd:
                log.error(
                    "The bound of call %s was too low: %s were reserved and %s were spent.",
                    part.attempt.call_id,
                    money.format_usd(part.held_nanousd, decimals=6),
                    money.format_usd(cost, decimals=6),
                )
        return self.parts


def book_parts(
    connection: BaseDatabaseWrapper,
    cursor: Any,
    reservation: int,
    claim: Callable[[CallLog], Sequence[Part]],
    now: datetime,
    *,
    among: Collection[str] = PARTED,
) -> Chunk | None:
    """Write the rows of a chunk inside a transaction, and take it from the reservation's row.

    Return what the balances have to be changed by; None where the row has another status than
    one ``among`` these.
    """
    row = _lock(connection, cursor, reservation)
    if row is None or row.status not in among:
        return None
    parts = claim(row)
    billed = [part for part in parts if part.settlement.status is not Status.RELEASED]
    chunk = _chunk(row, parts, billed)
    if parts:
        rows = journal(connection)
        rows.write_many(cursor, rows.prepare_parts(row, billed, now))
        _take_from(connection, chunk, now)
        rows.mark(cursor, row.pk)
    return chunk


def _lock(connection: BaseDatabaseWrapper, cursor: Any, reservation: int) -> CallLog | None:
    rows = CallLog.objects.using(connection.alias).filter(pk=reservation)
    if connection.vendor == "sqlite":
        # A transaction that reads first may not write any more.
        cursor.execute(
            f"UPDATE {journal(connection).calls} SET counted = counted WHERE id = %s", [reservation]
        )
        return rows.first()
    return rows.select_for_update().first()


def _chunk(row: CallLog, parts: Sequence[Part], billed: Sequence[Part]) -> Chunk:
    estimated = row.status == Status.ESTIMATED
    has = row.cost_nanousd or 0 if estimated else row.reserved_nanousd
    held = sum(part.held_nanousd for part in parts)
    calls = row.counted - len(parts)
    if calls < 0 or held > has:
        raise ValueError(
            f"{len(parts)} parts that hold {held} nano-dollars are more than is left of "
            f"reservation {row.pk}: {row.counted}, and {has} nano-dollars."
        )
    over = not calls
    return Chunk(
        row=row,
        parts=parts,
        # With the last item all that is left is free.
        held=has if over else held,
        cost=sum(part.settlement.cost_nanousd for part in billed),
        released=len(parts) - len(billed),
        left=None if over else Amounts(nanousd=max(0, row.reserved_nanousd - held), calls=calls),
    )


def _take_from(connection: BaseDatabaseWrapper, chunk: Chunk, now: datetime) -> None:
    row, left = chunk.row, chunk.left
    changes: dict[str, Any]
    if left is None:
        changes = {
            "status": Status.RELEASED.value,
            "cost_nanousd": 0,
            "reserved_nanousd": 0,
            "counted": 0,
            "settled_at": now,
        }
    else:
        changes = {"reserved_nanousd": left.nanousd, "counted": left.calls}
        if row.status == Status.ESTIMATED:
            changes["cost_nanousd"] = (row.cost_nanousd or 0) - chunk.held
    CallLog.objects.using(connection.alias).filter(pk=row.pk).update(**changes)
