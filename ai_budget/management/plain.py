"""Commands for scripts: plain lines on stdout, one line on stderr where something is wrong."""

from __future__ import annotations

import os
import re
import sys
from datetime import date
from typing import Any, NoReturn

from django.core.management.base import BaseCommand, CommandError, CommandParser

WRONG_ARGUMENTS = 2
"""The exit code of a command line that cannot be followed, as of one that cannot be carried out."""


class WrongArgument(Exception):
    """What is wrong with the command line, in one line."""


class _Parser(CommandParser):
    """Says what is wrong in one line, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        if self.called_from_command_line:
            self.exit(WRONG_ARGUMENTS, f"error: {message}\n")
        raise CommandError(message, returncode=WRONG_ARGUMENTS)


class PlainCommand(BaseCommand):
    """A command whose exit code and single line of error a script can rely on."""

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        parser = super().create_parser(prog_name, subcommand, **kwargs)
        # BaseCommand builds its own class of parser, and takes no other.
        parser.__class__ = _Parser
        return parser

    def fail(self, message: str, *, code: int = WRONG_ARGUMENTS) -> NoReturn:
        """End with one line and an exit code; raise ``CommandError`` for ``call_command``."""
        if self._on_command_line:
            self.stderr.write(f"error: {message}")
            sys.exit(code)
        raise CommandError(message, returncode=code)

    def print(self, line: str) -> None:
        """Print a line, without what could move the cursor."""
        self.write("".join(char if char.isprintable() else "?" for char in line) + "\n")

    def write(self, text: str) -> None:
        """Print text as it is, but for what the terminal cannot show."""
        encoding = getattr(self.stdout, "encoding", None) or "utf-8"
        try:
            self.stdout.write(text.encode(encoding, "replace").decode(encoding), ending="")
            self.stdout.flush()
        except BrokenPipeError:
            if not self._on_command_line:
                raise
            # The reader has seen enough. Python flushes once more at exit, and would complain
            # if there were nowhere to flush to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    @property
    def _on_command_line(self) -> bool:
        return bool(getattr(self, "_called_from_command_line", False))


def parse_day(option: str, value: Any) -> date:
    """Return the day that an option gives, as text or as a date."""
    if isinstance(value, date):
        return date(value.year, value.month, value.day)
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", str(value)):
        try:
            return date.fromisoformat(str(value))
        except ValueError:
            pass
    raise WrongArgument(f"{option} must be a day such as 2026-10-01, not {value!r}")
