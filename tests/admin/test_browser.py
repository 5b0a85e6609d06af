"""The admin in a real browser, under a policy that allows nothing inline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from django.test import Client
from pytest_django.live_server_helper import LiveServer

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
