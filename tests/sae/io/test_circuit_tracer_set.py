"""Sets of transcoders for circuit-tracer: round trips bit for bit, and refused sets."""

import dataclasses

import pytest
import torch
import yaml
from safetensors.torch import load_file

from coders import coder_of, parameters
from export_cases import coder, opened, rows, write
from olmoscope.errors import UserError
from olmoscope.release.convert import convert, convert_set
from olmoscope.sae.io.open import find_saes, open_sae
from olmoscope.sae.threshold import JumpReLU
from olmoscope.site import Site


def transcoder(layer, kind="jumprelu", ends="other", seed=0, normalize="none", reads="mlp.in", F=40, d_out=16):
    state = parameters(kind, 16, d_out, F, ends=ends, seed=seed, dtype=torch.float32)
    made = coder_of(kind, state, normalize, ends).at((Site(layer, reads),), (Site(layer, "mlp.out"),))
    return dataclasses.replace(opened(made), name=f"transcoder {layer}")


def relu(layer):
    made = transcoder(layer)
    return dataclasses.replace(made, sae=dataclasses.replace(made.sae, threshold=torch.zeros(40)))


@pytest.mark.parametrize(("kind", "ends", "normalize", "reads", "hook"), [
    ("topk", "other", "none", "mlp.in", "mlp.hook_in"), ("jumprelu", "skip", "none", "mid", "hook_resid_mid"),
    ("jumprelu", "other", "constant_norm_rescale", "mid", "ln2.hook_normalized"), ("relu", "other", "none", "mlp.in",
                                                                                   "mlp.hook_in")])
def test_a_set_is_the_same_after_a_round_trip(kind, ends, normalize, reads, hook, tmp_path):
    for layer in range(3):
        made = relu(layer) if kind == "relu" else transcoder(layer, kind, ends, layer, normalize, reads)
        first = write("circuit-tracer", made, tmp_path / "first")
        found, x_BD = open_sae(first), rows(torch.zeros(16))
        assert (found.sae.reads, found.sae.writes) == (made.sae.reads, made.sae.writes)
        ours_BD, there_BD = made.sae.reconstruct(x_BD)[0], found.sae.reconstruct(x_BD)[0]
        assert torch.allclose(ours_BD, there_BD, rtol=1e-5, atol=1e-5 * float(ours_BD.abs().max()))
    config = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert (config["model_kind"], config["feature_input_hook"], config["feature_output_hook"]) == (
        "transcoder_set", hook, "hook_mlp_out")
    assert config.get("k") == (4 if kind == "topk" else None)
    assert ("activation_function.threshold" in load_file(first)) == (kind == "jumprelu")
    assert convert(tmp_path / "first", "circuit-tracer", tmp_path / "second").note == "transcoders of 3 layers"
    assert len(find_saes(str(tmp_path / "second"))) == 3
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()


def test_a_layer_that_is_missing_is_named_and_an_earlier_set_goes(tmp_path):
    for layer in (0, 1, 2, 4):
        write("circuit-tracer", transcoder(layer), tmp_path / f"layer_{layer}")
    addresses = [str(tmp_path / f"layer_{layer}") for layer in (1, 4)]
    convert_set([str(tmp_path / "layer_2")], tmp_path / "set")
    assert convert_set(addresses, tmp_path / "set").note == (
        "transcoders of 2 layers; circuit-tracer needs one for every layer, and there is none for layer 0, 2, 3")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "config.yaml", "layer_1.safetensors", "layer_4.safetensors"]


def test_what_is_no_set_is_refused_before_anything_is_written(tmp_path):
    write("circuit-tracer", transcoder(0), tmp_path / "first")
    for name, other, told in (
            ("same", transcoder(0, seed=1), "is another transcoder of layer 0"),
            ("k", transcoder(1, "topk"),
             "the transcoders of a set must agree in activation; .* has none, .* has topk: leave one"),
            ("width", transcoder(1, F=24), "agree in latents; .* has 40, .* 24"),
            ("site", transcoder(1, reads="mid"), "agree in feature_input_hook; .* has mlp.hook_in")):
        write("circuit-tracer", other, tmp_path / name)
        with pytest.raises(UserError, match=told):
            convert_set([str(tmp_path / "first"), str(tmp_path / name)], tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("made", "told"), [
    (opened(coder("topk", "same", "layers.3")), "circuit-tracer replaces MLPs by transcoders"),
    (transcoder(1, "groupmax"), "circuit-tracer replaces MLPs by transcoders"),
    (transcoder(1, normalize="layer_norm"), r"circuit-tracer does not normalise rows \(layer_norm\)"),
    (transcoder(1, d_out=12), r"reads layers.1.mlp.in \(16\) and writes layers.1.mlp.out \(12\)")])
def test_what_it_cannot_express_is_refused(made, told, tmp_path):
    with pytest.raises(UserError, match=told):
        write("circuit-tracer", made, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    made = relu(0)
    assert isinstance(made.sae, JumpReLU)
    made.sae.W_enc[3, 2] = float("nan")
    with pytest.raises(UserError, match="W_enc of its SAE holds NaN or inf"):
        write("circuit-tracer", made, tmp_path / "folder")
