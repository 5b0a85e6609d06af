"""How an alert gets to people: by e-mail, to a webhook, to Slack, or through the site's own code.

A notifier is what a dotted path in ``NOTIFIERS`` leads to: a function that takes an ``Alert``, or
a class whose instances do, made with the entry's OPTIONS. What it raises is a failure, and is tried
again. It has to give up within some seconds by itself.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from django.conf import settings
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage
from django.utils.module_loading import import_string
from django.utils.translation import gettext as _

from ai_budget.conf import conf
from ai_budget.models import Alert, FeatureBudget

TIMEOUT = 5
"""Seconds that a server has to answer, unless OPTIONS say otherwise."""

SIGNAL = "signal"
"""What the deliveries of ``alert_raised`` are kept under."""

Notifier = Callable[[Alert], object]


class DeliveryFailed(Exception):
    """An alert was not taken. The message is kept and logged: it names no address."""


# What the settings name --------------------------------------------------------------------------


def named() -> Mapping[str, str | Mapping[str, Any]]:
    """Return the entries of ``NOTIFIERS`` by the names that deliveries are kept under.

    That is the path; of several with one path the later ones are numbered. Options have no part
    in it: they may hold secrets, and an address that is put right gets what is still due.
    """
    entries: dict[str, str | Mapping[str, Any]] = {}
    for entry in conf.NOTIFIERS:
        path = entry if isinstance(entry, str) else str(entry["BACKEND"])
        name, number = path, 1
        while name in entries:
            number += 1
            name = f"{path}#{number}"
        entries[name] = entry
    return entries


def load(entry: str | Mapping[str, Any]) -> Notifier:
    """Return the notifier of an entry of ``NOTIFIERS``.

    Raises ``ImportError`` for a path that leads nowhere, ``TypeError`` and
    ``ImproperlyConfigured`` for options that it does not take.
    """
    if isinstance(entry, str):
        entry = {"BACKEND": entry}
    target = import_string(entry["BACKEND"])
    if not callable(target):
        raise TypeError("what it names cannot be called")
    options = dict(entry.get("OPTIONS", {}))
    if isinstance(target, type):
        notifier: Notifier = target(**options)
        if not callable(notifier):
            raise TypeError("what it makes cannot be called")
        return notifier
    inspect.signature(target).bind(None, **options)
    return partial(target, **options)


# What a site has from us -------------------------------------------------------------------------


class Email:
    """E-mail to the owner of the budget, else of its category, and to the site's ADMINS.

    ``recipients`` get it, too. ``base_url`` is put before the path of the admin. ``using`` names
    one of MAILERS, where there are any.
    """

    def __init__(
        self,
        *,
        recipients: Sequence[str] = (),
        from_email: str | None = None,
        base_url: str = "",
        using: str = "default",
    ) -> None:
        if isinstance(recipients, str):
            raise TypeError("recipients must be a list of addresses")
        self.recipients = recipients
        self.from_email = from_email
        self.base_url = base_url
        self.using = using

    def __call__(self, alert: Alert) -> None:
        to = list(dict.fromkeys([*owners(alert.budget), *admins(), *self.recipients]))
        if not to:
            return
        message = EmailMessage(
            subject=" ".join(f"{settings.EMAIL_SUBJECT_PREFIX}{alert.title}".split()),
            body=f"{alert.title}\n\n{alert.text}\n\n{_where(alert, self.base_url)}".strip() + "\n",
            from_email=self.from_email,
            to=to,
        )
        self._connection().send_messages([message])

    def _connection(self) -> Any:
        # MAILERS came with Django 6.1.
        mailers = getattr(mail, "mailers", None)
        connection: Any = mail.get_connection() if mailers is None else mailers[self.using]
        if getattr(connection, "timeout", TIMEOUT) is None:
            connection.timeout = TIMEOUT  # else a mail server that is silent is waited for
        return connection


class Webhook:
    """An HTTP POST of the alert as JSON.

    To HTTPS alone, but for this machine itself; redirects are not followed, and a status from 300
    on is a failure. ``timeout`` is in seconds and is that of the whole delivery. ``headers`` may
    hold a token. ``base_url`` is put before the path of the admin.
    """

    def __init__(
        self,
        *,
        url: str,
        headers: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT,
        base_url: str = "",
    ) -> None:
        self.is_local = _ensure_safe(url)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0:
            raise ImproperlyConfigured("timeout must be a number of seconds above 0")
        self.url = url
        self.headers = {**(headers or {}), "Content-Type": "application/json"}
        self.timeout = timeout
        self.base_url = base_url

    def __call__(self, alert: Alert) -> None:
        body = json.dumps(self.payload(alert), ensure_ascii=False).encode()
        request = Request(self.url, data=body, headers=self.headers, method="POST")  # noqa: S310
        status = _within(self.timeout, partial(_post, request, self.timeout, self.is_local))
        if status >= 300:
            raise DeliveryFailed(f"HTTP {status}")

    def payload(self, alert: Alert) -> dict[str, Any]:
        """Return what is sent: figures, no prompts and no users."""
        amounts = {
            "spent_usd": alert.spent_usd,
            "of_usd": alert.of_usd,
            "forecast_usd": alert.forecast_usd,
        }
        moments = {"raised_at": alert.raised_at, "since": alert.since, "until": alert.until}
        return {
            "id": alert.pk,
            "title": alert.title,
            "text": alert.text,
            "kind": alert.kind,
            "effect": alert.effect,
            "budget": alert.budget,
            "period": alert.period,
            "first_day": alert.first_day.isoformat(),
            "threshold": alert.threshold,
            "about": alert.about,
            **{key: None if it is None else str(it) for key, it in amounts.items()},
            "percent": alert.percent,
            "count": alert.count,
            "model": alert.model,
            "rung": alert.rung,
            **{key: None if it is None else it.isoformat() for key, it in moments.items()},
            "url": f"{self.base_url}{alert.path}",
        }


class Slack(Webhook):
    """An incoming webhook of Slack, or of what understands its messages.

    https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks
    """

    def payload(self, alert: Alert) -> dict[str, Any]:
        """Return a message whose characters that mean something to Slack mean nothing."""
        lines = [f"*{alert.title}*", alert.text, _where(alert, self.base_url)]
        text = "\n".join(line for line in lines if line)
        for mark, harmless in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
            text = text.replace(mark, harmless)
        return {"text": text}


# Who -----------------------------------------------------------------------------------------


def owners(budget: str) -> Iterator[str]:
    """Yield the address of a budget's owner, or else of its category's."""
    found = FeatureBudget.objects.using(conf.LEDGER_DATABASE).select_related("parent")
    row = found.filter(name=budget).first()
    if row is None:
        return
    address = row.owner_email or (row.parent.owner_email if row.parent else "")
    if address:
        yield address


def admins() -> list[str]:
    """Return the addresses of ADMINS: strings from Django 6.0 on, pairs with a name before."""
    return [
        str(admin[1]) if isinstance(admin, (list, tuple)) else str(admin)
        for admin in settings.ADMINS
    ]


def _where(alert: Alert, base_url: str) -> str:
    return _("In the admin: %(url)s") % {"url": f"{base_url}{alert.path}"} if alert.path else ""


# HTTP ----------------------------------------------------------------------------------------

_LOCAL = {"localhost", "127.0.0.1", "::1"}


def _ensure_safe(url: str) -> bool:
    """Say whether an address is this machine's own. The message never shows it."""
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        scheme, host = parts.scheme, parts.hostname
    except ValueError:
        scheme, host = "", None
    if not host or scheme not in ("http", "https"):
        raise ImproperlyConfigured("url must be an address that begins with https://")
    if scheme == "http" and host not in _LOCAL:
        raise ImproperlyConfigured("url must begin with https://, but for this machine itself")
    return host in _LOCAL


def _post(request: Request, timeout: float, is_local: bool) -> int:
    """Send a request and return the status of its answer, of which nothing more is read.

    Without the handlers that follow redirects, or take a status for an error.
    """
    opener = OpenerDirector()
    for handler in (ProxyHandler({} if is_local else None), HTTPHandler(), HTTPSHandler()):
        opener.add_handler(handler)
    try:
        with opener.open(request, timeout=timeout) as response:
            return int(response.status)
    except URLError as error:
        raise DeliveryFailed(type(error.reason).__name__) from None


def _within(seconds: float, work: Callable[[], int]) -> int:
    """Return what the work returns, or raise ``DeliveryFailed`` once it takes too long.

    A timeout of sockets is for each of their operations: looking up a name has none, and a server
    that sends a byte now and then is never too late. The thread ends with its socket.
    """
    results: list[int | Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, name="ai_budget webhook", daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        raise DeliveryFailed("TimeoutError")
    (result,) = results
    if isinstance(result, Exception):
        raise result
    return result
