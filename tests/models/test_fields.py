"""Dollars in Python and in forms, nano-dollars in the table, never a float."""

from __future__ import annotations

from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django import forms
from django.core.exceptions import ValidationError
from django.core.management import call_command
from django.db import connection
from django.db.models import F, Max, Sum
from django.forms import modelform_factory
from hypothesis import given
from hypothesis import strategies as st

from ai_budget import money
from ai_budget.models import FeatureBudget
from ai_budget.models.fields import UsdField
from tests.factories import FeatureBudgetFactory

pytestmark = pytest.mark.django_db

MOST = money.to_usd(money.MAX_NANOUSD)
LIMIT = FeatureBudget._meta.get_field("daily_limit_usd")


def saved(amount: Any) -> FeatureBudget:
    return FeatureBudgetFactory.create(name="chat", daily_limit_usd=amount)


def stored() -> Any:
    with connection.cursor() as cursor:
        cursor.execute("SELECT daily_limit_usd FROM ai_budget_featurebudget WHERE name = 'chat'")
        return cursor.fetchone()[0]


def found(**lookups: Any) -> bool:
    return FeatureBudget.objects.filter(name="chat", **lookups).exists()


# In the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amount", "nanousd"),
    [
        (Decimal("12.5"), 12_500_000_000),
        (20, 20_000_000_000),
        ("0.000000001", 1),
        (Decimal("1E+2"), 100_000_000_000),
        (0, 0),
        (MOST, money.MAX_NANOUSD),
        (None, None),
    ],
)
def test_the_table_has_nano_dollars(amount: Any, nanousd: int | None) -> None:
    saved(amount)

    assert stored() == nanousd


@given(st.integers(0, money.MAX_NANOUSD))
def test_any_amount_comes_back_exactly(nanousd: int) -> None:
    saved(None)
    FeatureBudget.objects.update(daily_limit_usd=money.to_usd(nanousd))

    amount = FeatureBudget.objects.get(name="chat").daily_limit_usd

    assert isinstance(amount, Decimal)
    assert money.parse_usd(amount) == nanousd


def test_what_is_read_is_a_decimal() -> None:
    saved(20)

    amount = FeatureBudget.objects.get(name="chat").daily_limit_usd

    assert (type(amount), amount) == (Decimal, Decimal(20))


@pytest.mark.parametrize("amount", [0.1, 1.0, float("nan"), True, b"1"])
def test_what_is_no_exact_amount_is_not_saved(amount: Any) -> None:
    with pytest.raises(TypeError, match="dollars must be"):
        saved(amount)


@pytest.mark.parametrize("amount", ["0.0000000001", "ten", "", Decimal("NaN"), 10_000_000_000])
def test_what_is_no_amount_is_not_saved(amount: Any) -> None:
    with pytest.raises(ValueError, match=r"dollars|decimals"):
        saved(amount)


# Look-ups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lookup", "amount", "matches"),
    [
        ("exact", Decimal("12.5"), True),
        ("exact", "12.500000001", False),
        ("gte", Decimal("12.5"), True),
        ("gte", Decimal("12.500000001"), False),
        ("gt", Decimal("12.499999999"), True),
        ("gt", Decimal("12.5"), False),
        ("lte", Decimal("12.5"), True),
        ("lte", Decimal("12.499999999"), False),
        ("lt", 13, True),
        ("in", [Decimal("12.5"), 20], True),
        ("range", (12, 13), True),
        ("isnull", False, True),
    ],
)
def test_a_look_up_is_in_dollars(lookup: str, amount: Any, matches: bool) -> None:
    saved(Decimal("12.5"))

    assert found(**{f"daily_limit_usd__{lookup}": amount}) is matches


def test_a_look_up_of_a_float_is_refused() -> None:
    with pytest.raises(TypeError, match="not float"):
        found(daily_limit_usd__gte=12.5)


def test_a_sum_is_in_dollars() -> None:
    FeatureBudgetFactory.create(daily_limit_usd="0.1")
    FeatureBudgetFactory.create(daily_limit_usd="0.2")

    totals = FeatureBudget.objects.aggregate(Sum("daily_limit_usd"), Max("daily_limit_usd"))

    assert totals == {
        "daily_limit_usd__sum": Decimal("0.3"),
        "daily_limit_usd__max": Decimal("0.2"),
    }


