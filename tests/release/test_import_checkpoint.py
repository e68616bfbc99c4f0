"""Checkpoints of the reference trainer give the same SAE; bad files, and files that would run code, get one line."""

import os
import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from olmoscope.errors import UserError
from olmoscope.release.import_checkpoint import import_checkpoint
from olmoscope.release.validate import validate
from reference_checkpoint import INPUTS, LATENTS, K, checkpoint


@pytest.fixture
def imported(tmp_path):
    def do(tree, folder="sae", **arguments):
        path = tmp_path / "checkpoint.pt"
        torch.save(tree, path)
        return import_checkpoint(path, tmp_path / folder, **{"model_name": "allenai/Olmo-3-7B-Think"} | arguments)
    return do


def forward(tree: dict, x_BD: torch.Tensor) -> torch.Tensor:
    """The reference trainer's own forward pass, from the definition."""
    model = tree["model"]
    if tree["normalize"] is True:
        mean, x_BD = x_BD.mean(-1, keepdim=True), x_BD - x_BD.mean(-1, keepdim=True)
        std = x_BD.std(-1, keepdim=True)
        x_BD = x_BD / (std + 1e-5)
    pre_BF = (x_BD - model["pre_bias"]) @ model["encoder.weight"].T + model["latent_bias"]
    top = pre_BF.topk(K, dim=-1)
    z_BF = torch.zeros_like(pre_BF).scatter(-1, top.indices, top.values.relu())
    xhat_BD = z_BF @ model["encoder.weight"] + model["pre_bias"]
    return xhat_BD * std + mean if tree["normalize"] is True else xhat_BD


@pytest.mark.parametrize(("normalize", "expected"), [(False, "none"), (True, "layer_norm")])
def test_saelens_computes_what_the_trainer_did(imported, normalize, expected):
    from sae_lens import SAE
    tree = checkpoint(normalize=normalize)
    result = imported(tree)
    assert (result.written, result.layer, result.d_sae, result.d_model, result.k) == (True, 15, LATENTS, INPUTS, K)
    assert result.normalize == expected and result.notes == []
    tensors = load_file(result.folder / "sae_weights.safetensors")
    assert torch.equal(tensors["W_dec"], tree["model"]["encoder.weight"])
    sae = SAE.load_from_disk(result.folder)
    assert sae.cfg.metadata.hook_name == "blocks.15.hook_resid_post"
    assert sae.cfg.metadata.hf_hook_name == "model.layers.15"
    assert sae.cfg.metadata.training == {"batch_size": 256, "lr": 3e-4, "mean_loss": 0.3033}
    x_BD = 3 * torch.randn(64, INPUTS) + 1
    with torch.no_grad():
        torch.testing.assert_close(sae(x_BD), forward(tree, x_BD), rtol=1e-5, atol=1e-5)
    assert validate(result.folder).passed


def test_importing_again_writes_nothing_and_another_is_refused(imported):
    assert imported(checkpoint()).written
    assert not imported(checkpoint()).written
    with pytest.raises(UserError, match="already holds another SAE"):
        imported(checkpoint(model={"latent_bias": torch.zeros(LATENTS)}))


@pytest.mark.parametrize("changes", [
    {"normalize": "layer_norm"}, {"normalize": "none"}, {"normalize": "raw"}, {"normalize": "LayerNorm"},
    {"top_k": None}, {"n_inputs": None, "n_latents": None}, {"mean_loss": float("nan")},
    {"mean_loss": torch.tensor(0.3)},
    {"model": {"activation_state_dict": OrderedDict(k=torch.tensor(K), postact_fn="ReLU()")}},
    {"model": {"stats_last_nonzero": None}},
    {"model": {"activation_state_dict": {"k": K, "postact_fn": "torch.nn.ReLU"}}},
    {"model": {"encoder.weight": nn.Parameter(torch.eye(LATENTS)[:, :INPUTS])}},
], ids=str)
def test_reasonable_forms_are_accepted(imported, changes):
    assert imported(checkpoint(**changes)).written


def test_a_tied_decoder_may_stand_there(imported):
    W_FD = checkpoint()["model"]["encoder.weight"]
    assert imported(checkpoint(model={"decoder.weight": W_FD.T.contiguous()}), "a").written
    assert imported(checkpoint(model={"decoder.linear.weight": W_FD}), "b").written
    with pytest.raises(UserError, match=r"decoder.weight differs from encoder.weight: the SAE is not tied"):
        imported(checkpoint(model={"decoder.weight": 2 * W_FD.T}), "c")


def test_rows_off_unit_norm_are_reported_and_kept(imported):
    W_FD = checkpoint()["model"]["encoder.weight"].clone()
    W_FD[:2] *= torch.tensor([[0.5], [2.0]])
    result = imported(checkpoint(model={"encoder.weight": W_FD}))
    assert result.notes == ["2 of 48 decoder rows do not have unit norm (0.5 to 2); they were kept as they are"]
    assert torch.equal(load_file(result.folder / "sae_weights.safetensors")["W_dec"], W_FD)
    assert validate(result.folder).passed


