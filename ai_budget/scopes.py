"""The names that scopes of budgets are told by; apart, because tables need nothing more."""

from __future__ import annotations

SITE = "*"
"""The name of the budget that spans every feature."""

OF_CALLERS = ("user:", "subject:")
"""How the scopes of quotas begin: of one user or subject, in all features or in one."""
