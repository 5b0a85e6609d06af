"""Make the pictures of the documentation: ``python -m docs.screenshots``.

Starts the demo over a database of its own, looks at its pages in Chromium, and writes
``docs/images/*.png``. It needs Playwright and Chromium, and takes no more than a minute.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.example.processes import demo, site_port
from tests.run import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

IMAGES = Path(__file__).resolve().parent / "images"
_PORT = "8400"
_LONGEST = 1_900
"""A page that goes on further is cut there, in pixels."""


class Picture(NamedTuple):
    """A page, who looks at it, and how."""

    file: str
    path: str
    reader: str = "admin"
    dark: bool = False
    width: int = 1200


PICTURES = (
    Picture("spend-page.png", "/admin/ai_budget/daytotal/", width=1440),
    Picture("spend-page-dark.png", "/admin/ai_budget/daytotal/?by=model", dark=True, width=1440),
    Picture("spend-page-narrow.png", "/admin/ai_budget/daytotal/", width=390),
    Picture("admin-budgets.png", "/admin/ai_budget/featurebudget/", width=1600),
    Picture("example-home.png", "/", reader="ada", width=1000),
    Picture("example-usage.png", "/usage/", reader="ada", width=1000),
)


def main() -> None:
    """Make all pictures, or those whose names are given."""
    from playwright.sync_api import sync_playwright

    wanted = set(sys.argv[1:]) or {picture.file for picture in PICTURES}
    with (
        tempfile.TemporaryDirectory() as folder,
        demo(Path(folder, "demo.sqlite3"), "--port", _PORT) as (_process, output),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for picture in PICTURES:
            if picture.file in wanted:
                take(browser, f"http://127.0.0.1:{site_port(output)}", picture)
                sys.stdout.write(f"docs/images/{picture.file}\n")
        browser.close()


def take(browser: Browser, site: str, picture: Picture) -> None:
    """Sign in, open the page, and write what is seen."""
    context = browser.new_context(
        base_url=site,
        color_scheme="dark" if picture.dark else "light",
        viewport={"width": picture.width, "height": 640},
    )
    page = context.new_page()
    _sign_in(page, picture.reader)
    page.goto(picture.path)
    height = min(page.evaluate("document.documentElement.scrollHeight"), _LONGEST)
    page.screenshot(
        path=IMAGES / picture.file,
        full_page=True,
        clip={"x": 0, "y": 0, "width": picture.width, "height": height},
    )
    context.close()


def _sign_in(page: Page, name: str) -> None:
    page.goto("/sign-in/")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(name)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/")


if __name__ == "__main__":
    main()
