"""The example site inside the suite's own settings, with its accounts and a local API."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.test import Client
from pytest_django import Settings

from ai_budget.testing.simulator import AnthropicSimulator
from example_project import settings as example
from example_project.desk import stand_in
from example_project.desk.seed.budgets import create_budgets
from example_project.desk.seed.people import Person
from tests.example.processes import PATIENCE, demo

HAS_CSP = hasattr(example, "SECURE_CSP")


@pytest.fixture
def api() -> Iterator[AnthropicSimulator]:
    """The local API, which answers as in the demo, without the pauses."""

    def reply(body: Any) -> Any:
        return stand_in.reply(body, chunk_delay=0)

    with AnthropicSimulator(default=reply) as running:
        yield running


@pytest.fixture(autouse=True)
def site(settings: Settings, api: AnthropicSimulator) -> None:
    """Use what the example's settings say, on whatever database the suite runs on."""
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "example_project.desk"]
    settings.AI_BUDGET = {**example.AI_BUDGET, "API_KEY": "test", "BASE_URL": api.base_url}
    for name in (
        "ROOT_URLCONF",
        "MIDDLEWARE",
        "TEMPLATES",
        "LOGIN_URL",
        "LOGIN_REDIRECT_URL",
        "LOGOUT_REDIRECT_URL",
        "SECURE_CSP",
    ):
        if hasattr(example, name):
            setattr(settings, name, getattr(example, name))


@pytest.fixture
def ada(db: None) -> Any:
    """A reader."""
    return get_user_model().objects.create_user("ada", password="ada", first_name="Ada")


@pytest.fixture
def grace(db: None) -> Any:
    """Another reader."""
    return get_user_model().objects.create_user("grace", password="grace", first_name="Grace")


@pytest.fixture
def budgets(grace: Any) -> None:
    """The budgets of the demo, and its quotas: grace has the larger one."""
    create_budgets([Person(user_id=grace.pk, plan="team", weight=1.0)])


@pytest.fixture
def reader(client: Client, ada: Any, budgets: None) -> Client:
    """A browser in which ada has signed in."""
    client.force_login(ada)
    return client


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("example") / "db.sqlite3"


@pytest.fixture(scope="session")
def first_demo(database: Path) -> str:
    """What the first demo on a fresh machine prints, until Ctrl-C."""
    with demo(database) as (process, output):
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        assert "Traceback" not in rest
    return output
