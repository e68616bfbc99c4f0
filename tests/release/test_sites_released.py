"""SAEs of every site, and transcoders: exported, validated by the real SAELens, and used as the card says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmoscope.errors import UserError
from olmoscope.release.build import build_release
from olmoscope.release.export import export_run
from olmoscope.release.validate import validate
from olmoscope.sae.io.open import open_sae
from olmoscope.site import Site
from release_runs import WIDTH, edit_json, make_out, recipe_for_tests, site_rows

IN, OUT = Site(3, "mlp.in"), Site(3, "mlp.out")
SITES = "[layers.3.mid, layers.3.mlp.in, layers.3.mlp.out, layers.3]"
TRANSCODER = "reads: layers.3.mlp.in, writes: layers.3.mlp.out, weights: untied, d_sae: 96, k: 4"
SAES = f"""[{{site: layers.3.mlp.out, d_sae: 96, k: 4}},
           {{{TRANSCODER}, name: batch, activation: batchtopk}},
           {{{TRANSCODER}, name: skip, activation: jumprelu, skip: true}},
           {{{TRANSCODER}, name: nested, activation: batchtopk, skip: true, matryoshka: [0.25]}},
           {{{TRANSCODER}, name: largest}}]"""
ROWS = {site: site_rows(site, WIDTH, rows=300) for site in (IN, OUT)}


def recipe(saes=SAES, sites=SITES):
    return recipe_for_tests(saes, activations__sites=sites)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    out = make_out(tmp_path_factory.mktemp("sites") / "out", recipe())
    build_release(out)
    return out


def test_every_coder_passes_every_check(released):
    validation = validate(released / "release", rows=ROWS)
    assert validation.passed and all(check.passed for check in validation.checks), validation.failures
    assert {check.name for check in validation.checks if check.sae == "skip"} >= {
        "same on real rows", "same on bfloat16 rows", "tensors equal the checkpoint's"}
    finite = [check.figure for check in validation.checks if check.name == "finite reconstructions"]
    assert len(finite) == 5 and all(re.search(r"real rows .*; NMSE \d\.", figure) for figure in finite), finite
    assert all(check.passed for check in validate(released / "release").checks)  # random rows
    alone = validate(released / "runs" / "skip" / "sae", rows={IN: ROWS[IN]})
    assert alone.passed and any("real rows are not finite" in check.figure and "NMSE" not in check.figure
                                for check in alone.checks)


def test_what_is_written_says_both_ends(released):
    found = {}
    for name in ("batch", "skip", "nested", "largest"):
        config = json.loads((released / "release" / name / "cfg.json").read_text())
        found[name] = (config["architecture"], config["metadata"]["training_architecture"])
        assert config["apply_b_dec_to_input"] is False
        assert {key: value for key, value in config["metadata"].items() if "hook" in key} == {
            "hook_name": "blocks.3.mlp.hook_in", "hf_hook_name": "model.layers.3.mlp.input",
            "hook_name_out": "blocks.3.hook_mlp_out",
            "hf_hook_name_out": "model.layers.3.post_feedforward_layernorm"}
    assert found == {"batch": ("jumprelu_transcoder", "batchtopk_transcoder"),
                     "skip": ("jumprelu_skip_transcoder", "jumprelu_skip_transcoder"),
                     "nested": ("jumprelu_skip_transcoder", "matryoshka_batchtopk_skip_transcoder"),
                     "largest": ("topk", "topk_transcoder")}
    saes = {sae["id"]: sae for sae in json.loads((released / "release" / "manifest.json").read_text())["saes"]}
    assert [saes["skip"][key] for key in ("site", "reads", "writes", "skip", "hf_hook_name", "hf_hook_name_out")] == [
        str(OUT), str(IN), str(OUT), True, "model.layers.3.mlp.input", "model.layers.3.post_feedforward_layernorm"]
    plain = saes["layer_03_mlp_out/width_96/topk_4_raw"]
    assert plain["hf_hook_name"] == "model.layers.3.post_feedforward_layernorm" and "writes" not in plain
    card = (released / "release" / "README.md").read_text()
    assert "1 sparse autoencoder (SAE) and 4 transcoders for `tiny`" in card
    assert "| layers.3.mlp.in | the input of `model.layers.3.mlp` | `blocks.3.mlp.hook_in` |" in card
    assert "hidden_states" not in card.replace('"hidden_states"', "").replace("'hidden_states'", "")
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", card, flags=re.S)):
        compile(block, f"block {number} of the card", "exec")


def test_what_is_exported_is_what_the_run_computes(released):
    for name in ("batch", "skip", "nested", "largest"):
        ours, theirs = open_sae(released / "runs" / name), open_sae(released / "runs" / name / "sae")
        assert (ours.reads, ours.writes) == (theirs.reads, theirs.writes) == ((IN,), (OUT,))
        torch.testing.assert_close(theirs.sae.reconstruct(ROWS[IN])[0], ours.sae.reconstruct(ROWS[IN])[0],
                                   rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "tensor", "change"), [
    ("skip", "W_skip", lambda W: W.add_(0.01)), ("skip", "W_dec", lambda W: W.mul_(1.01)),
    ("batch", "threshold", lambda t: t.mul_(1.5)), ("largest", "b_dec", lambda b: b.add_(1)),
    ("batch", "b_enc", lambda b: b.copy_(b.roll(1) + 0.1)),
])
def test_wrong_weights_are_caught(released, tmp_path, name, tensor, change):
    out = make_out(tmp_path / "out", recipe())
    path = export_run(out / "runs" / name).folder / "sae_weights.safetensors"
    tensors = load_file(path)
    change(tensors[tensor])
    save_file(tensors, path)
    failed = {check.name for check in validate(path.parent, rows=ROWS).failures}
    assert {"tensors equal the checkpoint's", "same on real rows"} <= failed


@pytest.mark.parametrize(("change", "name"), [
    (lambda cfg: cfg["metadata"].pop("hook_name_out"), "metadata survives"),
    (lambda cfg: cfg.pop("d_out"), "loads in SAELens"), (lambda cfg: cfg.update(d_out=31), "loads in SAELens"),
    (lambda cfg: cfg.update(apply_b_dec_to_input=True), "loads in SAELens"),
    (lambda cfg: cfg.update(normalize_activations="layer_norm"), "settings survive"),
])
def test_a_wrong_config_is_caught(tmp_path, change, name):
    out = make_out(tmp_path / "out", recipe(f"[{{{TRANSCODER}, name: skip, activation: jumprelu, skip: true}}]"))
    folder = export_run(out / "runs" / "skip").folder
    edit_json(folder / "cfg.json", change)
    assert name in {check.name for check in validate(folder, rows=ROWS).failures}


@pytest.mark.parametrize(("sae", "sites", "saying"), [
    ("{reads: [layers.3.mid, layers.3], d_sae: 96, k: 4}", "[layers.3.mid, layers.3]", "SAELens has no crosscoders"),
    (f"{{{TRANSCODER}, skip: true}}", SITES, "no TopK transcoder with a skip"),
])
def test_what_saelens_has_not_is_refused_before_anything(tmp_path, sae, sites, saying):
    (tmp_path / "recipe.yaml").write_text(recipe(f"[{sae}]", sites).to_yaml())
    with pytest.raises(UserError, match=saying) as refusal:
        build_release(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_run_that_does_not_know_the_module_is_refused(tmp_path):
    out = make_out(tmp_path / "out", recipe("[{site: layers.3.mlp.out, d_sae: 96, k: 4}]"))
    run = out / "runs" / "layer_03_mlp_out" / "width_96" / "topk_4_raw"
    edit_json(run / "done.json", lambda done: done["store"].pop("modules"))
    with pytest.raises(UserError, match=r"did not record the module .* where layers.3.mlp.out is") as caught:
        export_run(run)
    assert "\n" not in str(caught.value)


CHECK = """
captured = {captured}
for key, wanted in captured.items():
    assert torch.equal(seen[key], wanted), key
