"""The SAE folder of a run is exactly in SAELens' format, is made once, and is made again if damaged."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from olmoscope.errors import UserError
from olmoscope.release.build import build_release
from olmoscope.release.export import export_run
from olmoscope.sae.io import saelens
from olmoscope.sae.io.checkpoint import read_checkpoint
from olmoscope.sae.io.place import Here
from olmoscope.sae.io.saelens_places import hook_names
from olmoscope.site import Site
from olmoscope.train.initialize import initialize
from release_runs import LAYER_NORM, RAW, edit_json


def test_folder_is_what_saelens_reads(out):
    for sae_id, normalize, layer in ((RAW, "none", 3), (LAYER_NORM, "layer_norm", 7)):
        exported = export_run(out / "runs" / sae_id)
        assert exported.written and exported.folder == out / "runs" / sae_id / "sae"
        config = json.loads((exported.folder / "cfg.json").read_text())
        metadata = config.pop("metadata")
        assert config == {"architecture": "topk", "d_in": 32, "d_sae": 96, "k": 4, "dtype": "float32", "device": "cpu",
                          "apply_b_dec_to_input": True, "normalize_activations": normalize,
                          "reshape_activations": "none", "rescale_acts_by_decoder_norm": False}
        assert metadata == {
            "sae_lens_version": "6.54.12", "sae_lens_training_version": None, "training_architecture": "tied_topk",
            "model_name": "tiny", "model_revision": "sha256:0123", "hook_name": f"blocks.{layer}.hook_resid_post",
            "hf_hook_name": f"model.layers.{layer}", "context_size": 512, "prepend_bos": False,
            "dataset_path": "modules, questions", "training_tokens": 4096, "l0": 3.875, "num_dead_features": 6,
            "dead_window": 1000, "olmoscope_version": "0.1.0", "olmoscope_run": metadata["olmoscope_run"]}
        sae = read_checkpoint(out / "runs" / sae_id / "checkpoints" / "step-00000008.safetensors")
        tensors = load_file(exported.folder / "sae_weights.safetensors")
        assert {name: (tensor.dtype, tensor.is_contiguous()) for name, tensor in tensors.items()} == dict.fromkeys(
            ("W_enc", "b_enc", "W_dec", "b_dec"), (torch.float32, True))
        assert torch.equal(tensors["W_dec"], sae.W_dec) and torch.equal(tensors["W_enc"], sae.W_enc.T)
        assert torch.equal(tensors["b_enc"], sae.b_latent) and torch.equal(tensors["b_dec"], sae.b_out)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("d_sae", "d_model"), [(1, 8), (8, 1), (1, 1)])
def test_one_latent_and_width_one(tmp_path, tied, d_sae, d_model):
    """Such a matrix is its own transpose in memory, so both matrices of a tied SAE would share it."""
    from sae_lens import SAE

    sae = initialize(d_model, d_sae, 1, "none", torch.zeros(d_model), seed=0, tied=tied)
    metadata = {"model_name": "tiny", **hook_names("model.layers", Site(3)), "prepend_bos": False}
    assert saelens.write(sae, tmp_path / "sae", metadata) and not saelens.write(sae, tmp_path / "sae", metadata)
    tensors = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert torch.equal(tensors["W_enc"], sae.W_enc.T) and torch.equal(tensors["W_dec"], sae.W_dec)
    read, theirs = saelens.read(Here(tmp_path / "sae")).sae, SAE.load_from_disk(tmp_path / "sae")
    x_BD = torch.randn(20, d_model)
    torch.testing.assert_close(read.reconstruct(x_BD)[0], sae.reconstruct(x_BD)[0])
    torch.testing.assert_close(theirs(x_BD), sae.reconstruct(x_BD)[0])


def test_dead_latents_that_nobody_could_count_are_null(out):
    edit_json(out / "runs" / RAW / "done.json", lambda done: done.update(dead_share=None))
    metadata = json.loads((export_run(out / "runs" / RAW).folder / "cfg.json").read_text())["metadata"]
    assert metadata["num_dead_features"] is None and metadata["dead_window"] == 1000
    build_release(out)
    sae = json.loads((out / "release" / "manifest.json").read_text())["saes"][0]
    assert sae["metrics"]["training"]["dead"] == {"share": None, "window": 1000}


def test_exporting_again_changes_nothing(out):
    folder = export_run(out / "runs" / RAW).folder
    before = {path: path.stat().st_ino for path in folder.iterdir()}
    assert not export_run(out / "runs" / RAW).written
    assert {path: path.stat().st_ino for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-9], lambda content: content + b"x"])
def test_a_damaged_export_is_made_again(out, name, damage):
    path = export_run(out / "runs" / RAW).folder / name
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert export_run(out / "runs" / RAW).written
    assert path.read_bytes() == before


def test_an_export_that_was_killed_leaves_no_sae(out, monkeypatch):
    export_run(out / "runs" / RAW)
    edit_json(out / "runs" / RAW / "sae" / "cfg.json", lambda config: config.update(k=5))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("olmoscope.sae.io.saelens.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_run(out / "runs" / RAW)
    assert not (out / "runs" / RAW / "sae" / "cfg.json").exists()
    monkeypatch.undo()
    assert export_run(out / "runs" / RAW).written


def test_mistakes_get_one_line(out, tmp_path):
    run = out / "runs" / RAW

    def refused(saying: str) -> None:
        with pytest.raises(UserError, match=saying) as caught:
            export_run(run)
        assert "\n" not in str(caught.value)
        assert not (run / "sae").exists()

    done = (run / "done.json").read_text()
    (run / "done.json").unlink()
    refused("is not finished")
    for change, saying in (
        (lambda tree: tree.pop("dead_share"), "done.json: dead_share: Field required"),
        (lambda tree: tree.update(l0="nan"), "done.json: l0: Input should be a finite number"),
        (lambda tree: tree.update(run_hash="0"), "another recipe"),
        (lambda tree: tree.update(sae="layer_99/x"), "mixes two runs"),
        (lambda tree: tree.update(checkpoint="checkpoints/gone.safetensors"), "gone.safetensors is missing"),
        (lambda tree: tree["store"]["model"].update(d_model=64), "holds another SAE"),
        (lambda tree: tree["store"]["model"].pop("layers_path"), "store.model.layers_path"),
    ):
        (run / "done.json").write_text(done)
        edit_json(run / "done.json", change)
        refused(saying)
    (run / "done.json").write_text("{")
    refused("done.json is damaged")
    (run / "recipe.yaml").unlink()
    refused("is not a run folder")


def test_weights_that_are_not_finite_are_refused(out):
    run = out / "runs" / RAW
    path = run / "checkpoints" / "step-00000008.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors["b_latent"][3] = torch.nan
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match="b_latent holds NaN or inf, so the SAE cannot be used; train it again"):
        export_run(run)
    assert not (run / "sae").exists()
