"""Prompts and steering in a real browser, with the tiny model; the page's values equal a dense computation."""

from pathlib import Path

import pytest
import torch
from playwright.sync_api import Page, expect
from test_page import SAE, open_page

from browse_server import ask
from helpers import read_streams, save_small_model
from olmoscope.browse.language_model import LiveModel
from olmoscope.errors import UserError
from olmoscope.model.load import load_model
from olmoscope.recipe.schema import Model
from olmoscope.sae.io.open import open_sae
from olmoscope.site import Site
from olmoscope.tokens.tokenizer import load_tokenizer

TEXT = "word1 is\n<b>word2</b> is\u202e 👩‍💻"


def dense(index_folder: Path, text: str) -> torch.Tensor:
    """Activations `[T, F]` in float64 of a text; only the model runs in its own dtype, as it does when collecting."""
    model = Model(name="tiny")
    loaded = load_model(model, [Site(1)], torch.device("cpu"))
    ids = torch.from_numpy(load_tokenizer(model).encode([text])[0][:-1].astype("int64"))
    x_TD = read_streams(loaded.module, loaded.layers, [1], ids[None])[1][0].double()
    sae = open_sae(index_folder.parent).sae
    pre_TF = (x_TD - sae.b_in.double()) @ sae.W_enc.double().T + sae.b_latent.double()
    values_TK, indices_TK = pre_TF.topk(8, dim=1)
    return torch.zeros_like(pre_TF).scatter_(1, indices_TK, values_TK.clamp_min(0))


def test_a_prompt_shows_each_token_and_each_feature(page: Page, port: int, index_folder: Path) -> None:
    open_page(page, port, f"#/{SAE}/prompt")
    expect(page.get_by_test_id("prompt")).not_to_have_value("")  # a text to try
    page.get_by_test_id("prompt").fill(TEXT)
    page.get_by_test_id("read").click()
    tokens = page.get_by_test_id("token")
    wanted_TF = dense(index_folder, TEXT)
    expect(tokens).to_have_count(len(wanted_TF), timeout=30_000)
    for place, row in enumerate(page.get_by_test_id("tokens").locator("li").all()):
        tops = row.get_by_test_id("top").evaluate_all(
            "all => all.map((one) => [one.dataset.feature, one.dataset.value])")
        values, features = wanted_TF[place].topk(5)
        assert [float(value) for _, value in tops] == pytest.approx([v for v in values.tolist() if v > 0], rel=1e-4)
        assert {int(number) for number, _ in tops[:3]} == set(features[: len(tops[:3])].tolist())
    chosen = int(wanted_TF.amax(dim=0).argmax())
    page.get_by_test_id("order").select_option("strong")
    first = page.get_by_test_id("ranked-feature").first
    expect(first).to_have_attribute("data-feature", str(chosen))
    first.locator("button").click()
    shown = tokens.evaluate_all("all => all.map((one) => Number(one.dataset.value ?? 0))")
    assert shown == pytest.approx(wanted_TF[:, chosen].tolist(), rel=1e-4)
    assert f"feature={chosen}" in page.url
    tokens.nth(1).click()
    expect(page.get_by_test_id("ranked-feature")).to_have_count(int(wanted_TF[1].count_nonzero()))
    assert "<b>" in page.get_by_test_id("reads").inner_text()
    assert "\u202e" not in page.locator("main").inner_text()
    page.reload()
    expect(tokens).to_have_count(len(wanted_TF))


def test_two_prompts_side_by_side(page: Page, port: int, index_folder: Path) -> None:
    open_page(page, port, f"#/{SAE}/prompt?text=word1%20is")
    page.get_by_test_id("compare").click()
    page.get_by_test_id("other").fill("something else")
    page.get_by_test_id("read").click()
    expect(page.locator("section.read")).to_have_count(2)
    one, two = dense(index_folder, "word1 is") > 0, dense(index_folder, "something else") > 0
    only = int((one.any(dim=0) & ~two.any(dim=0)).sum())
    expect(page.locator("section.read").first.get_by_text("only here")).to_have_count(only)


