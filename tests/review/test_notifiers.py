"""An alert gets to people: at least once, by whatever they read, and in nobody's way."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.test import override_settings

import ai_budget
from ai_budget import periods
from ai_budget.ledger.database import DatabaseLedger
from ai_budget.models import Alert, AlertDelivery
from ai_budget.money import NANO_PER_USD as USD
from ai_budget.review import alerts, deliveries, notifiers
from ai_budget.review.alert_rules import Due
from ai_budget.review.notifiers import Email, Slack, Webhook
from ai_budget.signals import alert_raised
from ai_budget.testing import AnthropicSimulator
from tests.factories import FeatureBudgetFactory
from tests.ledger.threads import THREADS, together

NOW = datetime(2026, 10, 15, 12, tzinfo=UTC)
HERE = f"{__name__}."
WEBHOOK = "ai_budget.review.notifiers.Webhook"
SECRET = "T0KEN"


class Clock:
    at = NOW


@pytest.fixture(autouse=True)
def clock() -> Iterator[Clock]:
    clock = Clock()
    TOLD.clear()
    with periods.override_clock(lambda: clock.at):
        yield clock


@pytest.fixture(autouse=True)
def mailers(settings: Any) -> None:
    """What Django 6.1 wants to be told, and those before leave unread."""
    backend = "django.core.mail.backends.locmem.EmailBackend"
    settings.MAILERS = {"default": {"BACKEND": backend}}


# Notifiers of a site's own -----------------------------------------------------------------------

TOLD: list[tuple[str, Any]] = []
"""Which alerts were told, and how."""


def pager(alert: Alert, *, team: str = "ops") -> None:
    TOLD.append((team, alert.threshold))


class Siren:
    def __init__(self, *, loud: bool) -> None:
        self.loud = loud

    def __call__(self, alert: Alert) -> None:
        TOLD.append(("siren", self.loud))


def broken(alert: Alert) -> None:
    TOLD.append(("broken", alert.threshold))
    raise RuntimeError(f"https://hooks.example/{SECRET}")


def delivering_by(*entries: Any) -> Any:
    return override_settings(AI_BUDGET={"NOTIFIERS": list(entries)})


def an_alert(threshold: int = 80, **fields: Any) -> Alert:
    """One that is recorded, and due to be delivered to whom the settings name."""
    given: dict[str, Any] = {
        "kind": "limit",
        "budget": "chat",
        "period": "day",
        "first_day": date(2026, 10, 15),
        "threshold": threshold,
        "effect": "refuses",
        "spent_nanousd": 80 * USD,
        "of_nanousd": 100 * USD,
        "percent": 80,
        "until": datetime(2026, 10, 16, tzinfo=UTC),
        **fields,
    }
    assert alerts.record([Due(**given)], at=periods.now(), alias="default") == 1
    return Alert.objects.latest("pk")


def delivery(notifier: str) -> AlertDelivery:
    return AlertDelivery.objects.get(notifier=notifier)


# A server ----------------------------------------------------------------------------------------


class Received(list[tuple[str, dict[str, str], Any]]):
    """What a server was sent: path, headers and JSON."""

    url = ""
    answer: tuple[int, dict[str, str]] = (200, {})


@contextmanager
def a_server() -> Iterator[Received]:
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, dict(self.headers), json.loads(body)))
            status, headers = received.answer
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    received.url = f"http://127.0.0.1:{server.server_port}/hook/{SECRET}"
    try:
        yield received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Received]:
    with a_server() as received:
        yield received


@pytest.fixture
def dead() -> Iterator[str]:
    """The address of a server that takes connections, and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/hook/{SECRET}"
    for thread in threading.enumerate():
        if thread.name == "ai_budget webhook":
            thread.join(timeout=10)


def webhook(url: str, **options: Any) -> dict[str, Any]:
    return {"BACKEND": WEBHOOK, "OPTIONS": {"url": url, **options}}


