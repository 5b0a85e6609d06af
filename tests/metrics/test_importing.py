"""The libraries of monitoring are not loaded before somebody uses them."""

from __future__ import annotations

from tests.test_public_surface import SETTINGS, run

LOADED = (
    "print(sorted(name for name in sys.modules"
    " if name.split('.')[0] in ('prometheus_client', 'opentelemetry')))"
)


def test_a_site_that_has_started_has_loaded_none_of_them() -> None:
    code = f"import django, sys; django.setup(); import ai_budget; {LOADED}"

    assert run(code, DJANGO_SETTINGS_MODULE=SETTINGS) == "[]"


def test_a_site_works_without_them() -> None:
    code = (
        "import sys\n"
        "sys.modules['prometheus_client'] = sys.modules['opentelemetry'] = None\n"
        "import django; django.setup()\n"
        "import ai_budget.metrics.log, ai_budget.metrics.names\n"
        "from ai_budget.metrics import otel\n"
        "print(otel.instruments_in_use())"
    )

    assert run(code, DJANGO_SETTINGS_MODULE=SETTINGS) == "None"


def test_telling_opentelemetry_needs_nothing_of_prometheus() -> None:
    code = (
        "import django, sys; django.setup()\n"
        "from ai_budget.metrics import otel\n"
        "assert otel.instruments_in_use()\n"
        "print('prometheus_client' in sys.modules)"
    )

    assert run(code, DJANGO_SETTINGS_MODULE=SETTINGS) == "False"
