"""Our own runs: a checkpoint gives exactly the SAE that was trained; a folder that mixes runs is refused."""

import shutil

import pytest
import torch

from olmoscope.errors import UserError
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.io.checkpoint import read_checkpoint
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.train.adam import Adam
from olmoscope.train.checkpoint import save_checkpoint
from olmoscope.train.initialize import initialize
from olmoscope.train.step import Step
from release_runs import RAW, WIDTH, edit_json, make_out, synthetic_rows


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("activation", "kind"), [("topk", TopK), ("groupmax", GroupMax), ("batchtopk", JumpReLU),
                                                  ("jumprelu", JumpReLU)])
def test_what_is_written_is_read_bit_by_bit(tmp_path, activation, kind, tied):
    step = Step(initialize(WIDTH, 96, 4, "layer_norm", torch.zeros(WIDTH), seed=0, tied=tied),
                Adam((0.9, 0.999), 1e-8), activation=activation)
    for _ in range(3):
        step(synthetic_rows(WIDTH), lr=1e-3)
    save_checkpoint(tmp_path / "step.safetensors", step, {})
    sae, trained = read_checkpoint(tmp_path / "step.safetensors"), step.sae
    assert type(sae) is kind and sae.normalize == "layer_norm" and (sae.W_enc is sae.W_dec) == tied
    for name in ("W_enc", "W_dec", "b_latent", "b_in"):
        assert torch.equal(getattr(sae, name), getattr(trained, name))
    if activation == "jumprelu":
        assert torch.equal(sae.threshold, step.rule.log_threshold_F.exp())
    if activation == "batchtopk":
        assert torch.equal(sae.threshold, step.rule.threshold.float().expand(96))


def test_a_run_is_read_whole_or_refused(tmp_path):
    out = make_out(tmp_path / "out")
    run = out / "runs" / RAW
    opened = open_sae(run)
    sae = read_checkpoint(run / "checkpoints" / "step-00000008.safetensors")
    assert torch.equal(opened.sae.W_dec, sae.W_dec) and torch.equal(opened.sae.b_latent, sae.b_latent)
    assert (opened.architecture, opened.dtype, opened.model_revision, opened.model_layers) == (
        "topk", torch.float32, "sha256:0123", 8)
    for number, (change, saying) in enumerate((
            (lambda tree: tree.update(run_hash="0"), "belongs to another recipe than recipe.yaml"),
            (lambda tree: tree.update(sae="layer_99/x"), "which recipe.yaml does not hold"),
            (lambda tree: tree["store"]["model"].update(d_model=64), "holds another SAE"),
            (lambda tree: tree.pop("checkpoint"), "done.json: checkpoint: Field required"),
            (lambda tree: tree.update(checkpoint="checkpoints/gone.safetensors"), "gone.safetensors is missing"))):
        copy = shutil.copytree(run, tmp_path / str(number))
        edit_json(copy / "done.json", change)
        with pytest.raises(UserError, match=saying) as refusal:
            open_sae(copy)
        assert "\n" not in str(refusal.value)
    edit_json(run / "done.json", lambda tree: tree.pop("dead_share"))
    assert open_sae(run).identity == opened.identity  # a figure that only a release needs
