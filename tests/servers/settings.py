"""The suite's settings for a server process: its database, and the local API of the test."""

from __future__ import annotations

import os

from tests.settings import *  # noqa: F403

ROOT_URLCONF = "tests.servers.site"
AI_BUDGET = {"API_KEY": "key", "BASE_URL": os.environ.get("AI_BUDGET_TEST_API")}
