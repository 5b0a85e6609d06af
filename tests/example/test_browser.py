"""The streaming page in a real browser, under the site's own content security policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright")

from playwright.sync_api import Page, expect, sync_playwright

from tests.example.processes import PATIENCE, calls, demo, site_port, wait_for_call

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site_url(first_demo: str, database: Path) -> Iterator[str]:
    """The address of a demo that has its month of spend already."""
    with demo(database) as (_, output):
        yield f"http://127.0.0.1:{site_port(output)}"


@pytest.fixture
def page(chromium_path: str, site_url: str) -> Iterator[Page]:
    """A page on which ada has signed in. Whatever the browser complains about fails the test."""
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=["--no-sandbox"])
        page = browser.new_page(base_url=site_url)
        page.set_default_timeout(PATIENCE * 1000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto("/sign-in/")
        page.get_by_label("Name").fill("ada")
        page.get_by_label("Password").fill("ada")
        page.get_by_role("button", name="Sign in").click()
        page.get_by_text("Good to see you, Ada.").wait_for()
        yield page
        browser.close()
    assert complaints == []


def test_an_answer_streams_in_and_leaves_its_receipt(page: Page, database: Path) -> None:
    last = calls(database)[-1][0]
    page.goto("/ask/")
    page.get_by_role("link", name="Why is the sky dark at night?").click()
    before = page.locator("#strip").inner_text()

    page.get_by_role("button", name="Ask").click()

    expect(page.locator("#answer")).to_contain_text("It should not be")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("region", name="What this answer cost")).to_contain_text("Cost")
    expect(page.locator("#answer")).to_contain_text("had time to reach us.")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.locator("#strip")).not_to_have_text(before)
    assert wait_for_call(database, after=last)[1:] == ("chat", "settled", "")


def test_stop_ends_the_answer_at_its_source(page: Page, database: Path) -> None:
    last = calls(database)[-1][0]
    page.goto("/ask/?question=Tell+me+a+long+story")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#answer")).not_to_be_empty()

    page.get_by_role("button", name="Stop").click()

    expect(page.get_by_text("Stopped.")).to_be_visible()
    expect(page.get_by_role("button", name="Ask")).to_be_focused()
    assert wait_for_call(database, after=last)[1:] == ("chat", "estimated", "closed early")


def test_leaving_the_page_ends_the_answer_too(page: Page, database: Path) -> None:
    last = calls(database)[-1][0]
    page.goto("/ask/?question=Tell+me+another+story")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#answer")).not_to_be_empty()

    page.goto("/usage/")

    assert wait_for_call(database, after=last)[1:] == ("chat", "estimated", "closed early")
