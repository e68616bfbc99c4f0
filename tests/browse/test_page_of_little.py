"""The page of an index with empty lists, and of one without promoted tokens."""

import pytest
import torch
from playwright.sync_api import Page, expect

from browse_server import browse_server
from browser import overflow
from helpers import save_small_model
from little_index import D, F, made, model_without_norm, silent_sae
from olmoscope.train.initialize import initialize


def open_page(page: Page, port: int, address: str) -> None:
    page.goto("about:blank")
    page.goto(f"http://127.0.0.1:{port}/#/sae/{address}")
    page.wait_for_selector("main[data-drawn]")


def test_nothing_fires(page: Page, tmp_path) -> None:
    made(silent_sae(), save_small_model("Llama", tmp_path / "model"), tmp_path)
    with browse_server(tmp_path / "index") as port:
        open_page(page, port, "features")
        expect(page.get_by_test_id("line")).to_have_count(F)
        open_page(page, port, "feature/3")
        expect(page.get_by_test_id("dead")).to_be_visible()
        open_page(page, port, "about")
        expect(page.get_by_text("Dead here")).to_be_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_without_promoted_tokens(browser, tmp_path, width) -> None:
    """The page says why there are none, in their place."""
    index = made(initialize(D, F, 4, "none", torch.zeros(D), seed=0), model_without_norm(tmp_path / "model"), tmp_path)
    page = browser.page(width=width)
    feature = next(number for number in range(F) if index.feature(number).rows)
    with browse_server(tmp_path / "index") as port:
        open_page(page, port, "features")
        expect(page.get_by_test_id("line")).to_have_count(F)
        expect(page.get_by_test_id("filter-promoted")).to_have_count(0)
        assert overflow(page) == 0
        open_page(page, port, f"feature/{feature}")
        expect(page.get_by_test_id("no-promoted")).to_contain_text("the head of OPTForCausalLM does not read")
        page.keyboard.press("c")
        assert overflow(page) == 0
        open_page(page, port, "about")
        expect(page.get_by_text("none: the head of OPTForCausalLM")).to_be_visible()
