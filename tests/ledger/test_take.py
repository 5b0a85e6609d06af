"""Requests of views: taken from buckets alone, without a journal."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db import connection, transaction

from ai_budget.exceptions import RateLimited
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, RateBucket
from ai_budget.values import Bucket
from tests.ledger.given import NOON, bucket

pytestmark = pytest.mark.django_db

ONE, OTHER = bucket(1, "view:chat:user:7"), bucket(1, "view:chat:192.0.2.1")


def take(*buckets: Bucket, after: timedelta = timedelta(0)) -> None:
    ledgers.current().take(buckets, at=NOON + after)


def test_one_request_is_taken() -> None:
    take(ONE)

    with pytest.raises(RateLimited):
        take(ONE)


def test_nothing_is_journaled() -> None:
    take(ONE)

    assert not CallLog.objects.exists()


def test_all_or_nothing_is_taken() -> None:
    take(ONE)

    with pytest.raises(RateLimited) as raised:
        take(OTHER, ONE)

    assert raised.value.scope == ONE.scope
    take(OTHER)


def test_it_refills() -> None:
    take(ONE)

    with pytest.raises(RateLimited) as raised:
        take(ONE, after=timedelta(seconds=59))
    assert raised.value.refusal.delay == 1.0
    take(ONE, after=timedelta(seconds=60))


def test_a_watched_bucket_refuses_nothing() -> None:
    watched = bucket(1, "view:chat:user:7", enforce=False)

    for _ in range(3):
        take(watched)


def test_nothing_is_taken_from_no_bucket() -> None:
    take()

    assert not RateBucket.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_it_is_taken_for_good() -> None:
    take(ONE)

    with transaction.atomic():
        transaction.set_rollback(True)

    with pytest.raises(RateLimited):
        take(ONE)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("known", [False, True])
def test_inside_a_transaction_it_shares_the_callers_fate(known: bool) -> None:
    if known:
        take(ONE)
    with transaction.atomic():
        take(ONE, after=timedelta(minutes=1))
        transaction.set_rollback(True)

    take(ONE, after=timedelta(minutes=1))


@pytest.mark.django_db(transaction=True)
def test_a_refusal_leaves_the_callers_transaction_usable() -> None:
    with transaction.atomic():
        take(ONE)
        with pytest.raises(RateLimited):
            take(ONE)
        take(OTHER)

    assert RateBucket.objects.count() == 2


@pytest.mark.skipif(connection.vendor != "postgresql", reason="PostgreSQL's own setting")
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("refused", [False, True])
def test_the_callers_patience_stays_as_it_was(refused: bool) -> None:
    """The rest of its transaction may wait for locks as long as it always did."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL lock_timeout = '77s'")
        take(ONE)
        if refused:
            with pytest.raises(RateLimited):
                take(ONE)
        cursor.execute("SHOW lock_timeout")

        assert cursor.fetchone() == ("77s",)
