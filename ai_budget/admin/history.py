"""The admin's history with old and new values: who raised a limit, and from what to what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import admin
from django.core.exceptions import ValidationError
from django.http import HttpRequest

from ai_budget.admin.amounts import trimmed

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Any]
else:
    _ModelAdmin = admin.ModelAdmin


class ValuesInHistory(_ModelAdmin):
    """Records each change with the value before and after, in inlines too."""

    def construct_change_message(
        self, request: HttpRequest, form: Any, formsets: Any, add: bool = False
    ) -> Any:
        message = super().construct_change_message(request, form, formsets, add)
        changed = [entry["changed"] for entry in message if "changed" in entry]
        for entry, its_form in zip(changed, _changed_forms(form, formsets, add), strict=True):
            entry["fields"] = [
                change(label, *_values(its_form, name))
                for label, name in zip(entry["fields"], its_form.changed_data, strict=True)
            ]
        return message


def change(label: str, before: object, after: object) -> str:
    """Return one field's change in words."""
    return f"{label} ({_shown(before)} → {_shown(after)})"


def _changed_forms(form: Any, formsets: Sequence[Any] | None, add: bool) -> Iterator[Any]:
    """Yield forms in the order in which Django describes what changed in them."""
    if form.changed_data and not add:
        yield form
    for formset in formsets or ():
        by_object = {id(its_form.instance): its_form for its_form in formset.forms}
        for changed_object, _fields in formset.changed_objects:
            yield by_object[id(changed_object)]


def _values(form: forms.ModelForm[Any], name: str) -> tuple[object, object]:
    field = form.fields[name]
    before = form.get_initial_for_field(field, name)
    if isinstance(field, forms.ModelChoiceField):
        # The row that was chosen before may be gone, or be no choice any more.
        with suppress(ValidationError):
            before = field.to_python(before)
    return before, form.cleaned_data.get(name)


def _shown(value: object) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, Decimal):
        return trimmed(value)
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="minutes")
    return str(value)
