"""Conversations that cost less to continue: old turns summarised once, the best chunks that fit."""

from __future__ import annotations

from ai_budget.conversation.context import Fitted, fit, text_tokens
from ai_budget.conversation.history import atrim, trim
from ai_budget.conversation.turns import Trimmed

__all__ = ["Fitted", "Trimmed", "atrim", "fit", "text_tokens", "trim"]
