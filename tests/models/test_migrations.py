"""The tables follow from the migrations alone, whatever a site's settings are."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from django.apps import apps
from django.core.management import call_command
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.loader import MigrationLoader

APP = apps.get_app_config("ai_budget")


def tables() -> set[str]:
    return {
        name for name in connection.introspection.table_names() if name.startswith("ai_budget_")
    }


@pytest.fixture
def migrated_again(transactional_db: None) -> Iterator[None]:
    """Whatever a test does, the tables are there for the next."""
    yield
    call_command("migrate", "ai_budget", verbosity=0)


@pytest.mark.django_db
def test_no_migration_is_missing() -> None:
    call_command("makemigrations", "ai_budget", check_changes=True, dry_run=True, verbosity=0)


@pytest.mark.usefixtures("migrated_again")
def test_all_of_it_can_be_undone_and_done_again() -> None:
    there = tables()

    call_command("migrate", "ai_budget", "zero", verbosity=0)
    undone = tables()
    call_command("migrate", "ai_budget", verbosity=0)

    assert len(there) == len(list(APP.get_models()))
    assert (undone, tables()) == (set(), there)


@pytest.mark.django_db
def test_nothing_is_left_to_migrate() -> None:
    executor = MigrationExecutor(connection)

    targets = [key for key in executor.loader.graph.leaf_nodes() if key[0] == "ai_budget"]

    assert executor.migration_plan(targets) == []


def test_a_migration_is_named_by_hand() -> None:
    names = [name for app, name in MigrationLoader(None).disk_migrations if app == "ai_budget"]

    assert names
    assert not [name for name in names if not re.fullmatch(r"\d{4}_(?!auto)\w+", name)]


def test_keys_do_not_follow_the_projects_default() -> None:
    keys = {model.__name__: model._meta.pk.get_internal_type() for model in APP.get_models()}

    assert (keys.pop("SpendWindow"), keys.pop("RateBucket")) == ("CharField", "CharField")
    assert keys.pop("CallText") == "UUIDField"
    assert set(keys.values()) == {"BigAutoField"}
