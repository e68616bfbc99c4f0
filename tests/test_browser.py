"""The browser of the other tests notices what it must: errors, exceptions, requests that leave the machine."""

import shutil

import pytest

from browser import REQUIRED, Browser, overflow, start_chromium


def visit(chromium, tmp_path, html):
    """The browser's complaints after opening a page."""
    (tmp_path / "page.html").write_text(html)
    browser = Browser(chromium)
    page = browser.page()
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_load_state("networkidle")
    problems, browser.problems = browser.problems, []
    browser.close()
    return problems


def test_a_page_without_faults(page, tmp_path):
    (tmp_path / "page.html").write_text("<h1>plain</h1><script>console.log('not an error')</script>")
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator("h1").inner_text() == "plain"
    assert overflow(page) == 0


def test_what_goes_wrong_is_seen(chromium, tmp_path):
    assert visit(chromium, tmp_path, "<script>console.error('bad')</script>") == ["console: bad"]
    assert visit(chromium, tmp_path, "<script>throw new Error('worse')</script>") == ["exception: worse"]
    outside = visit(chromium, tmp_path, "<img src='https://example.com/pixel.png'>")
    assert "request to another host: https://example.com/pixel.png" in outside


def test_width_and_colours(browser, tmp_path):
    (tmp_path / "page.html").write_text("<div style='width:900px'>wide</div>")
    page = browser.page(width=400, dark=True)
    page.goto((tmp_path / "page.html").as_uri())
    assert overflow(page) > 400
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")


def test_where_a_browser_is_required_none_is_a_failure(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no browser"):
        next(start_chromium())
    monkeypatch.setenv(REQUIRED, "required")
    with pytest.raises(pytest.fail.Exception, match="no browser"):
        next(start_chromium())
