"""The final norm and unembedding of several architectures, against the whole model's own modules."""

import pytest
import torch
import transformers

from helpers import ARCHITECTURES, save_small_model
from olmoscope.errors import UserError
from olmoscope.model.unembed import NoUnembedding, load_unembedding
from olmoscope.recipe.schema import Model

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
    assert (unembedding.norm == "layer") == (architecture == "GPT2")
    assert unembedding.tied == bool(causal.config.tie_word_embeddings)
    directions_CD = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    if unembedding.norm == "layer":
        directions_CD -= directions_CD.mean(1, keepdim=True)
        scale_C1 = directions_CD.std(1, keepdim=True, unbiased=False)
    else:
        scale_C1 = directions_CD.square().mean(1, keepdim=True).sqrt()
    with torch.no_grad():
        normal_CD = norm(directions_CD) - (norm.bias if unembedding.norm == "layer" else 0)
        expected_CV = causal.get_output_embeddings()(normal_CD * scale_C1)
    torch.testing.assert_close(logits(unembedding, directions_CD), expected_CV, rtol=1e-4, atol=1e-4)
    shifted_CV = logits(unembedding, directions_CD + 5)
    assert torch.allclose(shifted_CV, expected_CV, atol=1e-3) == (unembedding.norm == "layer")
    assert logits(unembedding.of_first(100), directions_CD).shape == (3, 100)


def load(config, tmp_path, change=None):
    torch.manual_seed(0)
    causal = transformers.AutoModelForCausalLM.from_config(config).eval()
    if change:
        change(causal)
    causal.save_pretrained(tmp_path)
    return causal, load_unembedding(Model(name=str(tmp_path), dtype="float32"), torch.device("cpu"))


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


def test_a_norm_that_centres_without_being_a_layer_norm_and_logits_that_are_scaled(tmp_path):
    """Cohere's norm subtracts the mean and has no bias; its head scales the logits, which does not count here."""
    def change(causal):
        causal.model.norm.weight.data.uniform_(-2, 2)

    causal, unembedding = load(transformers.CohereConfig(**SIZES, intermediate_size=48), tmp_path, change)
    assert unembedding.norm == "layer"
    torch.testing.assert_close(unembedding.weight_D, causal.model.norm.weight.data, rtol=1e-5, atol=1e-5)


def test_a_norm_without_weight(tmp_path):
    _, unembedding = load(transformers.OlmoConfig(**SIZES, intermediate_size=48), tmp_path)
    assert unembedding.norm == "layer"
    torch.testing.assert_close(unembedding.weight_D, torch.ones(32), rtol=1e-5, atol=1e-5)


def test_a_second_norm_before_the_layers_is_not_taken_for_the_final_one(tmp_path):
    def change(causal):
        causal.transformer.ln_f.weight.data.uniform_(-2, 2)

    causal, unembedding = load(transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), tmp_path,
                               change)
    torch.testing.assert_close(unembedding.weight_D, causal.transformer.ln_f.weight.data, rtol=1e-5, atol=1e-5)


def test_no_final_norm_at_all(tmp_path):
    config = transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False)
    _, unembedding = load(config, tmp_path)
    assert unembedding.norm == "no" and str(unembedding) == "tied unembedding, no final norm; without later layers"
    assert torch.equal(unembedding.weight_D, torch.ones(32))


def test_a_head_that_does_not_read_the_residual_stream(tmp_path):
    with pytest.raises(NoUnembedding, match="does not read the residual stream: it reads 16 values of 32"):
        load(transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16), tmp_path)


def test_a_model_that_is_not_there_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot load model"):
        load_unembedding(Model(name=str(tmp_path)), torch.device("cpu"))
