"""The gate that every request to Claude goes through.

``ai_budget.guard(client)`` is a public verb and this package has its name, so the package
itself can be called: whichever module was imported first, ``ai_budget.guard`` stays one thing.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Guard(ModuleType):
    def __call__(self, client: Any, /, **charge: Any) -> Any:
        from ai_budget.guard.clients import guard

        return guard(client, **charge)


sys.modules[__name__].__class__ = _Guard
