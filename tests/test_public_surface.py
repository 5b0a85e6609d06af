"""What ``import ai_budget`` gives, what it costs, and when."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import ai_budget
from ai_budget import exceptions
from tests.depth import some_of

ROOT = Path(ai_budget.__path__[0]).parent
SETTINGS = "tests.settings"


def run(code: str, **environment: str) -> str:
    """Run code in a process of its own, where nothing is imported yet."""
    variables = {
        name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"
    }
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**variables, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_public_name_is_there() -> None:
    for name in ai_budget.__all__:
        assert getattr(ai_budget, name) is not None


def test_the_table_of_names_agrees_with_what_is_public() -> None:
    assert ai_budget.__all__ == sorted(ai_budget.__all__)
    assert set(ai_budget.__all__) == set(ai_budget._HOMES)
    assert set(ai_budget.__all__) <= set(dir(ai_budget))


def test_every_exception_is_public() -> None:
    own = {
        name
        for name, value in vars(exceptions).items()
        if inspect.isclass(value) and issubclass(value, exceptions.AIBudgetError)
    }
    assert own <= set(ai_budget.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ai_budget' has no attribute 'aks'"):
        ai_budget.aks  # noqa: B018


@pytest.mark.parametrize("sync", ["ask", "stream", "client"])
def test_async_twins_take_the_same_arguments(sync: str) -> None:
    twin = {"ask": "aask", "stream": "astream", "client": "async_client"}[sync]

    one = inspect.signature(getattr(ai_budget, sync))
    other = inspect.signature(getattr(ai_budget, twin))

    assert one.parameters == other.parameters


def test_all_but_the_prompt_is_said_by_name() -> None:
    for verb in (ai_budget.ask, ai_budget.stream, ai_budget.estimate):
        first, *others = inspect.signature(verb).parameters.values()
        assert first.name == "prompt"
        assert all(other.kind in (other.KEYWORD_ONLY, other.VAR_KEYWORD) for other in others)


@pytest.mark.parametrize(
    "first",
    some_of(
        [
            "import ai_budget; ai_budget.ask",
            "import ai_budget.guard.clients",
            "from ai_budget.guard.charge import charge",
        ]
    ),
)
def test_guard_is_a_verb_whatever_was_imported_first(first: str) -> None:
    said = run(
        f"import django; django.setup(); {first}\n"
        "import anthropic, ai_budget\n"
        "client = ai_budget.guard(anthropic.Anthropic(api_key='key'), feature='a')\n"
        "from ai_budget.guard.middleware import BudgetGuard\n"
        "from ai_budget.guard import charge\n"
        "print(type(client.middleware[-1]) is BudgetGuard, charge.__name__)",
        DJANGO_SETTINGS_MODULE=SETTINGS,
    )
    assert said == "True ai_budget.guard.charge"


def test_it_is_imported_before_django_is_configured() -> None:
    said = run(
        "import ai_budget, sys\n"
        "from ai_budget import BudgetExceeded, Usage, charge\n"
        "print('anthropic' in sys.modules, 'genai_prices' in sys.modules)\n"
        "with charge(feature='a', user=None): pass\n"
        "from django.conf import settings; print(settings.configured)"
    )
    assert said == "False False\nFalse"


def test_the_import_itself_brings_nothing_of_others_along() -> None:
    said = run(
        "import sys; before = set(sys.modules); import ai_budget\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(new - sys.stdlib_module_names)"
    )
    assert said == "{'ai_budget'}"


def test_django_starts_without_the_client_and_the_prices() -> None:
    said = run(
        "import django, sys; django.setup()\n"
        "import ai_budget\n"
        "for name in ai_budget.__all__: getattr(ai_budget, name)\n"
        "import ai_budget.middleware\n"
        "from django.core.management import call_command\n"
        "call_command('check')\n"
        "print([name for name in ('anthropic', 'httpx2', 'genai_prices') if name in sys.modules])",
        DJANGO_SETTINGS_MODULE=SETTINGS,
    )
    assert said.splitlines()[-1] == "[]"


def test_the_public_names_are_where_they_say() -> None:
    for name, home in ai_budget._HOMES.items():
        module = import_module(f"ai_budget.{home}")
        value = getattr(ai_budget, name)
        assert value is (module if home == name else getattr(module, name))


def test_the_package_is_typed() -> None:
    assert Path(ai_budget.__path__[0], "py.typed").exists()
