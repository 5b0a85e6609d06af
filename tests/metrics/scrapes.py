"""What Prometheus is told, as it would read it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from ai_budget.metrics.prometheus import BudgetCollector

Labels = frozenset[tuple[str, str]]


class Scrape:
    """One scrape, through the text that is sent."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        registry.register(BudgetCollector())
        self.text = generate_latest(registry).decode()
        self.families: list[Metric] = list(text_string_to_metric_families(self.text))
        self._values: dict[tuple[str, Labels], float] = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        """Return one value; None where there is none."""
        return self._values.get((name, frozenset(labels.items())))

    def values(self, name: str) -> dict[Labels, float]:
        return {labels: value for (own, labels), value in self._values.items() if own == name}

    def counters(self) -> dict[tuple[str, Labels], float]:
        return {key: value for key, value in self._values.items() if key[0].endswith("_total")}


def described() -> dict[str, tuple[str, ...]]:
    """Return the labels of every metric, by the name that a query has to use."""
    return {
        family.name + ("_total" if family.type == "counter" else ""): tuple(
            family._labelnames  # type: ignore[attr-defined]
        )
        for family in BudgetCollector().describe()
    }
