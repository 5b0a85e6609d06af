"""``manage.py ai_budget_rebuild``: balances made the sum of the call log again."""

from __future__ import annotations

from datetime import date
from functools import partial
from typing import Any

from django.core.management.base import CommandParser
from django.db import connections

from ai_budget import money, periods
from ai_budget.conf import conf
from ai_budget.exceptions import CallInsideTransaction, LedgerUnavailable
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.connection import retry
from ai_budget.ledger.kept import whole_since
from ai_budget.ledger.set_aside import SetAside
from ai_budget.management.plain import PlainCommand, WrongArgument, parse_day
from ai_budget.periods import Period
from ai_budget.review import rollups
from ai_budget.values import BalanceKey, Difference

DIFFERENT = 1
"""The exit code of ``--check`` where a balance is wrong."""

_EARLIEST = date(1970, 1, 1)


class Command(PlainCommand):
    """Prints each difference on stdout. Arguments that make no sense: one line, exit 2."""

    help = (
        "Make every balance the sum of the call log again, while calls go on, and recreate the "
        "totals that reports read. Refusals are counted in the balances alone and stay as they "
        "are."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--check",
            action="store_true",
            help="change nothing: print what is wrong, and exit with 1 if anything is",
        )
        # Its value is checked in `handle`, where those that call_command passes arrive too.
        parser.add_argument(
            "--since",
            metavar="DATE",
            help=(
                "the first day, such as 2026-10-01, and the month it is in; default: the first "
                "day of last month, in AI_BUDGET['TIME_ZONE']"
            ),
        )

    def handle(self, **options: Any) -> None:
        try:
            since = _since(options["since"])
        except WrongArgument as error:
            self.fail(str(error))
        balances = self._balances(since, check=options["check"])
        totals = self._totals(since, check=options["check"])
        if options["check"] and (balances or totals):
            wrong = [it for it in (balances, totals) if it]
            self.fail(" and ".join(wrong), code=DIFFERENT)

    def _balances(self, since: date, *, check: bool) -> str:
        """Compare or mend balances; return how many are wrong, in words."""
        ledger = ledgers.current()
        aside = SetAside()
        compare = ledger.differences if check else partial(ledger.rebuild, aside=aside)
        try:
            whole = _whole_since(ledger.alias)
            if whole is not None and since < whole:
                self.print(f"Calls before {whole} were purged: those balances stay as they are.")
                since = whole
            found = compare(since)
        except (CallInsideTransaction, LedgerUnavailable) as error:
            self.fail(str(error))
        for difference in found:
            self.print(_line(difference))
        if aside.names:
            self.fail(f"Not mended: {', '.join(map(ascii, aside.names))}. See the log.")
        if not found:
            self.print(f"Every balance since {since} is the sum of the call log.")
        elif not check:
            self.print(f"{_balances(len(found))} right again.")
        return f"{_balances(len(found))} wrong" if found else ""

    def _totals(self, since: date, *, check: bool) -> str:
        """Compare or recreate totals; return how many days are wrong, in words."""
        try:
            wrong = rollups.differences(since)
            if wrong and not check:
                rollups.rebuild(min(wrong))
        except (CallInsideTransaction, LedgerUnavailable) as error:
            self.fail(str(error))
        for day in wrong:
            self.print(f"totals {day}: not the sum of the calls")
        if wrong and not check:
            self.print(f"The totals of {_days(len(wrong))} right again.")
        return f"the totals of {_days(len(wrong))} wrong" if wrong else ""


def _since(value: Any) -> date:
    today = periods.day(periods.now(), conf.TIME_ZONE).first_day
    if value is None:
        return periods.previous_month(today)
    first = parse_day("--since", value)
    if first > today:
        raise WrongArgument(f"--since ({first}) is after today ({today})")
    if first < _EARLIEST:
        raise WrongArgument(f"--since ({first}) is out of range")
    return first


def _whole_since(alias: str) -> date | None:
    return retry(connections[alias], lambda: whole_since(alias))


def _balances(number: int) -> str:
    return "1 balance is" if number == 1 else f"{number} balances are"


def _days(number: int) -> str:
    return "1 day are" if number == 1 else f"{number} days are"


def _line(difference: Difference) -> str:
    kept, journal = difference.kept, difference.journal
    parts = (
        ("spent", _usd(kept.spent_nanousd), _usd(journal.spent_nanousd)),
        ("held", _usd(kept.held_nanousd), _usd(journal.held_nanousd)),
        ("calls", f"{kept.calls:,}", f"{journal.calls:,}"),
    )
    wrong = [f"{name} {was}, not {right}" for name, was, right in parts if was != right]
    return f"{_name(difference.key)}: {'; '.join(wrong)}"


def _name(key: BalanceKey) -> str:
    day = f"{key.first_day:%Y-%m}" if key.period is Period.MONTH else key.first_day.isoformat()
    return f"{key.scope} {key.period} {day}"


def _usd(nanousd: int) -> str:
    """Return exact dollars: what is wrong may be less than a cent."""
    return money.format_usd(nanousd, decimals=9)
