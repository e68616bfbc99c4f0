"""Different SAEs at one address are measured together if possible, else refused immediately in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

import olmoscope
from olmoscope.errors import UserError
from olmoscope.evaluate.anywhere import Options
from olmoscope.evaluate.audit import audit

TEXT = "A text of some words, and some more of them. " * 40


def written(folder, hook="blocks.3.hook_resid_post", width=256, latents=48, model="tiny", bos=False, **settings):
    """A TopK SAE in SAELens' format."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(latents)
    save_file({"W_enc": torch.randn(width, latents, generator=generator), "b_enc": torch.zeros(latents),
               "W_dec": torch.randn(latents, width, generator=generator), "b_dec": torch.zeros(width)},
              folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({
        "architecture": "topk", "k": 8, "d_in": width, "d_sae": latents, "dtype": "float32", **settings,
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": hook, "model_name": model, "prepend_bos": bos}}))


@pytest.fixture
def given(tmp_path):
    """A set with one SAE of layer 3, and a text."""
    (tmp_path / "text.txt").write_text(TEXT)
    written(tmp_path / "set/a")
    return tmp_path / "set", str(tmp_path / "text.txt")


@pytest.mark.parametrize(("other", "message"), [
    ({"hook": "blocks.20.hook_resid_post"}, "b reads layers.20, but tiny has layers 0 to 7: it is an SAE of another"),
    ({"width": 128}, "b reads rows of 128 values, those of tiny have 256: it is an SAE of another model; give that one "
                     "with --model$"),
    ({"hook": "blocks.6.attn.hook_in", "width": 128}, "b reads rows of 128 values, those of tiny have 256"),
    ({"bos": True}, "b was trained on sequences that begin with BOS, a on sequences without it; evaluate them "
                    "separately"),
    ({"model": None}, "set/b does not name its language model; give --model, and evaluate it separately from "
                      "those of tiny$"),
    ({"architecture": "temporal"}, "set/b/cfg.json: architecture 'temporal'"),
])
def test_what_cannot_be_taken_together(given, tmp_path, other, message):
    folder, text = given
    written(folder / "b", **other)
    out = tmp_path / "out"
    for call in (lambda: olmoscope.evaluate(folder, text=text, tokens=200, out=out),
                 lambda: audit([str(folder)], Options(out, text, 200))):
        with pytest.raises(UserError, match=message) as refusal:
            call()
        assert "\n" not in str(refusal.value) and not (out / "a").exists()


def test_layers_and_latents_may_differ(given, tmp_path, capsys):
    from olmoscope.cli.saes import inspect

    folder, text = given
    written(folder / "b", "blocks.6.hook_resid_post", latents=64)
    found = olmoscope.evaluate(folder, text=text, tokens=200, out=tmp_path / "out")
    assert [(str(one.site), one.d_sae) for one in found] == [("layers.3", 48), ("layers.6", 64)]
    written(folder / "c", architecture="temporal")
    inspect(str(folder))
    said = " ".join(capsys.readouterr().out.split())
    assert "holds 3 SAEs" in said and "latents 48; 64" in said and "reads layers.3; layers.6" in said
    assert "cannot be read: " in said and "architecture 'temporal'" in said


def test_an_index_is_of_one(given):
    folder, text = given
    written(folder / "b")
    for out in (None, folder / "index"):
        with pytest.raises(UserError, match=r"set holds 2 SAEs of other tools; index one at a time, with --out for its "
                                            r"index: \S+set/a, \S+set/b$"):
            olmoscope.index(folder, text=text, out=out)
    written(folder.parent / "deep", "blocks.9.hook_resid_post")
    with pytest.raises(UserError, match=r"deep reads layers\.9, but tiny has layers 0 to 7"):
        olmoscope.index(folder.parent / "deep", text=text, out=folder / "index")
