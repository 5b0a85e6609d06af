"""What the documentation names is there, and what is there is named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from django.core.management import find_commands

import ai_budget
from ai_budget import testing
from ai_budget.conf import DEFAULTS
from ai_budget.exceptions import AIBudgetError

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SETTING = re.compile(r"`([A-Z][A-Z_]{2,})`")
NOT_SETTINGS = {
    "AI_BUDGET",
    "ANTHROPIC_API_KEY",  # of the environment
    "ATOMIC_REQUESTS",  # Django's, of a database
    "KEY_PREFIX",  # Django's, of a cache
    "MAX_ENTRIES",  # likewise
    "SECRET_KEY",  # Django's
    "REMOTE_ADDR",  # a request's
    "FLUSHALL",  # a command of Redis
    "SSL_CERT_DIR",  # of the environment
    "PYTHONDONTWRITEBYTECODE",  # likewise
    "AI_BUDGET_TEST_WORKERS",  # of the test runner
    "STORE_TESTS",  # a list in the tests
    "REDIS_LEDGER_TESTS",  # likewise
    "SHARED",  # likewise
}


def _text(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def test_every_setting_is_documented() -> None:
    page = _text("docs", "settings.md")

    assert [key for key in DEFAULTS if f"`{key}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_is_named_exists(page: Path) -> None:
    named = set(SETTING.findall(page.read_text(encoding="utf-8")))

    assert named - set(DEFAULTS) - NOT_SETTINGS == set()


def test_every_command_is_documented() -> None:
    commands = find_commands(str(Path(ai_budget.__path__[0], "management")))

    for page in (_text("README.md"), _text("docs", "commands.md")):
        assert [command for command in commands if command not in page] == []


def test_every_error_is_documented() -> None:
    errors = {
        name
        for name in ai_budget.__all__
        if isinstance(getattr(ai_budget, name), type)
        and issubclass(getattr(ai_budget, name), AIBudgetError)
    }
    errors -= {"UnclassifiedUsage"}  # raised by `price` alone
    page = _text("docs", "limits.md")

    assert {name for name in errors if f"{name}" not in page} == set()


def test_every_test_helper_is_documented() -> None:
    page = _text("docs", "testing.md")

    assert [name for name in testing.__all__ if name not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_is_python(page: Path) -> None:
    for code in CODE.findall(page.read_text(encoding="utf-8")):
        ast.parse(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_project_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"\]\(((?!https?:)[^)#]+)", text)
    documents = re.findall(r"\{doc\}`([^`]+)`", text)

    missing = [name for name in files if not (page.parent / name).exists()]
    missing += [name for name in documents if not (page.parent / f"{name}.md").exists()]

    assert missing == []


def test_the_changelog_speaks_of_this_version() -> None:
    assert f"## {ai_budget.__version__} " in _text("CHANGELOG.md")
