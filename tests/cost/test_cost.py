"""What a forward pass costs: against hand counts, and against torch's own counter of FLOPs."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from helpers import ARCHITECTURES, small_model
from olmoscope.cost.model import mean_keys, model_cost

CHUNKS = [(512, 2048), (3500, 5000), (7000, 8192)]


def olmo3_7b():
    return transformers.Olmo3Config(
        vocab_size=100278, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, sliding_window=4096)


def test_olmo_3_7b_by_hand():
    cost = model_cost(olmo3_7b(), 31)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    assert cost.multiplied == 32 * layer
    norms = 4 * 4096  # after attention, after the MLP, of queries, of keys
    assert cost.parameters == 100278 * 4096 + 32 * (layer + norms) + 4096
    assert (cost.windows.count(4096), cost.windows.count(None), cost.attention_width) == (24, 8, 4096)
    assert all(cost.windows[layer] is None for layer in (7, 15, 23, 31))
    # About 14 GFLOP a token: 13 of matrices, the rest attention.
    assert 2 * cost.multiplied / 1e9 == pytest.approx(12.95, abs=0.01)
    assert cost.flops_per_token(CHUNKS) / 1e9 == pytest.approx(14.3, abs=0.1)
    assert cost.batch_bytes(16384, 4, 2) == 16384 * 2 * (8 * 4096 + 3 * 11008)


def test_only_layers_up_to_the_deepest_count():
    whole, cut = model_cost(olmo3_7b(), 31), model_cost(olmo3_7b(), 7)
    assert cut.multiplied * 4 == whole.multiplied
    assert cut.windows == whole.windows[:8]


@pytest.mark.parametrize("window", [100, None])
def test_a_window_without_kinds_of_layers_holds_for_all(window):
    config = transformers.MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
                                        sliding_window=window)
    assert not hasattr(config, "layer_types")
    assert model_cost(config, 1).windows == (window, window)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrices_equal_the_counter(architecture):
    """torch counts every matrix product of a real forward pass; attention's own are left out by the fused kernel."""
    model = small_model(architecture)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(input_ids=torch.zeros(2, 12, dtype=torch.long), use_cache=False)
    counted = sum(flops for operation, flops in counter.get_flop_counts()["Global"].items()
                  if "attention" not in str(operation))
    assert 2 * model_cost(model.config, 3).multiplied * 24 == counted
    assert model.config.get_text_config().num_hidden_layers == 4  # left as it was


def test_attention_equals_the_counter_but_for_causality():
    """Eager attention multiplies the whole square; a causal kernel, what `mean_keys` counts."""
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, pad_token_id=None, bos_token_id=1,
                                      eos_token_id=2)
    cost = model_cost(config, 1)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    length = 48
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    squares = sum(flops for operation, flops in counter.get_flop_counts()["Global"].items() if "bmm" in str(operation))
    attention = length * cost.flops_per_token([(length, length)]) - 2 * cost.multiplied * length
    assert attention == pytest.approx(squares * (length + 1) / 2 / length)


def test_experts_count_by_their_share():
    config = transformers.OlmoeConfig(hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                                      num_experts=8, num_experts_per_tok=2, vocab_size=512, eos_token_id=1)
    experts, attention, router = 8 * (2 * 64 * 32 + 64 * 32), 4 * 64 * 64, 8 * 64
    assert model_cost(config, 1).multiplied == 2 * (attention + router + experts * 2 / 8)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_mean_keys_by_counting(window):
    lengths = [*range(2, 5), *range(6, 12)]
    weights = [1 / 3] * 3 + [1 / 6] * 6
    keys = [sum(min(place + 1, window or length) for place in range(length)) for length in lengths]
    want = sum(w * k for w, k in zip(weights, keys, strict=True)) / sum(
        w * length for w, length in zip(weights, lengths, strict=True))
    assert mean_keys([(2, 4), (6, 11)], window) == pytest.approx(want)
