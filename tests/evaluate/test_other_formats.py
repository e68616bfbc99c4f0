"""SAEs of three families, none in SAELens' format, in one evaluation and on one page."""

import pytest
import torch

import foreign_files as made
import olmoscope
from helpers import save_small_model, small_model
from olmoscope.browse.collection import open_collection
from olmoscope.sae.io.open import open_sae

WIDTH = 32


@pytest.fixture
def job(tmp_path):
    """Three addresses, their model, and a text."""
    model = save_small_model("Llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("A text of some words, and some more of them. " * 40)
    folders = {
        "Goodfire": tmp_path / "Goodfire/Llama-3.1-8B-Instruct-SAE-l1" / made.goodfire(
            tmp_path, WIDTH, "Goodfire/Llama-3.1-8B-Instruct-SAE-l1", "Llama-3.1-8B-Instruct-SAE-l1.pth"),
        "Qwen-Scope": tmp_path / "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_20" / made.qwen_scope(
            tmp_path, path="layer0.sae.pt", width=WIDTH),
        "circuit-tracer": tmp_path / "some/set" / made.circuit_tracer(
            tmp_path, "some/set", "layer_1.safetensors", skip=True, width=WIDTH)}
    return [str(path) for path in folders.values()], str(model), str(tmp_path / "text.txt")


def test_three_families_in_one_evaluation_and_one_page(job, tmp_path):
    saes, model, text = job
    evaluations = olmoscope.evaluate(saes, text=text, model=model, tokens=200, dtype="float32", out=tmp_path / "out",
                                     bos=False)
    assert [(one.architecture, str(one.site)) for one in evaluations] == [
        ("standard", "layers.1"), ("topk", "layers.0"), ("transcoder", "layers.1.mlp.out")]
    assert [str(site) for site in evaluations[2].reads] == ["layers.1.mlp.in"]
    assert all(one.rows == 200 and one.l0.mean > 0 for one in evaluations)
    for number, address in enumerate(saes):
        [indexed] = olmoscope.index(address, text=text, model=model, tokens=200, bos=False,
                                    out=tmp_path / "pages" / str(number))
        assert indexed.info.sae.d_sae == open_sae(address).sae.d_sae and indexed.info.firings > 0
    collection = open_collection(tmp_path / "pages", model)
    assert sorted(type(shown.sae()).__name__ for shown in collection.values()) == ["JumpReLU", "JumpReLU", "TopK"]


@torch.no_grad()
def test_a_layer_of_a_cross_layer_transcoder_is_attached(tmp_path):
    """It reads one site and writes several; each site gets the output of its part of the decoder."""
    path = tmp_path / "mntss/clt-gemma-2-2b-2.5M" / made.clt(tmp_path, layers=4, width=WIDTH)
    coder, model = olmoscope.load(path), small_model("Llama")
    assert [str(site) for site in coder.writes] == ["layers.1.mlp.out", "layers.2.mlp.out", "layers.3.mlp.out"]
    with olmoscope.attach(model, coder, mode="replace") as taps:
        model(input_ids=torch.randint(0, 4096, (2, 9)), use_cache=False)
    whole = coder.decode(coder.encode(taps["layers.1.mid"]))
    parts = torch.cat([taps.reconstructions[site] for site in coder.writes], dim=-1)
    torch.testing.assert_close(parts, whole)
