"""CSV whose cells a spreadsheet cannot read as formulas, row by row."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, Protocol

# The last four are the full-width forms of the first.
_FORMULA_STARTS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
_BREAKS = ("\t", "\n")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


class _Writable(Protocol):
    def write(self, text: str, /) -> object: ...


class Writer:
    """Writes rows of harmless cells, ended by a line feed."""

    def __init__(self, out: _Writable) -> None:
        self._writer = csv.writer(out, lineterminator="\n")

    def writerow(self, row: Iterable[Any]) -> None:
        """Write one row."""
        self._writer.writerow([harmless(cell) for cell in row])

    def writerows(self, rows: Iterable[Iterable[Any]]) -> None:
        """Write many rows."""
        for row in rows:
            self.writerow(row)


def writer(out: _Writable) -> Writer:
    """Return what writes rows of harmless cells into ``out``."""
    return Writer(out)


def lines(rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Yield each row as a line of CSV, so that a long export is never in memory as a whole."""
    last = _Last()
    into = Writer(last)
    for row in rows:
        into.writerow(row)
        yield last.text


def harmless(cell: Any) -> Any:
    """Keep a cell from being read as a formula by the spreadsheet that opens the file.

    Numbers stay what they are; a text that begins like a formula gets an apostrophe before it.
    """
    if isinstance(cell, bool):
        return str(cell).lower()
    if cell is None or isinstance(cell, int):
        return cell
    if isinstance(cell, Decimal):
        return format(cell, "f")
    # Before Python 3.13 the writer leaves a lone carriage return unquoted: a broken row.
    text = str(cell).replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if _is_like_a_formula(text) else text


def _is_like_a_formula(text: str) -> bool:
    if text.startswith(_BREAKS):
        return True
    # Some programs leave out the spaces before it.
    return text.lstrip().startswith(_FORMULA_STARTS) and not _NUMBER.fullmatch(text)


class _Last:
    """Keeps what was written last."""

    text = ""

    def write(self, text: str, /) -> None:
        self.text = text
