"""The dashboard parses, and asks for nothing that is not there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.metrics.scrapes import described

DASHBOARD = json.loads(
    (Path(__file__).resolve().parents[2] / "docs" / "grafana.json").read_text(encoding="utf-8")
)
PANELS: list[Any] = [it for it in DASHBOARD["panels"] if it["type"] != "row"]
VARIABLES = {it["name"]: it for it in DASHBOARD["templating"]["list"]}
METRIC = re.compile(r"\bai_budget_\w+")
SELECTED = re.compile(r"\b(ai_budget_\w+)\{([^}]*)\}")
BY = re.compile(r"\bby \(([^)]*)\)")
OF_GRAFANA = {"__rate_interval", "__all"}


def targets() -> Iterator[tuple[str, str, str]]:
    """Each query with its panel's title and the text of its legend."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]


def label_values() -> list[tuple[str, str]]:
    """What the choices of the variables are: a metric, and one of its labels."""
    queries = [it["query"]["query"] for it in VARIABLES.values() if it["type"] == "query"]
    return [
        match.groups()  # type: ignore[misc]
        for query in queries
        if (match := re.fullmatch(r"label_values\((\w+), (\w+)\)", query))
    ]


QUERIES = list(targets())
IDS = [f"{title}: {expr[:40]}" for title, expr, _ in QUERIES]


@pytest.mark.parametrize(("title", "expr", "legend"), QUERIES, ids=IDS)
def test_every_query_asks_for_metrics_and_labels_that_exist(
    title: str, expr: str, legend: str
) -> None:
    known = described()
    named = set(METRIC.findall(expr))
    assert named, title
    assert named <= set(known)
    for name, selector in SELECTED.findall(expr):
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= set(known[name])
    grouped = {label.strip() for inside in BY.findall(expr) for label in inside.split(",")}
    for name in named - {name for name in named if not known[name]}:
        assert grouped <= set(known[name]) or not grouped
    shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
    assert shown <= grouped


@pytest.mark.parametrize(("title", "expr", "legend"), QUERIES, ids=IDS)
def test_every_query_is_well_formed(title: str, expr: str, legend: str) -> None:
    for opening, closing in ("()", "{}", "[]"):
        depth = 0
        for character in expr:
            depth += (character == opening) - (character == closing)
            assert depth >= 0
        assert depth == 0
    variables = set(re.findall(r"\$(\w+)", expr))
    assert variables <= set(VARIABLES) | OF_GRAFANA
    assert "rate(" not in expr or "_total" in expr


@pytest.mark.parametrize(("title", "expr", "legend"), QUERIES, ids=IDS)
def test_no_query_counts_twice_what_two_processes_tell(title: str, expr: str, legend: str) -> None:
    """Whichever process is scraped tells of all of them."""
    for match in METRIC.finditer(expr):
        before = expr[: match.start()]
        innermost = re.findall(
            r"\b(max|sum|avg|min|count)\b(?: by \([^)]*\))? \(|\b(max|sum)\(", before
        )
        assert innermost, title
        assert "".join(innermost[-1]) == "max", title


def test_a_counter_is_asked_for_its_rate_and_a_gauge_is_not() -> None:
    for _, expr, _ in QUERIES:
        for name in METRIC.findall(expr):
            rated = re.search(rf"(?:rate|increase)\({name}\b", expr)
            assert bool(rated) is name.endswith("_total"), expr


def test_the_variables_are_filled_by_what_exists() -> None:
    known = described()

    assert len(label_values()) == 2
    for name, label in label_values():
        assert label in known[name]


def test_every_metric_is_on_it() -> None:
    used = {name for _, expr, _ in QUERIES for name in METRIC.findall(expr)}

    assert used == set(described())


def test_panels_have_ids_places_and_a_data_source_to_choose() -> None:
    everything: list[Any] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert taken.isdisjoint(cells)
        taken |= cells
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}
    assert VARIABLES["datasource"]["query"] == "prometheus"


def test_it_can_be_imported_anywhere() -> None:
    assert "id" not in DASHBOARD  # of one Grafana's own
    assert DASHBOARD["title"]
    assert DASHBOARD["schemaVersion"] >= 36