# Delivering --------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_functions_and_classes_are_called_with_their_options() -> None:
    siren = {"BACKEND": f"{HERE}Siren", "OPTIONS": {"loud": True}}
    team = {"BACKEND": f"{HERE}pager", "OPTIONS": {"team": "finance"}}
    with delivering_by(f"{HERE}pager", team, siren):
        an_alert()
        delivered = deliveries.deliver()

    assert sorted(TOLD) == [("finance", 80), ("ops", 80), ("siren", True)]
    assert delivered == 4  # and the signal
    assert not AlertDelivery.objects.filter(delivered_at=None).exists()


@pytest.mark.django_db
def test_what_was_delivered_is_not_delivered_again(clock: Clock) -> None:
    with delivering_by(f"{HERE}pager"):
        an_alert()
        deliveries.deliver()
        clock.at += timedelta(days=2)

        assert deliveries.deliver() == 0
    assert TOLD == [("ops", 80)]


@pytest.mark.django_db
def test_the_signal_is_sent_whoever_else_is_told() -> None:
    heard: list[Alert] = []

    def hear(alert: Alert, **kwargs: Any) -> None:
        heard.append(alert)

    alert_raised.connect(hear)
    try:
        with delivering_by():
            alert = an_alert()
            deliveries.deliver()
            deliveries.deliver()
    finally:
        alert_raised.disconnect(hear)

    assert heard == [alert]


@pytest.mark.django_db
def test_a_receiver_that_fails_is_logged_and_holds_nothing_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(alert: Alert, **kwargs: Any) -> None:
        raise KeyError(SECRET)

    alert_raised.connect(fail)
    try:
        with delivering_by(f"{HERE}pager"):
            an_alert()
            deliveries.deliver()
    finally:
        alert_raised.disconnect(fail)

    assert TOLD == [("ops", 80)]
    ours = [it.getMessage() for it in caplog.records if it.name == "ai_budget"]
    assert len(ours) == 1
    assert ours[0].endswith("failed: KeyError")


