"""A real browser for tests: Debian's Chromium, driven by playwright, without access to any host but this machine.

The fixtures are in conftest.py. `page` is a tab of a desktop's width; `browser.page(width=400, dark=True)` opens
another. When the test ends, it fails if a page wrote an error to the console, let an exception escape, or asked for
anything that is not on this machine:

    def test_the_heading(page, tmp_path):
        page.goto((tmp_path / "report.html").as_uri())
        assert page.locator("h1").inner_text() == "…"
        assert overflow(page) == 0
"""

import os
import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser as Chromium
from playwright.sync_api import Page, Route, sync_playwright

ARGUMENTS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync")
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
REQUIRED = "OLMOSCOPE_TEST_BROWSER"
"""An environment variable: if it is `required`, tests that need a browser fail without one; otherwise they skip."""


class Browser:
    """Opens tabs for one test, and records what went wrong in them."""

    def __init__(self, chromium: Chromium) -> None:
        self._chromium = chromium
        self._contexts = []
        self.problems: list[str] = []

    def page(self, width: int = 1280, height: int = 900, dark: bool = False, scripts: bool = True) -> Page:
        """A new tab without cookies or stored data, with a size in CSS pixels.

        Args:
            scripts: whether the page's JavaScript runs.
        """
        context = self._chromium.new_context(viewport={"width": width, "height": height}, java_script_enabled=scripts,
                                             color_scheme="dark" if dark else "light", reduced_motion="reduce")
        context.route("**/*", self._only_this_machine)
        context.on("console", lambda message: self._problem("console", message.text, message.type == "error"))
        context.on("page", lambda page: page.on("websocket", lambda socket: self._socket(socket.url)))
        context.on("weberror", lambda error: self._problem("exception", str(error.error)))
        self._contexts.append(context)
        return context.new_page()

    def close(self) -> None:
        """Close all tabs of the test and fail if anything went wrong in them."""
        for context in self._contexts:
            context.close()
        assert not self.problems, "\n".join(self.problems)

    def _only_this_machine(self, route: Route) -> None:
        if _is_local(route.request.url):
            route.continue_()
        else:
            self._problem("request to another host", route.request.url)
            route.abort()

    def _socket(self, url: str) -> None:
        self._problem("socket to another host", url, not _is_local(url))

    def _problem(self, kind: str, text: str, really: bool = True) -> None:
        if really:
            self.problems.append(f"{kind}: {text}")


def _is_local(url: str) -> bool:
    address = urlsplit(url)
    return address.scheme in ("file", "data", "blob") or address.hostname in LOCAL_HOSTS


def start_chromium() -> Iterator[Chromium]:
    """The browser's process, for a fixture; if none is installed, it skips, or fails if a browser is required."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        message = "no browser: `apt-get install chromium` (as root, `make test` does it)"
        if os.environ.get(REQUIRED) == "required":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


def overflow(page: Page) -> int:
    """By how many pixels the page is wider than the window; 0 if it does not scroll horizontally."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def violations(page: Page) -> str:
    """What axe-core finds wrong with the page for people who use a keyboard or a screen reader, or see little contrast;
    empty if nothing."""
    return "\n".join(f"{rule['id']}: {rule['help']}\n    {node['html']}\n    {node.get('failureSummary', '')}"
                     for rule in Axe().run(page).response["violations"] for node in rule["nodes"][:3])
