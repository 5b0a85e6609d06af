from __future__ import annotations

import threading
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from ai_budget.testing.batches import Pace
from ai_budget.testing.simulator import AnthropicSimulator
from ai_budget.testing.steps import Reply

# Enough to look at; a demo that runs for weeks must not fill the memory.
_HISTORY = 100


class Command(BaseCommand):
    """Serves a simulated Anthropic API on loopback until Ctrl-C."""

    help = "Serve a simulated Anthropic API on this machine: made-up answers, no key, no cost."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default="127.0.0.1", help="a loopback address")
        parser.add_argument("--port", type=int, default=8765, help="0 takes a free one")
        parser.add_argument("--compress", action="store_true", help="gzip the responses")
        parser.add_argument(
            "--delay", type=float, default=0.0, metavar="SECONDS", help="before each response"
        )
        parser.add_argument(
            "--chunk-delay",
            type=float,
            default=0.0,
            metavar="SECONDS",
            help="between the pieces of a streamed answer",
        )

        parser.add_argument(
            "--batch-seconds",
            type=float,
            default=5.0,
            metavar="SECONDS",
            help="from the creation of a batch to its end",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        host, port = options["host"], options["port"]
        try:
            api = AnthropicSimulator(
                host=host,
                port=port,
                default=Reply(delay=options["delay"], chunk_delay=options["chunk_delay"]),
                compress=options["compress"],
                history=_HISTORY,
            )
        except ValueError as error:
            raise CommandError(f"{error}: made-up answers are for this machine alone.") from None
        api.batches.pace = Pace(seconds=options["batch_seconds"])
        try:
            api.start()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CommandError(f"Cannot listen on {host}:{port}: {reason}.") from None
        with api:
            self.stdout.write(f"Simulated Anthropic API on {api.base_url} (Ctrl-C stops it).")
            self.stdout.write(
                f'Use it with AI_BUDGET = {{"BASE_URL": "{api.base_url}", "API_KEY": "any"}}'
            )
            self.stdout.flush()
            try:
                wait_for_interrupt()
            except KeyboardInterrupt:
                self.stdout.write("")


def wait_for_interrupt() -> None:
    """Blocks until Ctrl-C raises KeyboardInterrupt."""
    threading.Event().wait()
