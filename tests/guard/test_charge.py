"""Who pays: charges that nest, travel with the code inside them, and end where they end."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth import get_user_model
from django.contrib.auth.models import AnonymousUser
from django.utils.functional import SimpleLazyObject

import ai_budget
from ai_budget.guard.charge import Payer, current_payer
from ai_budget.testing import AnthropicSimulator
from tests.guard.books import only_row, rows

CHAT = ai_budget.charge(feature="chat")
"""One for many uses, as a module may keep it."""


def feature() -> str | None:
    return current_payer().feature


# Nesting


def test_outside_any_charge_nobody_is_named() -> None:
    assert current_payer() == Payer()


def test_inner_charges_win_and_inherit_the_rest() -> None:
    with (
        ai_budget.charge(feature="chat", user=1, subject="tenant", tags={"plan": "free", "v": "1"}),
        ai_budget.charge(feature="search", tags={"v": "2"}),
    ):
        assert current_payer() == Payer(
            feature="search", user=1, subject="tenant", tags={"plan": "free", "v": "2"}
        )
    assert current_payer() == Payer()


def test_each_charge_ends_with_its_block() -> None:
    with ai_budget.charge(feature="chat"):
        with ai_budget.charge(user=7):
            pass
        assert current_payer() == Payer(feature="chat")
        with pytest.raises(LookupError), ai_budget.charge(user=8):
            raise LookupError
        assert current_payer() == Payer(feature="chat")


def test_one_charge_may_be_entered_inside_itself() -> None:
    with CHAT:
        with CHAT, ai_budget.charge(feature="search"), CHAT:
            assert feature() == "chat"
        assert feature() == "chat"
    assert feature() is None


def test_a_charge_that_is_left_out_of_turn_leaves_the_others() -> None:
    outer, inner = ai_budget.charge(feature="chat", user=1), ai_budget.charge(feature="search")
    outer.__enter__()
    inner.__enter__()

    outer.__exit__(None, None, None)
    assert current_payer() == Payer(feature="search")

    inner.__exit__(None, None, None)
    assert current_payer() == Payer()


def test_a_charge_may_end_in_another_context_than_it_began() -> None:
    def charged() -> Generator[str | None, None, None]:
        with CHAT:
            yield feature()

    generator = charged()
    assert contextvars.copy_context().run(next, generator) == "chat"

    with ai_budget.charge(feature="search"):
        generator.close()
        assert feature() == "search"
    assert feature() is None


def test_generators_that_overlap_leave_nothing_behind() -> None:
    def charged(name: str) -> Generator[None, None, None]:
        with ai_budget.charge(feature=name):
            yield

    first, second = charged("first"), charged("second")
    next(first)
    next(second)
    first.close()
    second.close()

    assert feature() is None


# Reach


async def test_a_charge_reaches_what_is_awaited() -> None:
    async def inside() -> str | None:
        await asyncio.sleep(0)
        return feature()

    with CHAT:
        assert await inside() == "chat"
        assert await asyncio.create_task(inside()) == "chat"
        assert list(await asyncio.gather(inside(), inside())) == ["chat", "chat"]
        assert await asyncio.to_thread(feature) == "chat"
        assert await sync_to_async(feature)() == "chat"
        async with asyncio.TaskGroup() as group:
            task = group.create_task(inside())
        assert task.result() == "chat"
    assert feature() is None


def test_a_charge_reaches_through_async_to_sync_and_back() -> None:
    async def inside() -> tuple[str | None, str | None]:
        return feature(), await sync_to_async(feature)()

    with CHAT:
        assert async_to_sync(inside)() == ("chat", "chat")
    assert feature() is None


def test_a_thread_of_ones_own_takes_a_copy_of_the_context() -> None:
    with CHAT, ThreadPoolExecutor() as pool:
        assert pool.submit(contextvars.copy_context().run, feature).result() == "chat"
        assert pool.submit(feature).result() is None


async def test_a_charge_of_a_task_stays_in_the_task() -> None:
    entered = asyncio.Event()
    leave = asyncio.Event()

    async def inside() -> None:
        with CHAT:
            entered.set()
            await leave.wait()
            assert feature() == "chat"

    task = asyncio.create_task(inside())
    await entered.wait()
    assert feature() is None
    leave.set()
    await task


async def test_one_charge_may_be_used_by_many_tasks_at_once() -> None:
    async def ask(name: str, turn: asyncio.Barrier) -> None:
        with ai_budget.charge(feature=name):
            for _ in range(3):
                with CHAT:
                    await turn.wait()
                    assert feature() == "chat"
                    await turn.wait()
                assert feature() == name
        assert feature() is None

    turn = asyncio.Barrier(5)
    await asyncio.gather(*(ask(f"feature-{number}", turn) for number in range(5)))


def test_one_charge_may_be_used_by_many_threads_at_once() -> None:
    turn = threading.Barrier(4, timeout=10)

    def serve() -> list[str | None]:
        seen = []
        for _ in range(3):
            with CHAT:
                turn.wait()
                seen.append(feature())
                turn.wait()
            seen.append(feature())
        return seen

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(serve) for _ in range(4)]:
            assert future.result() == ["chat", None] * 3


async def test_an_async_generator_keeps_its_charge_where_it_is_read_in_one_task() -> None:
    async def charged() -> AsyncGenerator[str | None, None]:
        with CHAT:
            yield feature()
            await asyncio.sleep(0)
            yield feature()

    assert [seen async for seen in charged()] == ["chat", "chat"]
    assert feature() is None


# Calls


@pytest.mark.django_db
def test_calls_are_booked_to_the_charge_around_them(anthropic_api: AnthropicSimulator) -> None:
    user = get_user_model().objects.create_user("ada")

    with ai_budget.charge(feature="chat", user=user, subject="tenant", tags={"plan": "free"}):
        ai_budget.client().messages.create(
            model="claude-haiku-5-5", max_tokens=5, messages=[{"role": "user", "content": "Hi"}]
        )

    row = only_row()
    assert (row.feature_id, row.user_id, row.subject) == ("chat", user.pk, "tenant")
    assert row.tags == {"plan": "free"}


@pytest.mark.django_db
def test_what_a_verb_says_wins_over_the_charge_around_it(
    anthropic_api: AnthropicSimulator,
) -> None:
    with ai_budget.charge(feature="chat", subject="tenant", tags={"plan": "free"}):
        ai_budget.ask("Hi", feature="search", tags={"page": "home"})

    row = only_row()
    assert (row.feature_id, row.subject) == ("search", "tenant")
    assert row.tags == {"plan": "free", "page": "home"}


@pytest.mark.django_db
def test_what_a_client_says_wins_over_the_charge_around_it(
    anthropic_api: AnthropicSimulator,
) -> None:
    client = ai_budget.client(feature="agent", tags={"plan": "paid"})

    with ai_budget.charge(feature="chat", subject="tenant", tags={"plan": "free", "page": "home"}):
        client.messages.create(
            model="claude-haiku-5-5", max_tokens=5, messages=[{"role": "user", "content": "Hi"}]
        )

    row = only_row()
    assert (row.feature_id, row.subject) == ("agent", "tenant")
    assert row.tags == {"plan": "paid", "page": "home"}


@pytest.mark.django_db(transaction=True)
async def test_tasks_at_once_are_booked_each_to_its_own_charge(
    anthropic_api: AnthropicSimulator,
) -> None:
    async def ask(name: str) -> None:
        with ai_budget.charge(feature=name):
            await ai_budget.aask("Hi")

    await asyncio.gather(*(ask(f"feature-{number}") for number in range(4)))

    booked = {row.feature_id for row in await sync_to_async(rows)()}
    assert booked == {f"feature-{number}" for number in range(4)}


@pytest.mark.django_db
def test_a_lazy_user_is_left_alone_until_a_call(anthropic_api: AnthropicSimulator) -> None:
    user = get_user_model().objects.create_user("ada")
    fetched: list[Any] = []

    def fetch() -> Any:
        fetched.append(user)
        return user

    lazy = SimpleLazyObject(fetch)
    client = ai_budget.client(user=lazy)
    with ai_budget.charge(user=lazy), ai_budget.charge(feature="chat"):
        assert repr(current_payer().feature) == "'chat'"
        client.models.list()
        assert fetched == []
        ai_budget.ask("Hi")

    assert fetched == [user]
    assert only_row().user_id == user.pk


@pytest.mark.django_db
@pytest.mark.parametrize("lazy", [False, True])
def test_a_visitor_without_an_account_is_nobody(
    anthropic_api: AnthropicSimulator, lazy: bool
) -> None:
    visitor: Any = SimpleLazyObject(AnonymousUser) if lazy else AnonymousUser()

    ai_budget.ask("Hi", user=visitor, subject="visitor:3f")

    assert (only_row().user_id, only_row().subject) == (None, "visitor:3f")


@pytest.mark.django_db
def test_a_visitor_is_not_charged_to_the_user_around(anthropic_api: AnthropicSimulator) -> None:
    user = get_user_model().objects.create_user("ada")

    with ai_budget.charge(user=user), ai_budget.charge(user=AnonymousUser()):
        ai_budget.ask("Hi")

    assert only_row().user_id is None
