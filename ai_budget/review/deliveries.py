"""Delivering alerts: each to every notifier, at least once, tried again for about a day.

Twice only where a worker died, or was not heard, after its notifier had told it: a delivery is one
worker's for as long as ``LEASE``.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.ledger.set_aside import SetAside
from ai_budget.models import Alert, AlertDelivery
from ai_budget.review import notifiers
from ai_budget.review.notifiers import DeliveryFailed
from ai_budget.signals import alert_raised

log = logging.getLogger("ai_budget")

LEASE = timedelta(minutes=10)
"""After so long a delivery whose worker says nothing is anybody's."""

PATIENCE = 10.0
"""Seconds after which no further delivery is begun: the next tick goes on."""

FIRST_RETRY = timedelta(minutes=1)
LONGEST_RETRY = timedelta(hours=2)

GIVEN_UP_AFTER = timedelta(days=1)


def deliver(*, using: str | None = None, aside: SetAside | None = None) -> int:
    """Deliver what is due, and return how much was. What fails is due again later.

    A notifier that fails has no second chance in the same run, so that one whose server is dead
    costs one timeout. A delivery that nothing can be done with is set ``aside``.
    """
    alias, aside = using or conf.LEDGER_DATABASE, aside or SetAside()
    give_up = periods.monotonic() + PATIENCE
    failed: set[str] = set()
    delivered = 0
    while periods.monotonic() < give_up:
        now = periods.now()
        found = _next(now, failed, alias)
        if found is None:
            break
        lease = now + LEASE
        if not _take(found, lease, alias):
            continue
        found.tries += 1
        with aside.on_failure("delivery", found.pk):
            error = _tell(found.notifier, found.alert)
            if error is None:
                _close(found, lease, alias, due_at=None, delivered_at=periods.now(), error="")
                delivered += 1
            else:
                failed.add(found.notifier)
                _note_failure(found, error, lease, alias)
    return delivered


def _next(now: datetime, failed: set[str], alias: str) -> AlertDelivery | None:
    due = AlertDelivery.objects.using(alias).select_related("alert").filter(due_at__lte=now)
    return due.exclude(notifier__in=failed).order_by("due_at", "pk").first()


def _take(delivery: AlertDelivery, lease: datetime, alias: str) -> bool:
    """Make a delivery this worker's, and say whether it is: whoever moves it on has it."""
    still = AlertDelivery.objects.using(alias).filter(pk=delivery.pk, due_at=delivery.due_at)
    return bool(still.update(due_at=lease, tries=delivery.tries + 1))


def _close(delivery: AlertDelivery, lease: datetime, alias: str, **values: object) -> None:
    """Write how a delivery went, unless its lease ran out and another worker has it."""
    AlertDelivery.objects.using(alias).filter(pk=delivery.pk, due_at=lease).update(**values)


def _tell(name: str, alert: Alert) -> str | None:
    """Have a notifier tell an alert; return what kind of error kept it from that.

    Of the error no more than its type: its text may hold an address with a token.
    """
    if name == notifiers.SIGNAL:
        _send_signal(alert)
        return None
    try:
        entry = notifiers.named().get(name)
        if entry is None:
            return _GONE
        notifiers.load(entry)(alert)
    except DeliveryFailed as error:
        return str(error)
    except Exception as error:
        return type(error).__name__
    return None


_GONE = "not in NOTIFIERS"


def _send_signal(alert: Alert) -> None:
    for receiver, result in alert_raised.send_robust(sender=Alert, alert=alert):
        if isinstance(result, Exception):
            log.error("The receiver %r failed: %s", receiver, type(result).__name__)


def _note_failure(delivery: AlertDelivery, error: str, lease: datetime, alias: str) -> None:
    now, error = periods.now(), error[:64]
    if error == _GONE or now - delivery.alert.raised_at >= GIVEN_UP_AFTER:
        _close(delivery, lease, alias, due_at=None, error=error)
        log.error(
            "Alert %s is not delivered by %s (%s): given up after %s tries.",
            delivery.alert_id,
            delivery.notifier,
            error,
            delivery.tries,
        )
        return
    wait = min(LONGEST_RETRY, FIRST_RETRY * (1 << min(delivery.tries - 1, 10)))
    _close(delivery, lease, alias, due_at=now + wait, error=error)
    log.warning(
        "Alert %s could not be delivered by %s (%s); it is tried again.",
        delivery.alert_id,
        delivery.notifier,
        error,
    )
