"""The spend page in a real browser, under a policy that allows nothing inline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.test import Client
from pytest_django.live_server_helper import LiveServer

from ai_budget.money import NANO_PER_USD
from ai_budget.review import rollups
from tests.admin.conftest import SignIn
from tests.admin.test_browser import be_strict
from tests.admin.test_spend import at
from tests.factories import (
    HAIKU,
    OPUS,
    CallLogFactory,
    FeatureBudgetFactory,
    SpendWindowFactory,
    UserFactory,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]

AXE = '{preload: false, resultTypes: ["violations"]}'
"""It loads no style sheet a second time, and says only what is wrong."""

LONG = "a-feature-whose-name-goes-on-and-on-until-there-is-no-room-for-it"[:64]


@pytest.fixture
def spend() -> None:
    """Something in every section of the page."""
    product = FeatureBudgetFactory.create(name="product", monthly_plan_usd=4)
    chat = FeatureBudgetFactory.create(
        name="chat", parent=product, monthly_limit_usd=10, monthly_plan_usd=2
    )
    users = [UserFactory.create(username=name) for name in ("anna", "a" * 100)]
    for day in range(1, 16):
        CallLogFactory.create(
            feature=chat, category="product", user=users[0], reserved_at=at(day),
            cost_nanousd=day * NANO_PER_USD // 5,
        )  # fmt: skip
    CallLogFactory.create(
        feature__name=LONG, user=users[1], requested_model=OPUS, model=HAIKU, subject="tenant-1",
        reserved_at=at(14), cost_nanousd=NANO_PER_USD, tags={"plan": "free"},
        saved_nanousd=NANO_PER_USD, saved_reason="downgrade",
    )  # fmt: skip
    CallLogFactory.create(feature=chat, status="cached", cache_checked=True, reserved_at=at(14))
    CallLogFactory.create(feature=chat, status="reserved", reserved_at=at(15, 11))
    SpendWindowFactory.create(scope="feature:chat", refused=3)
    rollups.add_up()


@contextmanager
def browsing(chromium_path: str) -> Iterator[Browser]:
    # No query inside: Django refuses them where the browser's event loop runs.
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=["--no-sandbox"])
        yield browser
        browser.close()


def signed_in(browser: Browser, client: Client, site: str, **options: Any) -> BrowserContext:
    context = browser.new_context(base_url=site, **options)
    session = client.cookies["sessionid"].value
    context.add_cookies([{"name": "sessionid", "value": session, "url": site}])
    return context


def strict_page(context: BrowserContext, complaints: list[str]) -> Page:
    """A page that may load nothing inline, and whose complaints are kept."""

    def listen(message: ConsoleMessage) -> None:
        if not message.location["url"].endswith("favicon.ico"):
            complaints.append(message.text)

    page = context.new_page()
    page.on("console", listen)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    # A policy is a page's: what it loads goes by without a detour.
    page.route("**/admin/**", be_strict)
    page.goto("/admin/ai_budget/daytotal/")
    return page


def test_money_is_looked_for_and_found_under_a_strict_policy(
    chromium_path: str, live_server: LiveServer, root: Client, staff: SignIn, spend: None
) -> None:
    pytest.importorskip("playwright")
    from playwright.sync_api import expect

    stranger = staff("view_calllog")
    complaints: list[str] = []
    with browsing(chromium_path) as browser:
        context = signed_in(browser, root, live_server.url, java_script_enabled=False)
        page = strict_page(context, complaints)

        # By keyboard, from one field to the next; a date has three parts and a button.
        page.get_by_label("First day").focus()
        for _tab in range(8):
            page.keyboard.press("Tab")
        expect(page.get_by_label("Feature or category")).to_be_focused()
        page.get_by_label("Feature or category").select_option("chat")
        page.get_by_label("User name").fill("anna")
        page.get_by_label("User name").press("Enter")
        expect(page.get_by_text("Only: chat anna")).to_be_visible()

        page.get_by_role("navigation", name="Range").get_by_role("link", name="Last 7 days").click()
        expect(page.get_by_role("link", name="Last 7 days")).to_have_attribute(
            "aria-current", "true"
        )
        page.get_by_role("link", name="By model").click()
        expect(page.get_by_role("img", name="Spend by day")).to_be_visible()
        page.get_by_text("As a table").last.click()
        days = page.get_by_role("region", name="Spend by day")
        expect(days.get_by_role("row")).to_have_count(8)

        # The calls behind a figure.
        features = page.get_by_role("region", name="Features")
        features.get_by_role("row", name="chat").get_by_role("link", name="$16.80").click()
        expect(page.locator(".paginator")).to_contain_text("7 calls")
        page.go_back()

        page.get_by_role("link", name="All calls").click()
        expect(page.get_by_role("cell", name=LONG)).to_be_visible()
        with page.expect_download() as download:
            page.get_by_role("link", name="Export as CSV").click()
        assert "section,name,metric,value" in Path(download.value.path()).read_text("utf-8")

        refused = strict_page(signed_in(browser, stranger, live_server.url), [])
        expect(refused.get_by_text("403 Forbidden")).to_be_visible()

    assert complaints == []


def test_it_is_read_in_light_and_dark_on_wide_and_narrow_screens(
    chromium_path: str, live_server: LiveServer, root: Client, spend: None
) -> None:
    pytest.importorskip("playwright")
    axe_playwright = pytest.importorskip("axe_playwright_python")
    axe = Path(axe_playwright.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    complaints: list[str] = []
    with browsing(chromium_path) as browser:
        colours = {}
        for scheme, width in (("light", 1440), ("dark", 360)):
            context = signed_in(
                browser,
                root,
                live_server.url,
                color_scheme=scheme,
                viewport={"width": width, "height": 800},
            )
            page = strict_page(context, complaints)
            for details in page.locator("details > summary").all():
                details.click()
            page.evaluate(axe)
            found = page.evaluate(f"axe.run('#content', {AXE})")
            assert [(it["id"], it["nodes"][0]["html"]) for it in found["violations"]] == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            colours[scheme] = page.locator(".ai-budget-bars rect").first.evaluate(
                "it => getComputedStyle(it).fill"
            )

    assert complaints == []
    assert colours == {"light": "rgb(43, 111, 147)", "dark": "rgb(107, 183, 222)"}