def state(**changes):
    return {"model": {"activation_state_dict": {"k": K, "postact_fn": "ReLU"} | changes}}


@pytest.mark.parametrize(("changes", "saying"), [
    ({"model": {"encoder.weight": None}}, "model has no encoder.weight"),
    ({"model": {"pre_bias": None}}, "model has no pre_bias"),
    ({"model": {"activation_state_dict": None}}, "model has no activation_state_dict"),
    ({"model": {"threshold": torch.zeros(LATENTS)}}, "model has 'threshold', which a tied TopK autoencoder does not"),
    ({"model": {"pre_bias": torch.zeros(INPUTS + 1)}}, "pre_bias says 17, encoder.weight is \\[48, 16\\]"),
    ({"model": {"latent_bias": torch.zeros(LATENTS, 1)}}, "latent_bias must be a floating-point tensor of 1 dim"),
    ({"model": {"pre_bias": [0.0] * INPUTS}}, "pre_bias must be a floating-point tensor of 1 dimensions, not list"),
    ({"model": {"encoder.weight": torch.ones(LATENTS, INPUTS, dtype=torch.int64)}}, "must be a floating-point tensor"),
    ({"model": {"latent_bias": torch.full((LATENTS,), torch.nan)}}, "latent_bias holds NaN or inf"),
    ({"n_latents": 49}, "n_latents says 49"),
    ({"top_k": 6}, "top_k is 6, activation_state_dict.k is 5"),
    ({"model": {"activation": "ReLU"}}, "activation is 'ReLU'; only TopK"),
    ({"model": {"activation": "BatchTopK"}}, "activation is 'BatchTopK'; only TopK"),
    (state(postact_fn="Identity"), "postact_fn is 'Identity'"),
    (state(k=0), "k is 0, which is not between 1 and 48"),
    (state(k=49), "k is 49, which is not between 1 and 48"),
    (state(k=2.5), "k must be a whole number, not 2.5"),
    (state(k=True), "k must be a whole number, not True"),
    ({"model": {"activation_state_dict": {"k": K}}}, "activation_state_dict has no postact_fn"),
    ({"normalize": None}, "does not say `normalize`"),
    ({"normalize": "batch"}, "normalize is 'batch'; it must be one of"),
    ({"normalize": 1}, "normalize is 1; it must be one of"),
    ({"layer": None}, "does not say which layer"),
    ({"layer": -1}, "layer -1 does not exist"),
    ({"layer": "7"}, "layer must be a whole number, not '7'"),
])
def test_what_is_wrong_is_named(imported, tmp_path, changes, saying):
    with pytest.raises(UserError, match=saying) as caught:
        imported(checkpoint(**changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sae").exists()


def test_the_layer_may_be_given(imported):
    assert imported(checkpoint(layer=None), layer=3, layers_path="transformer.h").layer == 3
    assert imported(checkpoint(), "b", layer=15).layer == 15
    with pytest.raises(UserError, match=r"was trained on layers\.15, not layers\.3"):
        imported(checkpoint(), "c", layer=3)


class Runs:
    """An object that would create a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda tree, path: path.write_bytes(pickle.dumps(tree)),
                                  lambda tree, path: torch.save(tree, path, _use_new_zipfile_serialization=False)])
def test_code_in_a_file_is_not_executed(tmp_path, save):
    save(checkpoint(extra=Runs(tmp_path / "ran")), tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"was refused: .*execute code of its own") as caught:
        import_checkpoint(tmp_path / "evil.pt", tmp_path / "sae", model_name="m")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "sae").exists()


def test_a_pickled_module_is_named(imported):
    with pytest.raises(UserError, match=r"execute code of its own \(torch.nn.modules.activation.ReLU\)"):
        imported(checkpoint(**state(postact_fn=nn.ReLU())))


def test_files_that_are_no_checkpoints(tmp_path):
    good = tmp_path / "good.pt"
    torch.save(checkpoint(), good)
    whole = good.read_bytes()
    noise = bytes(torch.randint(256, (2000,), generator=torch.Generator().manual_seed(0)).tolist())
    cases = {"empty": b"", "text": b"hello world, this is a text", "half": whole[: len(whole) // 2], "dot": b".",
             "zip": b"PK\3\4xx", "noise": noise, "cut": whole[:-20]}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            import_checkpoint(tmp_path / name, tmp_path / "sae", model_name="m")
        assert "\n" not in str(caught.value)
    for path, saying in ((tmp_path / "nothing", "is missing"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=saying):
            import_checkpoint(path, tmp_path / "sae", model_name="m")
    torch.save([1, 2], good)
    with pytest.raises(UserError, match="holds a list"):
        import_checkpoint(good, tmp_path / "sae", model_name="m")
    torch.save({"weights": 1}, good)
    with pytest.raises(UserError, match="no mapping `model`"):
        import_checkpoint(good, tmp_path / "sae", model_name="m")
