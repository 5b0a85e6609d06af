"""How many statements something takes, whenever it is asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

from django.db import connections
from django.test.utils import CaptureQueriesContext

from ai_budget.conf import conf
from ai_budget.pricing import rates


def statements(work: Callable[[], object]) -> list[str]:
    """Do ``work`` twice, and return the SQL of the second time.

    What a process reads once is read by then, and prices, which it reads again every few seconds,
    are left as they are.
    """
    with mock.patch.object(rates, "_RELOAD_SECONDS", math.inf):
        work()
        with CaptureQueriesContext(connections[conf.LEDGER_DATABASE]) as captured:
            work()
    return [query["sql"] for query in captured]
