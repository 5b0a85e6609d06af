"""What Prometheus reads of the example site, and who else may."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from prometheus_client.parser import text_string_to_metric_families
from pytest_django import Settings

from tests.factories import CallLogFactory

pytestmark = pytest.mark.django_db

TOKEN = "a token of this test"


@pytest.fixture
def token(settings: Settings) -> str:
    settings.METRICS_TOKEN = TOKEN
    return TOKEN


@pytest.fixture(autouse=True)
def no_token(settings: Settings) -> None:
    settings.METRICS_TOKEN = ""


def read(client: Client, authorization: str = "") -> Any:
    headers = {"Authorization": authorization} if authorization else {}
    return client.get("/metrics/", headers=headers)


def test_it_is_where_the_documentation_says() -> None:
    assert reverse("metrics", urlconf="example_project.urls") == "/metrics/"


def test_prometheus_reads_it_with_the_token(client: Client, no_token: None, token: str) -> None:
    CallLogFactory(cost_nanousd=1_500_000_000)

    answer = read(client, f"Bearer {token}")

    assert answer.status_code == 200
    families = {it.name: it for it in text_string_to_metric_families(answer.text)}
    (sample,) = families["ai_budget_cost_usd"].samples
    assert (sample.labels["feature"], sample.value) == ("chat", 1.5)
    assert "no-store" in answer.headers["Cache-Control"]


def test_so_does_staff_who_have_signed_in(client: Client, ada: Any) -> None:
    ada.is_staff = True
    ada.save()
    client.force_login(ada)

    assert read(client).status_code == 200


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer töken"]
)
def test_nobody_else_does(client: Client, no_token: None, token: str, authorization: str) -> None:
    answer = read(client, authorization)

    assert (answer.status_code, answer.content) == (401, b"")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer "])
def test_an_empty_token_lets_nobody_in(client: Client, authorization: str) -> None:
    assert read(client, authorization).status_code == 401


def test_a_reader_does_not(client: Client, ada: Any) -> None:
    client.force_login(ada)

    assert read(client).status_code == 401


def test_staff_who_have_left_do_not(client: Client, ada: Any) -> None:
    ada.is_staff = True
    ada.save()
    client.force_login(ada)
    ada.is_active = False
    ada.save()

    assert read(client).status_code == 401


def test_nothing_can_be_sent_there(client: Client, no_token: None, token: str) -> None:
    answer = client.post("/metrics/", headers={"Authorization": f"Bearer {token}"})

    assert answer.status_code == 405
