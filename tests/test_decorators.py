"""``limited``: so many requests to a view."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View

import ai_budget
from ai_budget import periods
from ai_budget.conf import conf
from tests.factories import UserFactory
from tests.guard.books import ledger_of_the_run

pytestmark = pytest.mark.django_db(transaction=True)

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.at = NOON

    def __call__(self) -> datetime:
        return self.at

    def go_on(self, **time: float) -> None:
        self.at += timedelta(**time)


@pytest.fixture(autouse=True)
def clock() -> Iterator[Clock]:
    clock = Clock()
    with periods.override_clock(clock):
        yield clock


@pytest.fixture(autouse=True)
def urls(settings: Any) -> None:
    settings.ROOT_URLCONF = __name__


# Views


@ai_budget.limited("2/m")
def hello(request: HttpRequest) -> HttpResponse:
    """Greet."""
    return HttpResponse("Hello")


@ai_budget.limited("2/m")
def other(request: HttpRequest) -> HttpResponse:
    return HttpResponse("Hello")


@ai_budget.limited("2/m", feature="chat")
def chat(request: HttpRequest) -> HttpResponse:
    return HttpResponse("Hello")


@ai_budget.limited("2/m", feature="chat")
def chat_again(request: HttpRequest) -> HttpResponse:
    return HttpResponse("Hello")


@ai_budget.limited("2/m", by=lambda request: request.headers.get("X-Api-Key", ""))
def by_key(request: HttpRequest) -> HttpResponse:
    return HttpResponse("Hello")


@ai_budget.limited("2/m")
async def ahello(request: HttpRequest, name: str = "you") -> HttpResponse:
    await asyncio.sleep(0)
    return HttpResponse(f"Hello {name}")


@method_decorator(ai_budget.limited("2/m"), name="dispatch")
class Hello(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("Hello")


@method_decorator(ai_budget.limited("2/m"), name="dispatch")
class OtherHello(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("Hello")


@method_decorator(ai_budget.limited("2/m"), name="dispatch")
class AsyncHello(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        await asyncio.sleep(0)
        return HttpResponse("Hello")


class Bare(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("Hello")


class OtherBare(Bare):
    pass


urlpatterns = [
    path("hello/", hello),
    path("other/", other),
    path("chat/", chat),
    path("chat-again/", chat_again),
    path("by-key/", by_key),
    path("ahello/", ahello),
    path("class/", Hello.as_view()),
    path("other-class/", OtherHello.as_view()),
    path("async-class/", AsyncHello.as_view()),
    path("bare/", ai_budget.limited("2/m")(Bare.as_view())),
    path("other-bare/", ai_budget.limited("2/m")(OtherBare.as_view())),
]


def statuses(client: Client, *paths: str, **extra: Any) -> list[int]:
    return [client.get(path, **extra).status_code for path in paths]


# How many


@pytest.mark.parametrize("path", ["/hello/", "/ahello/", "/class/", "/async-class/", "/bare/"])
def test_a_view_takes_so_many_requests(client: Client, clock: Clock, path: str) -> None:
    assert statuses(client, path, path, path) == [200, 200, 429]

    clock.go_on(seconds=30)
    assert statuses(client, path, path) == [200, 429]


@pytest.mark.parametrize("path", ["/hello/", "/ahello/", "/class/", "/async-class/", "/bare/"])
async def test_a_view_takes_so_many_requests_under_asgi(
    async_client: AsyncClient, path: str
) -> None:
    found = [(await async_client.get(path)).status_code for _ in range(3)]

    assert found == [200, 200, 429]


@pytest.mark.parametrize("path", ["/ahello/", "/async-class/"])
async def test_an_async_view_does_not_block_the_loop(
    async_client: AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    threads: list[threading.Thread] = []
    ledger = ledger_of_the_run()
    take = ledger.take

    def watched(*args: Any, **kwargs: Any) -> None:
        threads.append(threading.current_thread())
        take(*args, **kwargs)

    monkeypatch.setattr(ledger, "take", watched)

    assert (await async_client.get(path)).status_code == 200
    assert threads
    assert threading.current_thread() not in threads


@pytest.mark.parametrize(
    ("rate", "room", "first_again"),
    [
        ("3/s", 3, timedelta(seconds=1 / 3)),
        ("3/m", 3, timedelta(seconds=20)),
        ("3/h", 3, timedelta(minutes=20)),
        ("3/d", 3, timedelta(hours=8)),
        ("3/15m", 3, timedelta(minutes=5)),
        ("1/24h", 1, timedelta(days=1)),
    ],
)
def test_a_rate_refills_evenly(clock: Clock, rate: str, room: int, first_again: timedelta) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    limit: Callable[[HttpRequest], HttpResponseBase] = ai_budget.limited(rate)(view)
    ask: Callable[[], int] = lambda: limit(RequestFactory().get("/")).status_code  # noqa: E731

    assert [ask() for _ in range(room + 1)] == [200] * room + [429]
    clock.go_on(seconds=first_again.total_seconds() - 0.01)
    assert ask() == 429
    clock.go_on(seconds=0.02)
    assert [ask(), ask()] == [200, 429]


@pytest.mark.parametrize(
    "rate",
    [
        "",
        "20",
        "20/",
        "/m",
        "20/x",
        "0/m",
        "-1/m",
        "1.5/m",
        "20/0m",
        "20 / m",
        "20/2d",
        "٣/m",
        "20/m\n",
        "20/min",
        None,
        20,
        "20/25h",
    ],
)
def test_a_malformed_rate_is_refused_where_it_is_written(rate: Any) -> None:
    with pytest.raises(ValueError, match=r"rate|more than a day"):
        ai_budget.limited(rate)


# Who


def test_each_view_is_counted_by_itself(client: Client) -> None:
    assert statuses(client, "/hello/", "/hello/", "/other/", "/hello/") == [200, 200, 200, 429]
    assert statuses(client, "/class/", "/class/", "/other-class/", "/class/") == [200] * 3 + [429]
    assert statuses(client, "/bare/", "/bare/", "/other-bare/", "/bare/") == [200] * 3 + [429]


def test_views_of_one_feature_are_counted_together(client: Client) -> None:
    assert statuses(client, "/chat/", "/chat-again/", "/chat/", "/chat-again/") == [
        200,
        200,
        429,
        429,
    ]


def test_two_rates_of_one_feature_hold_together(clock: Clock) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    both: Any = ai_budget.limited("2/s", feature="f")(ai_budget.limited("3/d", feature="f")(view))
    request = RequestFactory().get("/")

    assert [both(request).status_code for _ in range(3)] == [200, 200, 429]
    clock.go_on(seconds=1)
    assert [both(request).status_code for _ in range(2)] == [200, 429]


def test_each_user_has_a_rate_wherever_they_come_from() -> None:
    ada, bob = (cast(Any, user) for user in UserFactory.create_batch(2))
    home, away = Client(), Client(REMOTE_ADDR="198.51.100.9")
    home.force_login(ada)
    away.force_login(ada)
    others = Client()
    others.force_login(bob)

    assert statuses(home, "/hello/", "/hello/") == [200, 200]
    assert statuses(away, "/hello/") == [429]
    assert statuses(others, "/hello/") == [200]


@pytest.mark.parametrize(
    ("one", "another", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("", "unix:", True),
        ("", "192.0.2.1", False),
    ],
)
def test_a_visitor_is_an_address_or_a_network_of_them(one: str, another: str, same: bool) -> None:
    first, second = Client(REMOTE_ADDR=one), Client(REMOTE_ADDR=another)

    assert statuses(first, "/hello/", "/hello/") == [200, 200]
    assert statuses(second, "/hello/") == [429 if same else 200]


def test_what_a_visitor_writes_about_the_own_address_is_not_believed(client: Client) -> None:
    found = [
        client.get("/hello/", headers={"X-Forwarded-For": f"192.0.2.{n}"}).status_code
        for n in range(3)
    ]

    assert found == [200, 200, 429]


def test_another_identity_may_be_named(client: Client) -> None:
    found = [
        client.get("/by-key/", headers={"X-Api-Key": key}).status_code
        for key in ("a", "a", "b", "a")
    ]

    assert found == [200, 200, 200, 429]


# What is answered


@pytest.mark.parametrize("path", ["/hello/", "/ahello/", "/class/", "/async-class/"])
@pytest.mark.parametrize(
    ("accept", "kind"), [("*/*", "application/json"), ("text/html", "text/html")]
)
@pytest.mark.parametrize("middleware", [True, False])
def test_who_is_too_fast_gets_the_answer_of_the_middleware(
    client: Client, settings: Any, path: str, accept: str, kind: str, middleware: bool
) -> None:
    if not middleware:
        settings.MIDDLEWARE = [
            name for name in settings.MIDDLEWARE if not name.startswith("ai_budget")
        ]
    statuses(client, path, path)

    response = client.get(path, headers={"accept": accept})

    assert response.status_code == 429
    assert response["Content-Type"].startswith(kind)
    assert response["Retry-After"] == "30"
    assert "Please try again in 30 seconds." in response.content.decode()
    assert "127.0.0.1" not in response.content.decode()


@pytest.mark.parametrize("path", ["/hello/", "/ahello/"])
@pytest.mark.parametrize(("on_failure", "status"), [("refuse", 503), ("allow", 200)])
def test_a_ledger_that_is_away(
    client: Client, monkeypatch: pytest.MonkeyPatch, path: str, on_failure: str, status: int
) -> None:
    def away(*args: Any, **kwargs: Any) -> None:
        raise ai_budget.LedgerUnavailable("away")

    monkeypatch.setattr(ledger_of_the_run(), "take", away)
    with override_settings(AI_BUDGET={**conf.given, "ON_LEDGER_FAILURE": on_failure}):
        response = client.get(path)

    assert response.status_code == status
    assert response.has_header("Retry-After") == (status == 503)


def test_it_counts_inside_the_transaction_of_a_request(client: Client) -> None:
    from django.db import transaction

    with transaction.atomic():
        assert statuses(client, "/hello/", "/hello/", "/hello/") == [200, 200, 429]


# The decorated view


def test_a_view_keeps_its_name_and_its_arguments() -> None:
    assert (hello.__name__, hello.__doc__) == ("hello", "Greet.")


async def test_an_async_view_stays_one() -> None:
    response = await ahello(RequestFactory().get("/"), name="Ada")

    assert inspect.iscoroutinefunction(ahello)
    assert response.content == b"Hello Ada"