@pytest.mark.django_db
def test_what_fails_is_tried_again_later_and_later(clock: Clock) -> None:
    with delivering_by(f"{HERE}broken"):
        an_alert()
        waits = []
        for _ in range(10):
            deliveries.deliver()
            due_at = delivery(f"{HERE}broken").due_at
            assert due_at is not None
            waits.append((due_at - clock.at) // timedelta(minutes=1))
            clock.at = due_at

    assert waits == [1, 2, 4, 8, 16, 32, 64, 120, 120, 120]
    assert len(TOLD) == 10


@pytest.mark.django_db
def test_it_is_not_tried_before_it_is_due(clock: Clock) -> None:
    with delivering_by(f"{HERE}broken"):
        an_alert()
        deliveries.deliver()
        clock.at += timedelta(seconds=59)
        deliveries.deliver()

    assert len(TOLD) == 1


@pytest.mark.django_db
def test_after_a_day_it_is_given_up_and_logged(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with delivering_by(f"{HERE}broken"):
        an_alert()
        deliveries.deliver()
        clock.at += timedelta(days=1)
        deliveries.deliver()
        clock.at += timedelta(days=1)
        deliveries.deliver()

    found = delivery(f"{HERE}broken")
    assert (found.tries, found.due_at, found.delivered_at) == (2, None, None)
    assert found.error == "RuntimeError"
    assert [it.levelno for it in caplog.records] == [logging.WARNING, logging.ERROR]
    assert SECRET not in caplog.text


@pytest.mark.django_db
def test_a_notifier_that_is_put_right_gets_what_is_due(clock: Clock, server: Received) -> None:
    with delivering_by(webhook("http://127.0.0.1:9/hook")):
        an_alert()
        deliveries.deliver()
    clock.at += timedelta(minutes=1)

    with delivering_by(webhook(server.url)):
        deliveries.deliver()

    assert len(server) == 1


@pytest.mark.django_db
def test_a_notifier_that_is_taken_out_is_given_up() -> None:
    with delivering_by(f"{HERE}pager"):
        an_alert()
    with delivering_by():
        deliveries.deliver()

    found = delivery(f"{HERE}pager")
    assert (found.due_at, found.error) == (None, "not in NOTIFIERS")


@pytest.mark.django_db
def test_one_that_fails_holds_up_no_other_and_is_tried_once_a_run() -> None:
    with delivering_by(f"{HERE}broken", f"{HERE}pager"):
        for threshold in (50, 80, 100):
            an_alert(threshold)
        deliveries.deliver()

    assert [it for it in TOLD if it[0] == "broken"] == [("broken", 50)]
    assert [it for it in TOLD if it[0] == "ops"] == [("ops", 50), ("ops", 80), ("ops", 100)]


@pytest.mark.django_db
def test_a_run_ends_after_some_seconds_and_the_next_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter(range(0, 1_000, 4))
    with delivering_by(f"{HERE}pager"):
        for threshold in range(1, 7):
            an_alert(threshold)
        AlertDelivery.objects.filter(notifier=notifiers.SIGNAL).delete()
        monkeypatch.setattr(periods, "monotonic", lambda: next(seconds))

        assert deliveries.deliver() == 2
        assert deliveries.deliver() == 2


@pytest.mark.django_db
def test_a_delivery_whose_worker_died_is_done_by_another(clock: Clock) -> None:
    with delivering_by(f"{HERE}pager"):
        an_alert()
        found = delivery(f"{HERE}pager")
        assert deliveries._take(found, clock.at + deliveries.LEASE, "default")
        deliveries.deliver()
        assert TOLD == []
        clock.at += deliveries.LEASE
        deliveries.deliver()

    assert TOLD == [("ops", 80)]


@pytest.mark.contention
@pytest.mark.django_db(transaction=True)
def test_ticks_at_once_deliver_it_once() -> None:
    with delivering_by(f"{HERE}pager"):
        an_alert()

        together([deliveries.deliver] * THREADS)

    assert TOLD == [("ops", 80)]
    assert delivery(f"{HERE}pager").tries == 1


# A webhook ---------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_a_webhook_is_sent_figures_and_no_names(server: Received) -> None:
    Webhook(url=server.url, headers={"X-Token": "abc"}, base_url="https://shop.example")(an_alert())

    ((path, headers, sent),) = server
    alert = Alert.objects.get()
    assert path == f"/hook/{SECRET}"
    assert (headers["X-Token"], headers["Content-Type"]) == ("abc", "application/json")
    assert sent == {
        "id": alert.pk,
        "title": "chat: 80 % of the daily limit is spent",
        "text": alert.text,
        "kind": "limit",
        "effect": "refuses",
        "budget": "chat",
        "period": "day",
        "first_day": "2026-10-15",
        "threshold": 80,
        "about": "",
        "spent_usd": "80.000000000",
        "of_usd": "100.000000000",
        "forecast_usd": None,
        "percent": 80,
        "count": 0,
        "model": "",
        "rung": None,
        "raised_at": "2026-10-15T12:00:00+00:00",
        "since": None,
        "until": "2026-10-16T00:00:00+00:00",
        "url": f"https://shop.example{alert.path}",
    }


@pytest.mark.django_db
def test_slack_is_sent_a_message_without_marks_of_its_own(server: Received) -> None:
    alert = an_alert(kind="unpriced", period="month", model="<!channel> & co", effect="alerts")

    Slack(url=server.url)(alert)

    ((_path, _headers, sent),) = server
    assert list(sent) == ["text"]
    assert "&lt;!channel&gt; &amp; co" in sent["text"]
    assert alert.path in sent["text"]


@pytest.mark.django_db
@pytest.mark.parametrize("status", [300, 302, 404, 500])
def test_any_status_from_300_on_is_a_failure(server: Received, status: int) -> None:
    with a_server() as elsewhere, delivering_by(webhook(server.url)):
        server.answer = (status, {"Location": elsewhere.url})
        an_alert()
        deliveries.deliver()

        assert (len(server), len(elsewhere)) == (1, 0)
    assert delivery(WEBHOOK).error == f"HTTP {status}"


@pytest.mark.django_db
@pytest.mark.parametrize("status", [200, 202, 204, 299])
def test_any_status_below_is_none(server: Received, status: int) -> None:
    server.answer = (status, {})
    with delivering_by(webhook(server.url)):
        an_alert()
        deliveries.deliver()

    assert delivery(WEBHOOK).delivered_at == NOW


@pytest.mark.django_db
def test_a_server_that_refuses_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    with delivering_by(webhook(f"http://127.0.0.1:9/{SECRET}")):
        an_alert()
        deliveries.deliver()

    found = delivery(WEBHOOK)
    assert (found.error, found.due_at) == ("ConnectionRefusedError", NOW + timedelta(minutes=1))
    assert SECRET not in caplog.text


@pytest.mark.django_db
def test_a_dead_server_delays_nothing_and_is_tried_again(
    dead: str, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[str] = []
    monkeypatch.setattr(DatabaseLedger, "tidy", lambda self, aside: done.append("tidied"))
    with delivering_by(webhook(dead, timeout=0.05), f"{HERE}pager"):
        an_alert()
        an_alert(100)
        call_command("ai_budget_tick")

        found = AlertDelivery.objects.filter(notifier=WEBHOOK).order_by("pk")
        assert done == ["tidied"]
        assert [threshold for _team, threshold in TOLD] == [80, 100]
        assert [(it.tries, it.delivered_at) for it in found] == [(1, None), (0, None)]
        clock.at += timedelta(minutes=1)
        call_command("ai_budget_tick")

    assert sorted(it.tries for it in found.all()) == [1, 1]
    assert {it.error for it in found if it.tries} == {"TimeoutError"}
    assert SECRET not in caplog.text


@pytest.mark.django_db
def test_a_server_that_never_ends_its_answer_is_not_waited_for(clock: Clock) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        stop = threading.Event()

        def drip() -> None:
            taken, _address = listening.accept()
            with taken:
                while not stop.wait(0.01):
                    taken.sendall(b"H")

        thread = threading.Thread(target=drip)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        with delivering_by(webhook(url, timeout=0.1)):
            an_alert()
            deliveries.deliver()
        stop.set()
        thread.join()

    assert delivery(WEBHOOK).error == "TimeoutError"


@pytest.mark.django_db
def test_a_call_takes_no_part_in_it(
    dead: str, anthropic_api: AnthropicSimulator, settings: Any
) -> None:
    FeatureBudgetFactory.create(name="chat", daily_limit_usd=1, monthly_plan_usd="0.000001")
    settings.AI_BUDGET = {**settings.AI_BUDGET, "NOTIFIERS": [webhook(dead, timeout=60)]}

    answer = ai_budget.ask("Hello", feature="chat")

    assert answer.text
    assert not Alert.objects.exists()
    assert not AlertDelivery.objects.exists()


@pytest.mark.parametrize(
    "url",
    ["http://hooks.example/x", "ftp://hooks.example", "hooks.example", "", "https://", None, 7],
)
def test_an_address_that_is_not_safe_is_refused(url: Any) -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        Webhook(url=url)

    assert "hooks" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["https://hooks.example/x", "http://localhost:8000/", "http://[::1]:8000/"]
)
def test_an_address_that_is_safe_is_taken(url: str) -> None:
    assert Webhook(url=url).url == url


@pytest.mark.parametrize("timeout", [0, -1, "5", True])
def test_a_timeout_is_a_number_of_seconds(timeout: Any) -> None:
    with pytest.raises(ImproperlyConfigured):
        Webhook(url="https://hooks.example/", timeout=timeout)


# E-mail ------------------------------------------------------------------------------------------


def sent_to() -> list[list[str]]:
    return [list(message.to) for message in mail.outbox]


@pytest.mark.django_db
@override_settings(ADMINS=["root@example.com"])
def test_the_owner_and_the_admins_get_an_e_mail() -> None:
    FeatureBudgetFactory.create(name="chat", owner_email="chat@example.com")
    alert = an_alert()

    Email(base_url="https://shop.example", recipients=["pager@example.com"])(alert)

    (message,) = mail.outbox
    assert message.to == ["chat@example.com", "root@example.com", "pager@example.com"]
    assert message.subject == "[Django] chat: 80 % of the daily limit is spent"
    assert alert.text in message.body
    assert f"https://shop.example{alert.path}" in message.body


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("own", "expected"),
    [("chat@example.com", ["chat@example.com"]), ("", ["support@example.com"])],
)
def test_the_owner_of_the_category_stands_in(own: str, expected: list[str]) -> None:
    support = FeatureBudgetFactory.create(name="support", owner_email="support@example.com")
    FeatureBudgetFactory.create(name="chat", parent=support, owner_email=own)

    Email()(an_alert())

    assert sent_to() == [expected]


@pytest.mark.django_db
def test_where_nobody_is_named_nobody_is_sent_anything() -> None:
    Email()(an_alert())

    assert mail.outbox == []


@pytest.mark.parametrize("admins", [["root@example.com"], [("Root", "root@example.com")]])
def test_admins_are_addresses_or_pairs_with_a_name(admins: Any, settings: Any) -> None:
    settings.ADMINS = admins

    assert list(notifiers.admins()) == ["root@example.com"]


@pytest.mark.django_db
@override_settings(ADMINS=["root@example.com"])
def test_no_line_of_a_name_becomes_a_header() -> None:
    Email()(an_alert(kind="unpriced", period="month", model="x\r\nBcc: evil@example.com"))

    (message,) = mail.outbox
    assert "\n" not in message.subject
    assert message.bcc == []


@pytest.mark.django_db
@override_settings(ADMINS=["root@example.com"])
def test_a_mail_server_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []

    class Backend:
        timeout: float | None = None

        def send_messages(self, messages: Any) -> int:
            waits.append(self.timeout)
            return len(messages)

    replace_connection(monkeypatch, Backend)
    Email()(an_alert())

    assert waits == [notifiers.TIMEOUT]


def replace_connection(monkeypatch: pytest.MonkeyPatch, backend: Callable[[], Any]) -> None:
    if hasattr(mail, "mailers"):
        monkeypatch.setattr(mail, "mailers", {"default": backend()})
    else:
        monkeypatch.setattr(mail, "get_connection", backend)


@pytest.mark.django_db
@override_settings(ADMINS=["root@example.com"])
def test_a_mail_that_is_not_taken_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    path = "ai_budget.review.notifiers.Email"

    class Refusing:
        def send_messages(self, messages: Any) -> int:
            raise ConnectionRefusedError

    with delivering_by(path):
        an_alert()
        with monkeypatch.context() as patched:
            replace_connection(patched, Refusing)
            deliveries.deliver()
        assert delivery(path).error == "ConnectionRefusedError"
        clock.at += timedelta(minutes=1)
        deliveries.deliver()

    assert sent_to() == [["root@example.com"]]


# What the settings name --------------------------------------------------------------------------


def test_each_entry_has_a_name_without_its_options() -> None:
    with delivering_by(f"{HERE}pager", webhook("https://a.example"), webhook("https://b.example")):
        names = list(notifiers.named())

    assert names == [f"{HERE}pager", WEBHOOK, f"{WEBHOOK}#2"]


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ("nowhere.at_all", ImportError),
        (f"{HERE}NOW", TypeError),
        ({"BACKEND": f"{HERE}pager", "OPTIONS": {"tem": "x"}}, TypeError),
        ({"BACKEND": f"{HERE}Siren"}, TypeError),
        ({"BACKEND": f"{HERE}Clock"}, TypeError),
        ({"BACKEND": WEBHOOK, "OPTIONS": {"url": "http://hooks.example"}}, ImproperlyConfigured),
    ],
)
def test_an_entry_that_leads_to_no_notifier_says_so(entry: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        notifiers.load(entry)