assert features.shape == (*seen["x"].shape[:2], 512) and 0 < features.count_nonzero(dim=-1).max()
assert torch.isfinite({result}).all() and {result}.shape == seen["{key}"].shape
"""
BY_HAND = """
import torch
from olmoscope.model.capture import read_sites
from olmoscope.model.load import load_model
from olmoscope.recipe.schema import Model
from olmoscope.site import Site
def at(tokens, *names):
    sites = [Site.parse(name) for name in names]
    loaded = load_model(Model(name="tiny", dtype="bfloat16"), sorted(sites), torch.device("cpu"))
    found = read_sites(loaded.module, list(loaded.sites.places.values()), tokens["input_ids"])
    return {key: found[site] for key, site in zip("xy", sites)}
"""


@pytest.mark.parametrize(("sae", "names", "result", "key"), [
    ("{site: layers.3.mlp.out, d_sae: 512, k: 8, name: one}", ["layers.3.mlp.out"], "reconstruction", "x"),
    ("{site: layers.3.mid, d_sae: 512, k: 8, name: one}", ["layers.3.mid"], "reconstruction", "x"),
    (f"{{{TRANSCODER.replace('96', '512')}, skip: true, activation: jumprelu, name: one}}",
     ["layers.3.mlp.in", "layers.3.mlp.out"], "written", "y"),
])
def test_the_cards_example_runs(hub_endpoint, tmp_path, sae, names, result, key):
    """Bit for bit, it sees what collection reads at the site."""
    out = make_out(tmp_path / "out", recipe(f"[{sae}]"), d_model=256)
    build_release(out)
    hub_endpoint.add("model", "your-name/olmoscope-tiny-saes", out / "release")
    by_name, _ = re.findall(r"```python\n(.*?)```", (out / "release" / "README.md").read_text(), flags=re.S)
    check = CHECK.format(captured=f"at(tokens, *{names})", result=result, key=key)
    done = subprocess.run([sys.executable, "-c", f"{BY_HAND}\n{by_name}\n{check}"], capture_output=True, text=True,
                          env=hub_endpoint.environment(tmp_path / "hf") | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
