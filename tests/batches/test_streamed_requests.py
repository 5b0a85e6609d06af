"""Requests that are read as they come: a hundred thousand of them are never held in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import AbstractUser
from django.db.models import QuerySet

from ai_budget import periods
from ai_budget.guard.batch import preparing
from ai_budget.guard.batch import rows as batch_rows
from ai_budget.models import BatchItem, CallText
from ai_budget.testing import AnthropicSimulator
from tests.batches.submitted import items, keys, submit, to_be_sent

pytestmark = pytest.mark.django_db


def test_a_generator_is_read_while_its_items_are_written(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "ROWS_AT_ONCE", 10)
    ahead: list[int] = []

    def requests() -> Iterator[str]:
        for number in range(35):
            ahead.append(number - BatchItem.objects.count())
            yield f"prompt {number}"

    batch = submit(requests())

    assert max(ahead) <= 10
    assert [item.position for item in items(batch)] == list(range(35))


def test_long_requests_are_written_sooner(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "BYTES_AT_ONCE", 10_000)
    ahead: list[int] = []

    def requests() -> Iterator[str]:
        for number in range(20):
            ahead.append(number - CallText.objects.count())
            yield "x" * 2_000

    submit(requests())

    assert max(ahead) <= 5


def test_a_slow_generator_says_that_it_goes_on(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [periods.monotonic()]
    monkeypatch.setattr(periods, "monotonic", lambda: clock[0])
    written: list[int] = []

    def requests() -> Iterator[str]:
        for number in range(3):
            clock[0] += 61
            yield f"prompt {number}"
            written.append(BatchItem.objects.count())

    submit(requests())

    assert written == [1, 2, 3]


def test_many_items_need_no_more_memory_than_some(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "BYTES_AT_ONCE", 200_000)
    submit(["warm"])
    tracemalloc.start()
    try:
        submit("word " * 4_000 for _ in range(400))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 4_000_000  # of 8,000,000 bytes of prompts


@pytest.fixture
def users(db: None) -> QuerySet[AbstractUser]:
    model = get_user_model()
    model.objects.bulk_create(
        [model(username=f"user-{number:02}", email=f"{number}@example.com") for number in range(25)]
    )
    found: QuerySet[AbstractUser] = model.objects.order_by("username")
    return found


def test_pairs_of_a_queryset_are_ids_and_prompts(
    api: AnthropicSimulator, users: QuerySet[AbstractUser]
) -> None:
    batch = submit(users.values_list("pk", "username"))

    assert keys(batch) == [str(user.pk) for user in users]
    texts = [params["messages"][0]["content"] for params in to_be_sent(batch)]
    assert texts == [user.username for user in users]


@pytest.mark.parametrize(
    "how", [{"flat": True, "fields": ["username"]}, {"named": True, "fields": ["pk", "username"]}]
)
def test_other_lists_of_values_are_requests_too(
    api: AnthropicSimulator, users: QuerySet[AbstractUser], how: dict[str, Any]
) -> None:
    fields = how.pop("fields")

    batch = submit(users.values_list(*fields, **how))

    texts = [params["messages"][0]["content"] for params in to_be_sent(batch)]
    assert texts == [user.username for user in users]


def test_rows_are_no_requests(api: AnthropicSimulator, users: QuerySet[AbstractUser]) -> None:
    with pytest.raises(TypeError, match=r"'0' is a"):
        submit(users)
    with pytest.raises(ValueError, match=r"'0': A request needs messages"):
        submit(users.values("username"))


@pytest.mark.django_db(transaction=True)
def test_a_queryset_is_not_read_into_memory(
    api: AnthropicSimulator, users: QuerySet[AbstractUser], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "ROWS_AT_ONCE", 10)
    monkeypatch.setattr(batch_rows, "ROWS_AT_ONCE", 10)
    read = users.values_list("pk", "username")

    batch = submit(read)

    assert read._result_cache is None
    assert batch.total == 25
