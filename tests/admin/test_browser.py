"""The admin in a real browser, under a policy that allows nothing inline."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from django.test import Client
from pytest_django.live_server_helper import LiveServer

from tests.admin.batches import BatchFactory, BatchItemFactory, BatchSubmissionFactory
from tests.factories import (
    CallLogFactory,
    FeatureBudgetFactory,
    LimitOverrideFactory,
    SpendWindowFactory,
)

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, ConsoleMessage, Route

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


def be_strict(route: Route) -> None:
    """Forbid everything inline and everything from elsewhere."""
    response = route.fetch()
    policy = {"content-security-policy": "default-src 'self'"}
    route.fulfill(response=response, headers={**response.headers, **policy})


def look(context: BrowserContext, admin: str, pages: list[str]) -> tuple[str, list[str]]:
    """Open the pages; return the colour of the last one's bar, and what the browser said."""
    complaints: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if not message.location["url"].endswith("favicon.ico"):
            complaints.append(message.text)

    page = context.new_page()
    page.on("console", listen)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.route("**/*", be_strict)
    for path in pages:
        page.goto(f"{admin}/{path}")
    bar = page.get_by_role("img", name="$1.00 spent, $0.00 held: 50.0 % of $2.00")
    colour = bar.locator(".ai-budget-spent").evaluate("bar => getComputedStyle(bar).fill")
    return str(colour), complaints


def test_pages_break_no_policy_and_draw_bars_in_light_and_dark(
    chromium_path: str, live_server: LiveServer, root: Client
) -> None:
    pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    chat = FeatureBudgetFactory.create(name="chat", daily_limit_usd=2)
    LimitOverrideFactory.create(budget=chat)
    call = CallLogFactory.create(feature=chat)
    SpendWindowFactory.create(scope="feature:chat", spent_nanousd=10**9)
    pages = [
        "calllog/",
        f"calllog/{call.pk}/change/",
        f"featurebudget/{chat.pk}/change/",
        "featurebudget/",
    ]
    session = root.cookies["sessionid"].value

    # No query inside: Django refuses them where the browser's event loop runs.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=["--no-sandbox"])
        light = browser.new_context(color_scheme="light")
        dark = browser.new_context(color_scheme="dark")
        seen = []
        for context in (light, dark):
            context.add_cookies([{"name": "sessionid", "value": session, "url": live_server.url}])
            seen.append(look(context, f"{live_server.url}/admin/ai_budget", pages))
        browser.close()

    assert [complaints for _colour, complaints in seen] == [[], []]
    colours = {colour for colour, _complaints in seen}
    assert len(colours) == 2
    assert "rgb(0, 0, 0)" not in colours


def test_a_batch_is_decided_about_by_hand_and_breaks_no_policy(
    chromium_path: str, live_server: LiveServer, root: Client
) -> None:
    pytest.importorskip("playwright")
    from playwright.sync_api import expect, sync_playwright

    batch = BatchFactory.create(total=4, succeeded=1, errored=1)
    submission = BatchSubmissionFactory.create(batch=batch, status="uncertain", items_count=2)
    BatchItemFactory.create_batch(2, batch=batch, submission=submission)
    session = root.cookies["sessionid"].value
    complaints: list[str] = []

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=["--no-sandbox"])
        colours = set()
        for scheme in ("light", "dark"):
            context = browser.new_context(color_scheme=scheme)
            context.add_cookies([{"name": "sessionid", "value": session, "url": live_server.url}])
            page = context.new_page()
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.route("**/*", be_strict)
            page.goto(f"{live_server.url}/admin/ai_budget/batch/")
            bar = page.get_by_role("img", name="2 of 4 items are over: 50 %")
            for part in ("answered", "unanswered"):
                drawn = bar.locator(f".ai-budget-{part}")
                colours.add(str(drawn.evaluate("it => getComputedStyle(it).fill")))

        page.get_by_role("link", name=f"#{batch.pk}", exact=True).click()
        page.get_by_role("link", name="Send it again").click()
        page.get_by_role("button", name="Yes, send it again").click()
        expect(page.get_by_text("The submission is sent again.")).to_be_visible()
        expect(page.get_by_role("cell", name="Waiting to be sent")).to_be_visible()

        page.get_by_role("link", name="Batches").last.click()
        page.get_by_role("checkbox", name=re.compile("Select this object")).check()
        page.get_by_role("combobox", name="Action").select_option("cancel")
        page.locator("button[name=index]").click()
        page.get_by_role("button", name="Yes, cancel them").click()
        expect(page.get_by_text("1 batch is being canceled.")).to_be_visible()
        browser.close()

    assert [text for text in complaints if "favicon" not in text] == []
    assert len(colours) == 4
    submission.refresh_from_db()
    assert (submission.status, submission.cancel_requested) == ("waiting", True)
