"""What processes that tests start have imported before they are forked off."""

from __future__ import annotations

import os

import django

os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
django.setup()

import anthropic  # noqa: E402, F401
import genai_prices  # noqa: E402, F401

import ai_budget.testing  # noqa: E402, F401
import tests.contention.work  # noqa: E402
import tests.factories  # noqa: E402, F401
