from __future__ import annotations

import csv
import io
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_budget.review.csv_cells import harmless, lines, writer

STARTS = tuple("=+-@\t\n\uff1d\uff0b\uff0d\uff20")


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (True, "true"),
        (False, "false"),
        (None, None),
        (-5, -5),
        (Decimal("1E-9"), "0.000000001"),
        (Decimal("-0.5"), "-0.5"),
        ("-0.5", "-0.5"),
        ("12", "12"),
        ("-5+cmd", "'-5+cmd"),
        ("-", "'-"),
        ("=1+1", "'=1+1"),
        ("  =1+1", "'  =1+1"),
        ("\u00a0@x", "'\u00a0@x"),
        ("a=b", "a=b"),
        ("\r\n=x", "'\n=x"),
        ("", ""),
    ],
)
def test_a_cell_keeps_its_value_and_is_no_formula(cell: Any, expected: Any) -> None:
    assert harmless(cell) == expected


@given(st.text())
def test_any_text_is_no_formula_and_can_be_read_again(text: str) -> None:
    (line,) = lines([[text]])
    ((cell,),) = csv.reader(io.StringIO(line))

    number = cell.lstrip("-").replace(".", "", 1)
    assert not cell.lstrip(" ").startswith(STARTS) or (number.isascii() and number.isdigit())
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    assert cell in (plain, f"'{plain}")


def test_each_row_is_a_line_of_its_own() -> None:
    assert list(lines([["a", 1], ["b,c", None]])) == ["a,1\n", '"b,c",\n']


def test_a_writer_writes_many_rows() -> None:
    out = io.StringIO()

    writer(out).writerows([["=a"], [2]])

    assert out.getvalue() == "'=a\n2\n"
