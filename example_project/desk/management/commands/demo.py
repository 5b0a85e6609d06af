"""``manage.py demo``: the example site with everything it needs, in one process."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.servers.basehttp import (
    ThreadedWSGIServer,
    WSGIRequestHandler,
    get_internal_wsgi_application,
)
from django.db import connections
from django.db.models import Count, Sum

import ai_budget
from ai_budget import money, periods
from ai_budget.models import CallLog
from ai_budget.periods import Period
from example_project.desk import stand_in
from example_project.desk.accounts import DEMO_ACCOUNTS
from example_project.desk.seed import seed
from example_project.desk.seed.notes import create_notes
from example_project.desk.templatetags.desk import usd
from example_project.desk.usage import budget_allowance
from example_project.desk.views import LIBRARIAN
from example_project.settings import MAIL_FOLDER

QUESTION = "What does a budget for an AI feature protect me from?"
_PORTS_TRIED = 20
_TICK_SECONDS = 5.0  # a site's cron has a minute; who looks at a demo does not
_HISTORY = 100  # requests that the stand-in remembers: a demo may run for weeks


class Command(BaseCommand):
    """Migrates, seeds, makes one guarded call, and serves the site until Ctrl-C."""

    help = "Run the example site: database, a month of spend, a local API, and the server."
    # The migration runs the checks, after which there is nothing new to find.
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
        parser.add_argument("--port", type=int, default=8000, help="the first port to try")

    def handle(self, *args: Any, **options: Any) -> None:
        with stopped_cleanly():
            self._run(options["host"], options["port"])
        self.stdout.write("\nStopped.")

    def _run(self, host: str, port: int) -> None:
        call_command("migrate", verbosity=0, interactive=False)
        self._seed()
        # Calls whose process was stopped in the middle, or the one that was seeded in flight.
        call_command("ai_budget_tick", stdout=self.stdout)
        with ExitStack() as stack:
            self._open_api(stack)
            stack.enter_context(ticking())
            server = stack.enter_context(self._listen(host, port))
            self._make_call()
            self._show_addresses(host, server.server_port)
            server.serve_forever()

    def _seed(self) -> None:
        now = periods.now()
        seeded = seed(now=now)
        create_notes(now=now)
        total = CallLog.objects.aggregate(calls=Count("id"), cost=Sum("cost_nanousd"))
        fresh = "Seeded a month of spend" if seeded else "Found the spend so far"
        spent = money.format_usd(total["cost"] or 0)
        self._say(f"{fresh}: {total['calls']:,} calls for {spent}.")

    def _open_api(self, stack: ExitStack) -> None:
        """Start the stand-in for the API, unless there is a key or one runs elsewhere."""
        if os.environ.get("ANTHROPIC_API_KEY"):
            self._say("ANTHROPIC_API_KEY is set: answers come from the real API and cost money.")
            return
        if not os.environ.get("AI_BUDGET_SIMULATOR_URL"):
            from ai_budget.testing.simulator import AnthropicSimulator

            api = stack.enter_context(AnthropicSimulator(default=stand_in.reply, history=_HISTORY))
            api.batches.default = stand_in.item_reply
            settings.AI_BUDGET["BASE_URL"] = api.base_url
        self._say(
            f"Answers come from the local stand-in at {settings.AI_BUDGET['BASE_URL']} "
            "(ANTHROPIC_API_KEY would use the real API)."
        )

    def _make_call(self) -> None:
        """Make one guarded call over HTTP, and show what it cost and what it left."""
        user = get_user_model()._default_manager.filter(username="ada").first()
        self._say(f'\nOne guarded call, for the feature "chat" and the user {user}:\n')
        self._say(f"  Q: {QUESTION}")
        try:
            answer = ai_budget.ask(QUESTION, feature="chat", user=user, system=LIBRARIAN)
        except ai_budget.AIBudgetError as error:
            self._say(f"  Not sent. {error}")
            return
        except _api_error() as error:
            self._say(f"  No answer: {type(error).__name__}.")
            return
        self._say(f"  A: {answer.text.splitlines()[0]}\n")
        usage = answer.usage
        self._say(
            f"  Cost   {usd(answer.cost)} for {usage.prompt_tokens} tokens read and "
            f"{usage.output_tokens} written by {answer.model}"
        )
        self._say(f"  Left   {_left('chat')} for the feature, {_left('*')} for the whole site")

    @contextmanager
    def _listen(self, host: str, port: int) -> Iterator[ThreadedWSGIServer]:
        """Bind the first free port from ``port`` on, before anything is promised about it."""
        server = self._bind(host, port)
        server.set_app(get_internal_wsgi_application())
        try:
            yield server
        finally:
            server.server_close()

    def _bind(self, host: str, port: int) -> ThreadedWSGIServer:
        for candidate in range(port, port + _PORTS_TRIED):
            try:
                server = ThreadedWSGIServer((host, candidate), WSGIRequestHandler, ipv6=":" in host)
            except OverflowError:
                raise CommandError(f"{candidate} is not a port.") from None
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise CommandError(
                    f"Cannot listen on {host}:{candidate}: {error.strerror or error}."
                ) from None
            if candidate != port:
                self._say(f"Port {port} is taken; this is on port {candidate}.")
            return server
        raise CommandError(f"The ports {port} to {port + _PORTS_TRIED - 1} are all taken.")

    def _show_addresses(self, host: str, port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        staff = [account.username for account in DEMO_ACCOUNTS if account.is_staff]
        readers = [account.username for account in DEMO_ACCOUNTS if not account.is_staff]
        self._say(f"\n  Site   http://{shown}:{port}/         {_logins(readers)}")
        self._say(f"  Admin  http://{shown}:{port}/admin/   {_logins(staff)}")
        self._say(
            f"  Night  http://{shown}:{port}/notes/   manage.py sort_notes sorts them by batch"
        )
        self._say(f"  Mail   {MAIL_FOLDER}   what alerts would send")
        self._say("\nThe passwords are for this demo only. Ctrl-C stops it.")

    def _say(self, text: str) -> None:
        self.stdout.write(text)
        # Into a pipe, nothing would appear until much later.
        self.stdout.flush()


@contextmanager
def stopped_cleanly() -> Iterator[None]:
    """End quietly at Ctrl-C, or when the process is asked to end.

    A shell that starts a program in the background has it ignore Ctrl-C; not this one.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    with suppress(KeyboardInterrupt):
        yield


@contextmanager
def ticking() -> Iterator[None]:
    """Do the periodic work now and then, as cron or Celery beat would: it brings the batches."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(_TICK_SECONDS):
            with suppress(CommandError):  # the next one does what this one could not
                call_command("ai_budget_tick", verbosity=0)
        connections.close_all()

    thread = threading.Thread(target=work, name="tick", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_TICK_SECONDS)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _left(name: str) -> str:
    today = budget_allowance(name, Period.DAY)
    if today.left is None:
        return "no daily limit"
    return f"{usd(today.left)} of {usd(today.limit)} today"


def _logins(usernames: list[str]) -> str:
    return ", ".join(f"{username} / {username}" for username in usernames)


def _api_error() -> type[Exception]:
    from anthropic import APIError

    return APIError
