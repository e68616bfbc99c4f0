"""The final norm and unembedding of several architectures, against the whole model's own modules."""

import pytest
import torch
import transformers

from helpers import ARCHITECTURES, save_small_model
from olmoscope.errors import UserError
from olmoscope.model.unembed import final_norm, load_unembedding
from olmoscope.recipe import Model

FINAL_NORMS = {"GPT2": "transformer.ln_f", "Gemma3": "model.norm"}


def logits(unembedding, directions_CD):
    return unembedding.through_norm(directions_CD) @ unembedding.U_VD.T


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_a_direction(architecture, tmp_path):
    """U (weight ⊙ direction), the weight taken from the model's norm by what it does: to a row of size 1, where an RMS
    norm multiplies by its weight and nothing else."""
    folder = save_small_model(architecture, tmp_path)
    causal = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    norm = causal.get_submodule(FINAL_NORMS.get(architecture, "model.norm"))
    with torch.no_grad():  # fresh weights are all ones
        norm.weight.uniform_(-2, 2, generator=torch.Generator().manual_seed(1))
    causal.save_pretrained(folder)
    unembedding = load_unembedding(Model(name=str(folder), dtype="float32"), torch.device("cpu"))
    assert unembedding.centres == (architecture == "GPT2")
    assert unembedding.tied == bool(causal.config.tie_word_embeddings)
    directions_CD = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    if unembedding.centres:
        directions_CD -= directions_CD.mean(1, keepdim=True)
        scale_C1 = directions_CD.std(1, keepdim=True, unbiased=False)
    else:
        scale_C1 = directions_CD.square().mean(1, keepdim=True).sqrt()
    with torch.no_grad():
        normal_CD = norm(directions_CD) - (norm.bias if unembedding.centres else 0)
        expected_CV = causal.get_output_embeddings()(normal_CD * scale_C1)
    torch.testing.assert_close(logits(unembedding, directions_CD), expected_CV, rtol=1e-4, atol=1e-4)
    shifted_CV = logits(unembedding, directions_CD + 5)
    assert torch.allclose(shifted_CV, expected_CV, atol=1e-3) == unembedding.centres
    assert logits(unembedding.of_first(100), directions_CD).shape == (3, 100)


def test_a_model_without_one_final_norm_is_refused():
    layers = torch.nn.ModuleList([torch.nn.LayerNorm(8)])
    with pytest.raises(UserError, match=r"cannot tell which module .* final norm .candidates: none"):
        final_norm(torch.nn.ModuleDict({"layers": layers}), 8)
    with pytest.raises(UserError, match="candidates: one, two"):
        final_norm(torch.nn.ModuleDict({"one": torch.nn.LayerNorm(8), "two": torch.nn.LayerNorm(8)}), 8)


def test_a_model_that_is_not_there_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot load model"):
        load_unembedding(Model(name=str(tmp_path)), torch.device("cpu"))
