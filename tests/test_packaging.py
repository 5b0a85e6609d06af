"""What is installed is what was promised: metadata, types, a cheap import, any supported Django."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata, resources
from itertools import chain

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ai_budget
from tests.run import ROOT

DISTRIBUTION = "django-ai-budget"
EXTRAS = {"celery", "prometheus", "otel"}


def requirements(distribution: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """Everything ``distribution`` requires here and now, when installed with ``extras``."""
    for text in metadata.requires(distribution) or []:
        requirement = Requirement(text)
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}
        ):
            yield requirement


def whole_tree(distribution: str, extras: frozenset[str]) -> Iterator[tuple[str, Requirement]]:
    """(who asks, what for) of all that installing ``distribution`` brings along."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(distribution, extras)]
    while todo:
        asking = todo.pop()
        if asking in seen:
            continue
        seen.add(asking)
        for requirement in requirements(*asking):
            yield asking[0], requirement
            todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))


def pins(name: str) -> dict[str, str]:
    """What one of CI's files of constraints pins, by canonical name."""
    lines = (ROOT / ".ci" / name).read_text().splitlines()
    return {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version.removesuffix(".*")
        for pin in (Requirement(line) for line in lines if not line.startswith("#"))
    }


def test_the_lock_of_the_development_environment_has_all_that_is_asked_for() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    wanted = [
        *project["project"]["dependencies"],
        *chain.from_iterable(project["project"]["optional-dependencies"].values()),
        *project["dependency-groups"]["dev"],
    ]
    locked = pins("newest.txt")

    for requirement in map(Requirement, wanted):
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, requirement.name
        assert requirement.specifier.contains(version), requirement


def test_the_version_is_the_packages_own() -> None:
    assert metadata.version(DISTRIBUTION) == ai_budget.__version__


def test_the_types_are_shipped() -> None:
    assert resources.files("ai_budget").joinpath("py.typed").is_file()


def test_only_the_package_is_installed() -> None:
    files = metadata.files(DISTRIBUTION)
    assert files

    installed = {file.parts[0] for file in files if not file.name.endswith(".pth")}

    assert {top for top in installed if not top.endswith(".dist-info")} <= {"ai_budget"}


def test_the_extras_are_the_documented_ones() -> None:
    assert set(metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []) == EXTRAS


@pytest.mark.parametrize("release", ["5.2", "5.2.99", "6.0", "6.0.99", "6.1", "6.1.99"])
def test_no_dependency_rules_out_a_supported_django(release: str) -> None:
    against = [
        f"{asking} requires {requirement}"
        for asking, requirement in whole_tree(DISTRIBUTION, frozenset(EXTRAS))
        if canonicalize_name(requirement.name) == "django"
        and not requirement.specifier.contains(release)
    ]

    assert against == []


def test_importing_the_package_is_cheap_and_needs_no_configured_django() -> None:
    program = "; ".join(
        [
            "import sys, ai_budget",
            "heavy = {'anthropic', 'genai_prices', 'django.db.models'} & set(sys.modules)",
            "from django.conf import settings",
            "assert not settings.configured",
            "assert not heavy, heavy",
            "assert set(ai_budget.__all__) <= set(dir(ai_budget))",
        ]
    )

    finished = subprocess.run(
        [sys.executable, "-c", program],
        env={},
        capture_output=True,
        text=True,
        check=False,
    )

    assert finished.stderr == ""
    assert finished.returncode == 0


def test_each_requirement_has_a_lower_end_that_is_run() -> None:
    """The older leg of CI installs what ``oldest.txt`` pins, so these are no guesses."""
    pinned = pins("oldest.txt")
    ours = list(requirements(DISTRIBUTION, frozenset(EXTRAS)))

    ends = {
        canonicalize_name(requirement.name): specifier.version
        for requirement in ours
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }

    assert {canonicalize_name(requirement.name) for requirement in ours} == ends.keys()
    assert {name: Version(end) for name, end in ends.items()} == {
        name: Version(pin) for name, pin in pinned.items()
    }
