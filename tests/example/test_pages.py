"""The pages of the example site, over a real HTTP connection to the local API."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.test import Client
from pytest_django import Settings

import ai_budget
from ai_budget import money
from ai_budget.models import CallLog, DowngradeRung, FeatureBudget, SpendWindow, UserQuota
from ai_budget.testing.simulator import AnthropicSimulator
from ai_budget.testing.steps import Fail
from example_project.desk.forms import TINY_QUESTIONS
from example_project.desk.templatetags.desk import usd
from example_project.desk.usage import allowance
from tests.example.conftest import HAS_CSP
from tests.example.pages import violations

pytestmark = pytest.mark.django_db

TEXT = {"text": "The lamp burns. Oil is dear.\n\nThe keeper writes.", "length": "sentence"}
QUESTION = {"question": "Why is the sky dark at night?"}
TINY_FORM = {"question": TINY_QUESTIONS[0]}


def test_a_reader_signs_in_and_out(client: Client, ada: Any) -> None:
    welcome = client.post("/sign-in/", {"username": "ada", "password": "ada"}, follow=True)
    assert "Good to see you, Ada." in welcome.text

    goodbye = client.post("/sign-out/", follow=True)
    assert goodbye.redirect_chain[-1][0] == "/sign-in/"


def test_a_wrong_password_is_told(client: Client, ada: Any) -> None:
    page = client.post("/sign-in/", {"username": "ada", "password": "no"})

    assert "do not match" in page.text


@pytest.mark.parametrize("path", ["/summarise/", "/ask/", "/tiny/", "/usage/", "/usage/strip/"])
def test_nobody_spends_or_looks_without_signing_in(client: Client, path: str) -> None:
    assert client.get(path).headers["Location"] == f"/sign-in/?next={path}"


def test_nobody_streams_without_signing_in(client: Client, api: AnthropicSimulator) -> None:
    assert client.post("/ask/stream/", QUESTION).status_code == 302
    assert api.requests == []


def test_a_text_is_summarised_and_its_cost_is_the_price_of_its_tokens(
    reader: Client, ada: Any
) -> None:
    page = reader.post("/summarise/", TEXT)

    call = CallLog.objects.get()
    assert "The lamp burns." in page.text
    assert (call.feature_id, call.user_id, call.status) == ("summaries", ada.pk, "settled")
    used = ai_budget.Usage(input_tokens=call.input_tokens, output_tokens=call.output_tokens)
    assert call.cost_nanousd == ai_budget.price(call.model, used, at=call.reserved_at)
    assert call.cost_usd
    assert usd(call.cost_usd) in page.text
    assert call.model in page.text


def test_a_sample_fills_the_form(reader: Client) -> None:
    assert "keeper of the light" in reader.get("/summarise/?sample").text


def test_an_empty_form_is_told_and_costs_nothing(reader: Client, api: AnthropicSimulator) -> None:
    page = reader.post("/summarise/", {"text": "", "length": "points"})

    assert "This field is required." in page.text
    assert api.requests == []


def test_a_question_is_answered_without_scripts(reader: Client) -> None:
    page = reader.post("/ask/", QUESTION)

    assert "The universe is old" in page.text
    assert CallLog.objects.get().feature_id == "chat"


def test_text_from_outside_is_escaped(reader: Client) -> None:
    page = reader.post("/ask/", {"question": "<script>alert(1)</script>"})

    assert "<script>alert" not in page.text
    assert "&lt;script&gt;alert" in page.text


def test_a_downgraded_answer_says_so(reader: Client) -> None:
    chat = FeatureBudget.objects.get(name="chat")
    chat.rungs.all().delete()
    reader.post("/ask/", QUESTION)
    spent = CallLog.objects.get().cost_usd
    assert spent is not None
    FeatureBudget.objects.filter(pk=chat.pk).update(daily_limit_usd=spent * 50)
    DowngradeRung.objects.create(budget=chat, at_percent=1, model="claude-haiku-5-5")

    page = reader.post("/ask/", QUESTION)

    assert "a cheaper model answered" in page.text
    assert "claude-haiku-5-5" in page.text


@pytest.mark.parametrize("question", TINY_QUESTIONS)
def test_a_tiny_budget_has_room_for_exactly_one_call(
    reader: Client, api: AnthropicSimulator, question: str
) -> None:
    first = reader.post("/tiny/", {"question": question})
    sent = [request.path for request in api.requests]
    second = reader.post("/tiny/", {"question": question})

    assert (first.status_code, second.status_code) == (200, 429)
    # The first is counted, for its bytes alone do not fit; the second is hopeless, and is not.
    assert sent == ["/v1/messages/count_tokens", "/v1/messages"]
    assert len(api.requests) == len(sent)


def test_a_refusal_is_a_friendly_page_with_the_numbers(reader: Client) -> None:
    reader.post("/tiny/", TINY_FORM)

    page = reader.post("/tiny/", TINY_FORM)

    spent = CallLog.objects.get().cost_usd
    limit = FeatureBudget.objects.get(name="tiny").daily_limit_usd
    assert spent
    assert "The budget is used up for now" in page.text
    assert "The tiny feature’s daily limit" in page.text
    assert f"<dd>{usd(spent)}</dd>" in page.text
    assert f"<dd>{usd(limit)}</dd>" in page.text
    assert re.search(r"It starts anew <b>\w+day, \d+ \w+, 00:00 UTC</b>", page.text)
    assert 0 < int(page.headers["Retry-After"]) <= 86_400
    assert SpendWindow.objects.get(scope="feature:tiny", period="day").refused == 1


def test_a_reader_at_their_own_limit_is_told_that_it_is_theirs(reader: Client, ada: Any) -> None:
    UserQuota.objects.create(user=ada, daily_limit_usd=0)

    page = reader.post("/ask/", QUESTION)

    assert page.status_code == 429
    assert "Your own daily limit" in page.text


def test_a_limit_of_calls_is_told_in_calls(reader: Client, ada: Any) -> None:
    UserQuota.objects.create(user=ada, daily_calls=0)

    page = reader.post("/ask/", QUESTION)

    assert "<dd>0 calls</dd>" in page.text


def test_a_paused_feature_says_so(reader: Client, api: AnthropicSimulator) -> None:
    FeatureBudget.objects.filter(name="summaries").update(enabled=False)

    page = reader.post("/summarise/", TEXT)

    assert page.status_code == 503
    assert "The staff have paused it" in page.text
    assert api.requests == []


def test_a_failing_api_is_told_and_costs_nothing(reader: Client, api: AnthropicSimulator) -> None:
    api.enqueue(Fail(status=400))

    page = reader.post("/summarise/", TEXT)

    assert page.status_code == 502
    assert "No answer came back" in page.text
    assert CallLog.objects.get().cost_nanousd == 0


def test_usage_shows_what_was_spent_and_what_is_left(reader: Client, ada: Any) -> None:
    reader.post("/summarise/", TEXT)
    spent = CallLog.objects.get().cost_usd
    assert spent is not None

    page = reader.get("/usage/")

    assert page.text.count(f'<p class="amount">{usd(spent)}</p>') == 2  # today, this month
    assert usd(Decimal("0.30") - spent) in page.text
    assert usd(Decimal(6) - spent) in page.text
    assert "00:00 UTC" in page.text
    assert '<th scope="row">summaries</th>' in page.text


def test_usage_is_ones_own(reader: Client, client: Client, grace: Any) -> None:
    reader.post("/summarise/", TEXT)
    spent = CallLog.objects.get().cost_usd
    client.force_login(grace)

    page = client.get("/usage/")

    assert usd(spent) not in page.text
    assert "None yet." in page.text
    assert "$0.50" in page.text  # grace has a limit of her own


def test_the_strip_follows_every_answer(reader: Client) -> None:
    before = reader.get("/usage/strip/").text
    reader.post("/ask/", QUESTION)

    after = reader.get("/usage/strip/").text

    spent = CallLog.objects.get().cost_usd
    assert "<b>$0.00</b>" in before
    assert f"<b>{usd(spent)}</b>" in after


def test_allowances_follow_the_most_specific_quota(ada: Any) -> None:
    day, month = ai_budget_periods()
    assert allowance(ada, day).limit is None

    UserQuota.objects.create(daily_limit_usd=1, monthly_limit_usd=10)
    own = UserQuota.objects.create(user=ada, daily_limit_usd=2)
    assert (allowance(ada, day).limit, allowance(ada, month).limit) == (Decimal(2), Decimal(10))

    own.unlimited = True
    own.save()
    assert (allowance(ada, day).limit, allowance(ada, month).limit) == (Decimal(2), None)


def test_money_is_shown_exactly() -> None:
    assert usd(money.to_usd(1)) == "$0.000000001"
    assert usd(money.to_usd(123_450_000_000_000)) == "$123,450.00"
    assert usd(Decimal("0.3")) == "$0.30"
    assert usd(Decimal(0)) == "$0.00"
    assert usd(None) == ""


def test_only_the_staff_see_the_way_to_the_admin(reader: Client, client: Client) -> None:
    assert "/admin/" not in reader.get("/").text
    staff = get_user_model().objects.create_superuser("mary", password="mary")
    client.force_login(staff)

    page = client.get("/").text

    assert "/admin/ai_budget/calllog/" in page
    assert "/admin/ai_budget/featurebudget/" in page


def test_no_page_needs_what_a_strict_policy_blocks(
    reader: Client, ada: Any, api: AnthropicSimulator
) -> None:
    pages = {
        "anonymous": Client().get("/"),
        "sign in": Client().get("/sign-in/"),
        "wrong password": Client().post("/sign-in/", {"username": "ada", "password": "no"}),
        "home": reader.get("/"),
        "summarise": reader.get("/summarise/?sample"),
        "summary": reader.post("/summarise/", TEXT),
        "errors": reader.post("/summarise/", {}),
        "ask": reader.get("/ask/"),
        "answer": reader.post("/ask/", QUESTION),
        "tiny": reader.get("/tiny/"),
        "tiny answer": reader.post("/tiny/", TINY_FORM),
        "refused": reader.post("/tiny/", TINY_FORM),
        "usage": reader.get("/usage/"),
    }
    api.enqueue(Fail(status=400))
    pages["unanswered"] = reader.post("/summarise/", TEXT)
    FeatureBudget.objects.filter(name="summaries").update(enabled=False)
    pages["paused"] = reader.post("/summarise/", TEXT)

    wrong = {name: violations(page.text) for name, page in pages.items()}

    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.skipif(not HAS_CSP, reason="this Django has no middleware for it")
def test_every_page_is_sent_with_a_strict_policy(reader: Client) -> None:
    policy = reader.get("/ask/").headers["Content-Security-Policy"]

    assert "default-src 'self'" in policy
    assert "unsafe" not in policy


def test_the_settings_of_the_site_pass_its_own_checks(settings: Settings) -> None:
    from ai_budget.checks import check_settings

    assert check_settings(None) == []


def ai_budget_periods() -> tuple[Any, Any]:
    from ai_budget.periods import Period

    return Period.DAY, Period.MONTH
