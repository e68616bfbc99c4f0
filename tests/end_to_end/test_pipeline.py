"""All stages at small size through the real command line, twice; also with a small model of another architecture."""

import json

import pytest
import torch
from safetensors.torch import load_file

from commands import run_forked
from helpers import recipe, save_small_model, write_documents
from olmoscope.files import sha256


def olmoscope(*arguments):
    done = run_forked(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def hashes(folder):
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("architecture", ["tiny", "GPT2"])
def test_text_to_validated_release(architecture, tmp_path):
    out = tmp_path / "out"
    write_documents(tmp_path / "corpus", count=120)
    changes = {"train__order": "reading", "tokens__documents": "apart"}
    if architecture != "tiny":
        save_small_model(architecture, tmp_path / "model")
        changes = {"model__name": str(tmp_path / "model"), "activations__layers": [1, 3],
                   "saes": [{"layer": 1, "d_sae": 64, "k": 4, "weights": "untied"},
                            {"layer": 3, "d_sae": 64, "k": 4, "normalize": "layer_norm", "canonical": True}],
                   "train__auxiliary": {"dead_window": 500, "k": 8}}
    (tmp_path / "job.yaml").write_text(recipe(tmp_path / "corpus", **changes).to_yaml())
    commands = [("collect", tmp_path / "job.yaml", "-o", out), ("train", out), ("evaluate", out), ("export", out),
                ("release", out)]
    for command in commands:
        olmoscope(*command)
    assert "FAILED" not in (report := olmoscope("validate", out)) and " checks passed." in report
    before = hashes(out)
    for command in commands:
        olmoscope(*command)
    assert hashes(out) == before

    manifest = json.loads((out / "release" / "manifest.json").read_text())
    assert len(manifest["saes"]) == 2
    for sae in (out / "runs").rglob("evaluation.json"):
        figures = json.loads(sae.read_text())
        assert 0 < figures["nmse"] < 1 and figures["fvu"] > 0
    card = (out / "release" / "README.md").read_text()
    assert "hook" in card and ("- untied weights" in card) == (architecture == "GPT2")
    if architecture == "GPT2":
        folder = out / "release" / "layer_01" / "width_64" / "topk_4_raw_untied"
        tensors = load_file(folder / "sae_weights.safetensors")
        assert not torch.equal(tensors["W_enc"], tensors["W_dec"].T)
        torch.testing.assert_close(tensors["W_dec"].norm(dim=1), torch.ones(64))
        assert json.loads((folder / "cfg.json").read_text())["metadata"]["training_architecture"] == "topk"
