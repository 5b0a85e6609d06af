"""Prices that a team sets itself."""

from __future__ import annotations

from django.contrib import admin
from django.utils.translation import gettext_lazy as _

from ai_budget.admin.amounts import UsdInput, price
from ai_budget.admin.history import ValuesInHistory
from ai_budget.models import ModelRate
from ai_budget.models.fields import UsdField


@admin.register(ModelRate)
class ModelRateAdmin(ValuesInHistory):
    """Dated prices. Saving as new begins the next one from the last."""

    formfield_overrides = {UsdField: {"widget": UsdInput}}
    list_display = (
        "model",
        "provider",
        "region",
        "speed",
        "prompt_tokens_above",
        "valid_from",
        "valid_until",
        "input_price",
        "output_price",
    )
    list_filter = ("provider", "speed")
    save_as = True
    search_fields = ("model", "note")
    show_facets = admin.ShowFacets.NEVER

    @admin.display(description=_("input ($/M)"), ordering="input_usd")
    def input_price(self, rate: ModelRate) -> str:
        return price(rate.input_usd)

    @admin.display(description=_("output ($/M)"), ordering="output_usd")
    def output_price(self, rate: ModelRate) -> str:
        return price(rate.output_usd)