def steered(page: Page) -> tuple[str, str]:
    page.get_by_test_id("generate").click()
    expect(page.get_by_test_id("state")).to_contain_text("Finished", timeout=60_000)
    return page.get_by_test_id("plain").inner_text(), page.get_by_test_id("steered").inner_text()


def test_steering_side_by_side(page: Page, port: int) -> None:
    _, listed, _ = ask(port, "GET", f"/api/{SAE}/features?limit=1")
    number = listed["lines"][0]["feature"]
    open_page(page, port, f"#/{SAE}/feature/{number}")
    page.get_by_role("link", name="Steer").last.click()
    page.get_by_test_id("prompt").fill("word1 is")
    page.get_by_test_id("tokens").fill("15")
    plain, changed = steered(page)
    assert plain != changed and plain.startswith("word1 is")
    assert steered(page) == (plain, changed), "seeded"
    page.get_by_test_id("strength").fill("0")
    assert steered(page) == (plain, plain), "steering by zero changes nothing"
    expect(page.get_by_test_id("state")).to_contain_text("both texts are the same")
    page.get_by_test_id("seed").fill("1")
    assert steered(page)[0] != plain
    page.get_by_test_id("strength").fill("8")
    page.get_by_test_id("mode").select_option("clamp")
    address = page.url
    assert f"edits={number}%3Aclamp%3A8" in address
    both = steered(page)
    page.reload()
    assert steered(page) == both, "the address holds all of it"


def test_writing_stops(page: Page, port: int) -> None:
    open_page(page, port, f"#/{SAE}/steer?text=word1%20is&tokens=512&temperature=1")
    page.get_by_test_id("generate").click()
    expect(page.get_by_test_id("stop")).to_be_enabled()
    page.wait_for_timeout(500)
    page.get_by_test_id("stop").click()
    expect(page.get_by_test_id("state")).to_have_text("Stopped.")
    so_far = page.get_by_test_id("plain").inner_text()
    page.wait_for_timeout(500)
    assert page.get_by_test_id("plain").inner_text() == so_far
    assert ask(port, "POST", f"/api/{SAE}/prompt", {"text": "the model is free again"})[0] == 200


def test_what_cannot_be_steered_is_said(port: int) -> None:
    _, dead, _ = ask(port, "GET", f"/api/{SAE}/features?dead=true&limit=1")
    for number, said in ((dead["lines"][0]["feature"], "never fired"), (99_999, "there is no feature")):
        edits = [{"feature": number, "mode": "add", "strength": 1}]
        status, answer, _ = ask(port, "POST", f"/api/{SAE}/steer", {"text": "x", "edits": edits})
        assert status == 400 and said in answer["error"]
    status, answer, _ = ask(port, "POST", f"/api/{SAE}/prompt", {"text": "word " * 5000})
    assert status == 400 and "shorten it" in answer["error"]
    body = {"text": "word " * 1700, "edits": [], "tokens": 512}
    status, answer, _ = ask(port, "POST", f"/api/{SAE}/steer", body)
    assert status == 400 and "512 are to follow" in answer["error"]
    assert ask(port, "POST", f"/api/{SAE}/prompt", {"text": "a\0b\ufeff"})[0] == 200
    assert ask(port, "POST", f"/api/{SAE}/prompt", {"text": "a\ud800"})[0] == 400, "a lone surrogate is no text"


def test_no_click_downloads_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"someone/large' is not on this machine.*--model someone/large"):
        LiveModel(Model(name="someone/large"), may_download=False).load()


def test_a_model_of_another_width_is_refused(index_folder: Path, tmp_path: Path) -> None:
    other = LiveModel(Model(name=str(save_small_model("Olmo3", tmp_path / "other"))), may_download=False)
    with pytest.raises(UserError, match=r"4 layers of width 32.*layers\.1, width 256.*--model"):
        other.encode(open_sae(index_folder.parent).sae, 1, [1, 2, 3])