def test_one_amount_can_be_copied_to_another() -> None:
    saved("12.5")

    FeatureBudget.objects.update(monthly_limit_usd=F("daily_limit_usd"))

    assert FeatureBudget.objects.get(name="chat").monthly_limit_usd == Decimal("12.5")


# Validation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "amount", ["0.0000000001", 0.1, "ten", True, Decimal("Infinity"), "9223372036.854775808"]
)
def test_what_is_no_amount_is_not_valid(amount: Any) -> None:
    with pytest.raises(ValidationError) as raised:
        FeatureBudget(name="chat", daily_limit_usd=amount).full_clean()

    assert set(raised.value.message_dict) == {"daily_limit_usd"}
    assert raised.value.error_dict["daily_limit_usd"][0].code == "invalid_usd"


@pytest.mark.parametrize("amount", ["0.000000001", MOST, 0, None])
def test_an_amount_is_valid(amount: Any) -> None:
    FeatureBudget(name="chat", daily_limit_usd=amount).full_clean()


def test_a_negative_limit_is_not_valid() -> None:
    with pytest.raises(ValidationError):
        FeatureBudget(name="chat", daily_limit_usd=-1).full_clean()


# Forms -------------------------------------------------------------------------------------------


def form(amount: str) -> forms.BaseModelForm[FeatureBudget]:
    return modelform_factory(FeatureBudget, fields=["name", "daily_limit_usd"])(
        {"name": "chat", "daily_limit_usd": amount}
    )


@pytest.mark.parametrize(
    ("typed", "nanousd"), [("12.50", 12_500_000_000), ("0.000000001", 1), ("0", 0), ("", None)]
)
def test_a_form_takes_dollars(typed: str, nanousd: int | None) -> None:
    form(typed).save()

    assert stored() == nanousd


@pytest.mark.parametrize("typed", ["-1", "0.0000000001", "ten", "9999999999", "NaN", "1e400"])
def test_a_form_refuses_what_is_no_limit(typed: str) -> None:
    assert set(form(typed).errors) == {"daily_limit_usd"}


def test_a_form_shows_dollars() -> None:
    budget = saved("12.5")
    budget.refresh_from_db()

    shown = modelform_factory(FeatureBudget, fields=["daily_limit_usd"])(instance=budget)

    assert 'value="12.50"' in str(shown["daily_limit_usd"])


def test_a_form_that_changes_nothing_has_not_changed() -> None:
    budget = saved("12.5")
    budget.refresh_from_db()
    again = modelform_factory(FeatureBudget, fields=["daily_limit_usd"])(
        {"daily_limit_usd": "12.50"}, instance=budget
    )

    assert again.changed_data == []


# Serialisation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json", "jsonl", "xml"])
@pytest.mark.parametrize("amount", [Decimal("12.5"), Decimal("1E+2"), MOST, Decimal("1E-9"), None])
def test_a_dump_can_be_loaded(kind: str, amount: Decimal | None, tmp_path: Path) -> None:
    saved(amount)
    before, dump = stored(), tmp_path / f"budgets.{kind}"
    call_command("dumpdata", "ai_budget.featurebudget", format=kind, output=str(dump), verbosity=0)
    FeatureBudget.objects.all().delete()

    call_command("loaddata", str(dump), verbosity=0)

    assert stored() == before


def test_a_dump_has_dollars() -> None:
    saved("12.5")
    dump = StringIO()

    call_command("dumpdata", "ai_budget.featurebudget", stdout=dump)

    assert '"daily_limit_usd": "12.50"' in dump.getvalue()


def test_an_amount_that_was_set_as_text_is_dumped_as_dollars() -> None:
    assert LIMIT.value_to_string(FeatureBudget(daily_limit_usd="1E+2")) == "100"


def test_the_field_can_be_rebuilt_for_a_migration() -> None:
    assert isinstance(LIMIT, UsdField)

    name, path, args, kwargs = LIMIT.deconstruct()

    assert (name, path) == ("daily_limit_usd", "ai_budget.models.fields.UsdField")
    assert isinstance(UsdField(*args, **kwargs), UsdField)
