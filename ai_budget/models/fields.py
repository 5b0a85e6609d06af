"""The field for limits that people type: dollars in Python and forms, nano-dollars in the table."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from django import forms
from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import lookups
from django.utils.translation import gettext_lazy as _

from ai_budget import money

if TYPE_CHECKING:
    _Base = models.BigIntegerField[Decimal | int | str | None, Decimal | None]
else:
    _Base = models.BigIntegerField


class UsdField(_Base):
    """An amount of dollars with up to nine decimals, stored as BIGINT nano-dollars."""

    description = _("US dollars")
    default_error_messages = {
        "invalid_usd": _("“%(value)s” is not an amount of dollars with at most nine decimals.")
    }

    def from_db_value(self, value: int | None, *args: Any) -> Decimal | None:
        return None if value is None else _as_typed(value)

    def to_python(self, value: Any) -> Decimal | None:
        if value is None or value == "":
            return None
        try:
            return _as_typed(money.parse_usd(value))
        except (TypeError, ValueError):
            raise ValidationError(
                self.error_messages["invalid_usd"], code="invalid_usd", params={"value": value}
            ) from None

    def get_prep_value(self, value: Any) -> int | None:
        if value is None:
            return None
        return money.parse_usd(value)

    @property
    def validators(self) -> list[Any]:
        # The integer field's own compare against the range of a BIGINT, in its unit, not ours.
        own: list[Any] = self._validators  # type: ignore[attr-defined]
        return list(own)

    def value_to_string(self, obj: models.Model) -> str:
        value = self.value_from_object(obj)
        return "" if value is None else format(Decimal(value), "f")

    def formfield(self, **kwargs: Any) -> forms.Field | None:
        options: dict[str, Any] = {
            "form_class": forms.DecimalField,
            "min_value": Decimal(0),
            "max_digits": 19,
            "decimal_places": 9,
            "widget": forms.NumberInput(attrs={"step": "any"}),
        }
        # BigIntegerField would add the bounds of an integer; its own base does not.
        return models.Field.formfield(self, **(options | kwargs))


def _as_typed(nanousd: int) -> Decimal:
    """Return dollars with the cents that a person would write, and no more zeros than needed."""
    amount = money.to_usd(nanousd)
    cents = amount.quantize(Decimal("0.01"))
    return cents if cents == amount else amount.normalize()


# An integer field's own round a float up to whole numbers; dollars refuse one.
UsdField.register_lookup(lookups.GreaterThanOrEqual)
UsdField.register_lookup(lookups.LessThan)
