"""SAEs of other activations than TopK: exported as the architecture that SAELens has for them, and validated by it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmoscope.errors import UserError
from olmoscope.release.agreement import threshold_difference
from olmoscope.release.build import build_release
from olmoscope.release.export import export_run
from olmoscope.release.validate import validate
from olmoscope.sae.io.open import open_sae
from olmoscope.site import Site
from release_runs import WIDTH, edit_json, make_out, recipe_for_tests, synthetic_rows

SAES = """[{layer: 3, d_sae: 96, k: 4, activation: batchtopk},
           {layer: 3, d_sae: 96, k: 4, activation: jumprelu, weights: untied},
           {layer: 7, d_sae: 96, k: 4, activation: jumprelu, normalize: layer_norm, matryoshka: [0.125, 0.5]},
           {layer: 7, d_sae: 96, k: 4, weights: untied, matryoshka: [0.25]}]"""
ROWS = {Site(layer): synthetic_rows(WIDTH, rows=300, seed=layer) for layer in (3, 7)}


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    out = make_out(tmp_path_factory.mktemp("variants") / "out", recipe_for_tests(SAES))
    build_release(out)
    return out


def test_every_variant_passes_every_check(released):
    validation = validate(released / "release", rows=ROWS)
    assert validation.passed and all(check.passed for check in validation.checks), validation.failures
    found = {}
    for path in (released / "release").rglob("cfg.json"):
        config = json.loads(path.read_text())
        found[path.parent.name] = (config["architecture"], config["metadata"]["training_architecture"], "k" in config)
    assert found == {"batchtopk_4_raw": ("jumprelu", "tied_batchtopk", False),
                     "jumprelu_4_raw_untied": ("jumprelu", "jumprelu", False),
                     "matryoshka-jumprelu_4_layernorm": ("jumprelu", "tied_matryoshka_jumprelu", False),
                     "matryoshka-topk_4_raw_untied": ("topk", "matryoshka_topk", True)}
    card = (released / "release" / "README.md").read_text()
    assert card.count("JumpReLU with") == 2 and "TopK: `z" in card and "Matryoshka" in card
    manifest = json.loads((released / "release" / "manifest.json").read_text())
    assert [sae["activation"] for sae in manifest["saes"]] == ["batchtopk", "jumprelu", "jumprelu", "topk"]


def test_what_is_exported_is_what_the_run_computes(released):
    for run in (released / "runs").glob("layer_*/*/*"):
        ours, theirs = open_sae(run), open_sae(run / "sae")
        x_BD = ROWS[ours.site]
        for one, other in zip(ours.sae.reconstruct(x_BD), theirs.sae.reconstruct(x_BD), strict=True):
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, other)
            else:
                assert torch.equal(one.to_dense() > 0, other.to_dense() > 0)
                assert 0 < one.l0().double().mean() < 48


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_a_wrong_threshold_is_caught(released, tmp_path, value):
    run = released / "runs" / "layer_03" / "width_96" / "jumprelu_4_raw_untied"
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (alone / name).write_bytes((run / "sae" / name).read_bytes())
    assert validate(alone, rows=ROWS).passed
    tensors = load_file(alone / "sae_weights.safetensors")
    folder = released.parent / f"copy {value}" / "out"
    make_out(folder, recipe_for_tests(SAES))
    path = export_run(folder / run.relative_to(released)).folder / "sae_weights.safetensors"
    tensors["threshold"] *= value
    save_file(tensors, path)
    names = {check.name for check in validate(path.parent, rows=ROWS).failures}
    assert {"tensors equal the checkpoint's", "same on real rows"} <= names


def test_another_architecture_than_was_trained_is_caught(released, tmp_path):
    folder = tmp_path / "out"
    make_out(folder, recipe_for_tests(SAES))
    run = folder / "runs" / "layer_03" / "width_96" / "batchtopk_4_raw"
    edit_json(export_run(run).folder / "cfg.json", lambda cfg: cfg.update(architecture="standard"))
    failed = {check.name for check in validate(run / "sae").failures}
    assert failed  # SAELens may not even load it: a standard SAE has no threshold
    edit_json(export_run(run).folder / "cfg.json", lambda cfg: cfg.update(architecture="jumprelu", d_sae=95))
    assert "loads in SAELens" in {check.name for check in validate(run / "sae").failures}


def test_a_latent_at_its_threshold_is_no_difference():
    threshold_F = torch.tensor([1.0, 2.0, 3.0])
    a_BF, b_BF = torch.tensor([[1.0000001, 0, 5]]), torch.tensor([[0, 0, 5.0]])
    assert float(threshold_difference(a_BF, b_BF, threshold_F)[0]) < 1e-6
    assert float(threshold_difference(a_BF, b_BF + torch.tensor([0, 2.5, 0]), threshold_F)[0]) == pytest.approx(0.5)
    assert threshold_difference(a_BF * torch.nan, b_BF, threshold_F)[0] == torch.inf


def test_group_max_is_refused_in_one_line(tmp_path):
    recipe = recipe_for_tests("[{layer: 3, d_sae: 96, k: 4, activation: groupmax}]")
    out = make_out(tmp_path / "out", recipe)
    run = out / "runs" / recipe.saes[0].id
    assert open_sae(run).sae.encode(ROWS[Site(3)]).l0().max() <= 4
    for refused in (lambda: export_run(run), lambda: build_release(out)):
        with pytest.raises(UserError, match="groupmax_4_raw cannot be exported: SAELens has no arch") as raised:
            refused()
        assert "\n" not in str(raised.value)
    assert not (out / "release").exists() and not (run / "sae").exists()
