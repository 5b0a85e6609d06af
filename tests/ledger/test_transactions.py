"""Nothing that the caller can roll back: a spend is committed before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

import pytest
from django.db import connection, connections, transaction
from django.test import TestCase
from pytest_django import DjangoDbBlocker

from ai_budget.exceptions import BudgetExceeded, CallInsideTransaction
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, SpendWindow
from tests.ledger.given import (
    CHAT,
    NOON,
    limit,
    limits_of,
    reserve,
    settle,
    settled,
    sums_of_calls,
    sums_of_windows,
)

Result = TypeVar("Result")
WINDOW = ("feature:chat", "day", NOON.date().isoformat())


def elsewhere(read: Callable[[], Result]) -> Result:
    """What another connection sees, which is what is committed."""

    def seen() -> Result:
        try:
            return read()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=1) as other:
        return other.submit(seen).result()


@pytest.fixture
def no_autocommit(transactional_db: None) -> Iterator[None]:
    transaction.set_autocommit(False)
    try:
        yield
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)


# Refused inside a transaction --------------------------------------------------------------------


@pytest.mark.django_db
@pytest.mark.parametrize("depth", [1, 2])
def test_inside_a_transaction_nothing_is_reserved(depth: int) -> None:
    with ExitStack() as stack:
        for _ in range(depth):
            stack.enter_context(transaction.atomic())
        with pytest.raises(CallInsideTransaction):
            reserve([limit(None)])

    assert not CallLog.objects.exists()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "block",
    [
        transaction.atomic(),
        transaction.atomic(durable=True),
        transaction.atomic(savepoint=False),
    ],
)
def test_any_kind_of_transaction_is_one(block: transaction.Atomic) -> None:
    with block, pytest.raises(CallInsideTransaction):
        reserve([limit(None)])


@pytest.mark.usefixtures("no_autocommit")
def test_a_connection_that_commits_when_told_is_a_transaction() -> None:
    with pytest.raises(CallInsideTransaction):
        reserve([limit(None)])


@pytest.mark.django_db
def test_inside_a_transaction_nothing_is_settled() -> None:
    reservation = reserve([limit(None)], 10)

    with transaction.atomic(), pytest.raises(CallInsideTransaction):
        settle(reservation, settled(5))

    assert sums_of_windows()[WINDOW] == (0, 10, 1)


@pytest.mark.django_db
def test_a_caller_can_ask_beforehand() -> None:
    ledgers.current().ensure_durable()

    with transaction.atomic(), pytest.raises(CallInsideTransaction):
        ledgers.current().ensure_durable()


@pytest.mark.django_db
def test_the_refusal_says_what_to_do() -> None:
    with transaction.atomic(), pytest.raises(CallInsideTransaction) as raised:
        reserve([limit(None)])

    hint = "SQLite has no second" if connection.vendor == "sqlite" else "LEDGER_DATABASE"
    assert hint in str(raised.value)
    assert "'default'" in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.django_db
def test_balances_can_be_read_inside_a_transaction() -> None:
    reserve([limit(None)], 10)

    with transaction.atomic():
        found = ledgers.current().balances([limit(None).key])

    assert found[limit(None).key].held_nanousd == 10


@pytest.mark.django_db
def test_after_a_transaction_the_ledger_works_again() -> None:
    with transaction.atomic():
        pass

    reserve([limit(None)])


# The transaction that a test is wrapped in -------------------------------------------------------


@pytest.mark.django_db
def test_the_transaction_around_a_test_is_no_callers() -> None:
    assert connection.in_atomic_block

    settle(reserve(limits_of(CHAT), 10), settled(5))

    assert sums_of_windows() == sums_of_calls()


class InsideATestCaseTests(TestCase):
    """Django's own wrapper, with a row of the whole class beneath."""

    @classmethod
    def setUpTestData(cls) -> None:
        reserve([limit(None)], 10)

    def test_the_transaction_around_a_test_case_is_no_callers(self) -> None:
        reserve([limit(None)], 10)

        assert sums_of_windows()[WINDOW] == (0, 20, 2)

    def test_what_a_test_reserved_is_rolled_back_with_it(self) -> None:
        assert sums_of_windows()[WINDOW] == (0, 10, 1)

    def test_a_refusal_leaves_the_transaction_of_the_test_usable(self) -> None:
        with pytest.raises(BudgetExceeded):
            reserve([limit(5)], 10)

        reserve([limit(None)], 10)


# Durable -----------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_what_is_reserved_is_seen_by_others_at_once() -> None:
    reserve([limit(None)], 10)

    assert elsewhere(sums_of_windows)[WINDOW] == (0, 10, 1)
    assert elsewhere(CallLog.objects.count) == 1
    assert not connection.in_atomic_block


@pytest.mark.django_db(transaction=True)
def test_what_is_settled_is_seen_by_others_at_once() -> None:
    settle(reserve(limits_of(CHAT), 10), settled(5))

    assert elsewhere(sums_of_windows)[WINDOW] == (5, 0, 1)
    assert elsewhere(sums_of_calls) == elsewhere(sums_of_windows)


@pytest.mark.django_db(transaction=True)
def test_a_refusal_is_counted_where_others_see_it() -> None:
    ledgers.current().count_refusal([limit(5).key])

    assert elsewhere(lambda: SpendWindow.objects.get().refused) == 1
    assert elsewhere(CallLog.objects.count) == 0


@pytest.mark.django_db(transaction=True)
def test_a_later_rollback_of_the_caller_forgets_nothing() -> None:
    settle(reserve([limit(None)], 10), settled(5))

    with transaction.atomic():
        transaction.set_rollback(True)

    assert sums_of_windows()[WINDOW] == (5, 0, 1)


@pytest.mark.django_db(transaction=True)
def test_while_a_call_is_on_its_way_nothing_is_locked() -> None:
    reserve([limit(None)], 10)

    elsewhere(lambda: settle(reserve([limit(None)], 10), settled(5)))

    assert sums_of_windows()[WINDOW] == (5, 10, 2)


# A second alias ----------------------------------------------------------------------------------


@pytest.fixture
def second_alias(
    django_db_setup: None, django_db_blocker: DjangoDbBlocker, settings: Any
) -> Iterator[None]:
    """A second connection to the same database, which is what the hint tells people to make.

    A test case would refuse an alias that it did not know beforehand.
    """
    connections.settings["ledger"] = dict(connections.settings["default"])
    settings.AI_BUDGET = {"LEDGER_DATABASE": "ledger"}
    with django_db_blocker.unblock():
        try:
            yield
        finally:
            CallLog.objects.all().delete()
            SpendWindow.objects.all().delete()
            connections["ledger"].close()
            del connections["ledger"]
            del connections.settings["ledger"]


@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has one writer a file")
@pytest.mark.usefixtures("second_alias")
def test_through_a_second_alias_a_spend_survives_the_callers_rollback() -> None:
    with transaction.atomic():
        settle(reserve(limits_of(CHAT), 10), settled(5))
        transaction.set_rollback(True)

    assert sums_of_windows()[WINDOW] == (5, 0, 1)
    assert sums_of_calls() == sums_of_windows()


@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has one writer a file")
@pytest.mark.usefixtures("second_alias")
def test_a_transaction_on_the_second_alias_itself_is_the_callers() -> None:
    with transaction.atomic(using="ledger"), pytest.raises(CallInsideTransaction, match="'ledger'"):
        reserve([limit(None)])
