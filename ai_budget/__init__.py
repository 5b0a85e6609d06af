"""Keep an AI feature from spending more than it was given, and show where every dollar went.

Importing this package is cheap and works before Django is configured: each public name is
loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ai_budget import conversation
    from ai_budget.batches import submit_batch
    from ai_budget.decorators import limited
    from ai_budget.exceptions import (
        AIBudgetError,
        BudgetExceeded,
        CallInsideTransaction,
        FeatureDisabled,
        InvalidArgument,
        LedgerUnavailable,
        LimitReached,
        QuotaExceeded,
        RateLimited,
        UnboundedCall,
        UnclassifiedUsage,
        UnpricedEndpoint,
        UnpricedModel,
    )
    from ai_budget.guard.charge import charge
    from ai_budget.guard.clients import async_client, client, guard
    from ai_budget.many import aask_many, ask_many
    from ai_budget.pricing.cost import price
    from ai_budget.pricing.monthly import estimate_monthly
    from ai_budget.service import aask, ask, astream, estimate, forget_answers, stream, usage
    from ai_budget.values import Answer, Usage

__version__ = "0.1.0"

_HOMES = {
    "AIBudgetError": "exceptions",
    "Answer": "values",
    "BudgetExceeded": "exceptions",
    "CallInsideTransaction": "exceptions",
    "FeatureDisabled": "exceptions",
    "InvalidArgument": "exceptions",
    "LedgerUnavailable": "exceptions",
    "LimitReached": "exceptions",
    "QuotaExceeded": "exceptions",
    "RateLimited": "exceptions",
    "UnboundedCall": "exceptions",
    "UnclassifiedUsage": "exceptions",
    "UnpricedEndpoint": "exceptions",
    "UnpricedModel": "exceptions",
    "Usage": "values",
    "aask": "service",
    "aask_many": "many",
    "ask": "service",
    "ask_many": "many",
    "astream": "service",
    "async_client": "guard.clients",
    "charge": "guard.charge",
    "client": "guard.clients",
    "conversation": "conversation",  # a room of its own: trim, fit
    "estimate": "service",
    "estimate_monthly": "pricing.monthly",
    "forget_answers": "service",
    "guard": "guard",  # the package itself, which can be called
    "limited": "decorators",
    "price": "pricing.cost",
    "stream": "service",
    "submit_batch": "batches",
    "usage": "service",
}

__all__ = [
    "AIBudgetError",
    "Answer",
    "BudgetExceeded",
    "CallInsideTransaction",
    "FeatureDisabled",
    "InvalidArgument",
    "LedgerUnavailable",
    "LimitReached",
    "QuotaExceeded",
    "RateLimited",
    "UnboundedCall",
    "UnclassifiedUsage",
    "UnpricedEndpoint",
    "UnpricedModel",
    "Usage",
    "aask",
    "aask_many",
    "ask",
    "ask_many",
    "astream",
    "async_client",
    "charge",
    "client",
    "conversation",
    "estimate",
    "estimate_monthly",
    "forget_answers",
    "guard",
    "limited",
    "price",
    "stream",
    "submit_batch",
    "usage",
]


def __getattr__(name: str) -> Any:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    module = import_module(f"{__name__}.{home}")
    value = globals()[name] = module if home == name else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
