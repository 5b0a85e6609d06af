"""A site's Celery app for a worker process: ``celery -A tests.batches.celery_app worker``.

Whoever starts it says in the environment which queue it serves, and gives AI_BUDGET as JSON.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

from django.conf import settings

from tests.batches.brokers import Broker

settings.AI_BUDGET = json.loads(os.environ["AI_BUDGET_TEST_SETTINGS"])

app = Broker(
    url=os.environ["AI_BUDGET_TEST_BROKER"], queue=os.environ["AI_BUDGET_TEST_QUEUE"]
).app()
app.set_default()
