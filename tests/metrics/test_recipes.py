"""The examples of the documentation do what it says they do."""

from __future__ import annotations

import json
import logging
import logging.config
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from django.test import RequestFactory
from opentelemetry.sdk.metrics.view import View

import ai_budget
from ai_budget.metrics import names
from ai_budget.signals import call_refused, call_settled
from ai_budget.testing import AnthropicSimulator, override_budget
from tests.guard.books import MODEL, only_row
from tests.metrics.conftest import Lines
from tests.metrics.scrapes import described

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
TEXT = DOCS.read_text(encoding="utf-8")
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def example(marker: str) -> str:
    """Return the one example that has these words in it."""
    (code,) = (code for code in CODE.findall(TEXT) if marker in code)
    return str(code)


def run(marker: str) -> dict[str, Any]:
    defined: dict[str, Any] = {"__name__": "shop.example"}
    exec(compile(example(marker), str(DOCS), "exec"), defined)  # noqa: S102
    return defined


class StandIn(ModuleType):
    """A library that is not installed here: it remembers what it was told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.told: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def teller(self, name: str) -> Callable[..., None]:
        def tell(*args: Any, **kwargs: Any) -> None:
            self.told.append((name, args, kwargs))

        return tell

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for told, args, kwargs in self.told if told == name]


@pytest.fixture
def sentry(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    module: Any = StandIn("sentry_sdk")
    module.init = module.teller("init")
    module.metrics = ModuleType("sentry_sdk.metrics")
    module.metrics.distribution = module.teller("distribution")
    monkeypatch.setitem(sys.modules, "sentry_sdk", module)
    yield module
    call_settled.disconnect(dispatch_uid="shop.sentry")


@pytest.fixture
def datadog(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    module: Any = StandIn("datadog")
    module.initialize = module.teller("initialize")
    module.statsd = ModuleType("datadog.statsd")
    module.statsd.increment = module.teller("increment")
    module.statsd.distribution = module.teller("distribution")
    monkeypatch.setitem(sys.modules, "datadog", module)
    yield module
    call_settled.disconnect(dispatch_uid="shop.datadog")
    call_refused.disconnect(dispatch_uid="shop.datadog")


def dollars() -> float:
    return (only_row().cost_nanousd or 0) / 1e9


# The log -----------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_the_formatter_writes_every_field_as_json(api: AnthropicSimulator, lines: Lines) -> None:
    formatter = run("class JsonLines")["JsonLines"]()
    ai_budget.ask("Hello", feature="chat", model=MODEL)

    (record,) = lines.records
    written = json.loads(formatter.format(record))
    assert written["message"] == record.getMessage()
    assert {name: written[f"ai_budget_{name}"] for name in lines.only} == lines.only


def test_the_settings_send_the_lines_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("shop.logs")
    module.JsonLines = run("class JsonLines")["JsonLines"]
    shop: Any = ModuleType("shop")
    shop.logs = module
    monkeypatch.setitem(sys.modules, "shop", shop)
    monkeypatch.setitem(sys.modules, "shop.logs", module)
    log = logging.getLogger("ai_budget.calls")
    before = log.handlers[:], log.level, log.propagate
    try:
        logging.config.dictConfig(run("LOGGING = {")["LOGGING"])
        (handler,) = log.handlers
        assert isinstance(handler.formatter, module.JsonLines)
        assert log.isEnabledFor(logging.INFO)
    finally:
        log.handlers[:], log.level, log.propagate = before
        log.manager._clear_cache()  # type: ignore[attr-defined]


# Prometheus --------------------------------------------------------------------------------------


@pytest.mark.django_db
@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_the_view_answers_in_the_format_that_is_asked_for(accept: str) -> None:
    view = run("def metrics(request)")["metrics"]

    answer = view(RequestFactory().get("/metrics/", headers={"Accept": accept}))

    assert "# TYPE ai_budget_totals_behind gauge" in answer.content.decode()
    assert ("openmetrics" in answer.headers["Content-Type"]) is bool(accept)


def test_what_the_configurations_name_exists() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    named = {name for block in blocks for name in re.findall(r"\bai_budget_\w{3,}", block)}

    assert len(blocks) == 3
    assert named
    assert named <= set(described())


# OpenTelemetry -----------------------------------------------------------------------------------


def test_the_view_drops_what_it_is_said_to_drop() -> None:
    kept: list[Any] = []
    made: dict[str, Any] = {}
    code = example("DropAggregation()").replace("MeterProvider(\n", "made = MeterProvider(\n")
    exec(compile(code, str(DOCS), "exec"), made)  # noqa: S102
    try:
        kept = made["made"]._sdk_config.views
    finally:
        made["made"].shutdown()

    (view,) = kept
    assert isinstance(view, View)


def test_the_providers_are_set_by_their_own_names() -> None:
    code = example("set_meter_provider")
    compile(code, str(DOCS), "exec")
    imports = "\n".join(line for line in code.splitlines() if line.startswith("from"))
    given: dict[str, Any] = {}
    exec(compile(imports, str(DOCS), "exec"), given)  # noqa: S102

    assert callable(given["trace"].set_tracer_provider)
    assert callable(given["metrics"].set_meter_provider)


def test_every_attribute_and_metric_of_ours_is_documented() -> None:
    section = TEXT.split("## OpenTelemetry")[1].split("## Sentry")[0]
    ours = {
        value
        for name, value in vars(names).items()
        if name.isupper() and isinstance(value, str) and "." in value
    }

    assert {name for name in ours if f"`{name}`" not in section} == set()


# Sentry ------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_sentry_hears_what_a_call_cost(api: AnthropicSimulator, sentry: StandIn) -> None:
    example_of = run("import sentry_sdk")
    ai_budget.ask("Hello", feature="chat", model=MODEL)

    assert example_of["measure"]
    ((args, kwargs),) = sentry.of("distribution")
    assert args == ("ai_budget.cost_usd", dollars())
    assert kwargs == {"attributes": {"feature": "chat", "model": MODEL, "status": "settled"}}


@pytest.mark.django_db
def test_sentry_takes_a_refusal_for_no_mistake(api: AnthropicSimulator, sentry: StandIn) -> None:
    run("import sentry_sdk")
    ((_, options),) = sentry.of("init")
    before_send, event = options["before_send"], {"level": "error"}

    with (
        override_budget("chat", daily_limit_usd=0),
        pytest.raises(ai_budget.BudgetExceeded) as error,
    ):
        ai_budget.ask("Hello", feature="chat")

    assert before_send(event, {"exc_info": (error.type, error.value, error.tb)}) is None
    assert before_send(event, {"exc_info": (KeyError, KeyError("x"), None)}) is event
    assert before_send(event, {}) is event


# Datadog -----------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_datadog_hears_calls_and_refusals(api: AnthropicSimulator, datadog: StandIn) -> None:
    example_of = run("from datadog import")
    ai_budget.ask("Hello", feature="chat", model=MODEL)
    with override_budget("chat", daily_limit_usd=0), pytest.raises(ai_budget.BudgetExceeded):
        ai_budget.ask("Hello", feature="chat")

    assert example_of["count"]
    tags = ["feature:chat", f"model:{MODEL}", "call_status:settled"]
    assert datadog.of("distribution") == [(("ai_budget.cost_usd", dollars()), {"tags": tags})]
    assert datadog.of("increment") == [
        (("ai_budget.calls",), {"tags": tags}),
        (("ai_budget.refusals",), {"tags": ["feature:chat", "reason:BudgetExceeded"]}),
    ]
