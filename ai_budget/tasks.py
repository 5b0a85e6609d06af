"""Batches and periodic work as Celery tasks: thin, and safe to run twice.

Have ``ai_budget.tick`` run every minute or so, by Celery beat, and ``ai_budget.monthly_report``
once a month. With QUEUE "celery" a batch is sent as soon as it was submitted; else, and where a
task was lost, by the next tick.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from celery import shared_task
from django.core.management import call_command

from ai_budget import batches
from ai_budget.review.notifiers import admins

log = logging.getLogger("ai_budget")

PATIENCE = 2.0
"""Seconds that a broker which does not answer may keep a request waiting."""

# Acknowledged before they run, whatever the site has set. Whoever dies keeps the submission to
# itself for a while, so a message that came back at once would find nothing to do, and brokers
# take a message from a worker that reads results for longer than they expect.


@shared_task(name="ai_budget.advance", acks_late=False, ignore_result=True)
def advance(submission_id: int) -> None:
    """Take a submission of a batch one step further, if it is due."""
    batches.advance(submission_id)


# Ticks that wait while no worker runs do no more than the last of them.
@shared_task(name="ai_budget.tick", acks_late=False, ignore_result=True, expires=600)
def tick() -> None:
    """Do all periodic work; a submission that is due gets a task of its own."""
    try:
        send(batches.due())
    finally:
        call_command("ai_budget_tick", leave_batches=True, verbosity=0)


# Once a month, by beat: run twice it would be sent twice.
@shared_task(name="ai_budget.monthly_report", acks_late=False, ignore_result=True)
def monthly_report() -> None:
    """Send the report of last month to ADMINS."""
    addresses = admins()
    if not addresses:
        log.warning("Nobody is in ADMINS, so nobody is sent the monthly report.")
        return
    call_command("cost_report", month="last", email=addresses, verbosity=0)


def send(submission_ids: Collection[int]) -> None:
    """Send a task for each submission.

    Raises what the broker's library raises, soon: on a connection of its own, for those of the
    site's pool may wait for a broker without end.
    """
    if not submission_ids:
        return
    app = advance.app
    connection = app.connection_for_write(connect_timeout=PATIENCE)
    connection.transport_options = {
        **(connection.transport_options or {}),
        **_timeouts(connection.transport.driver_type),
        # Each of several brokers once.
        "max_retries": max(len(connection.alt or ()) - 1, 0),
        "interval_start": 0,
    }
    with connection, app.amqp.Producer(connection, auto_declare=False) as producer:
        for submission_id in submission_ids:
            advance.apply_async((submission_id,), producer=producer, retry=False)


def _timeouts(broker: str) -> Mapping[str, Any]:
    """Return the options of a transport that end its waiting."""
    if broker == "redis":
        return {"socket_connect_timeout": PATIENCE, "socket_timeout": PATIENCE}
    if broker == "amqp":
        return {"read_timeout": PATIENCE, "write_timeout": PATIENCE}
    return {}
