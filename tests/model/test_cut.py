"""A model is cut off above a layer only if its beginning computes the same."""

import pytest
import torch
import transformers

from helpers import read_streams
from olmoscope.errors import UserError
from olmoscope.model.cut import cut_config
from olmoscope.model.layers import find_layers
from olmoscope.model.load import load_model
from olmoscope.recipe.schema import Model
from olmoscope.site import Site

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}
CONFIGS = {
    "Llama": (True, lambda: transformers.LlamaConfig(**SIZES)),
    "Qwen3-MoE": (True, lambda: transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4,
                                                            num_experts_per_tok=2)),
    "Mamba": (True, lambda: transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=4,
                                                    state_size=8)),
    "Jamba": (None, lambda: transformers.JambaConfig(**SIZES, num_experts=2, use_mamba_kernels=False,
                                                     attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8,
                                                     mamba_dt_rank=4)),
    "GPT-Neo": (None, lambda: transformers.GPTNeoConfig(
        vocab_size=128, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]])),
    "Gemma 3 with a vision tower of three layers": (None, lambda: transformers.Gemma3Config(
        text_config={**SIZES, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4))}


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_those_of_the_whole_model(name, tmp_path):
    can_be_cut, make = CONFIGS[name]
    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_config(make()).eval()
    whole.save_pretrained(tmp_path)
    _, layers = find_layers(whole, 4)
    ids_BT = torch.randint(2, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    for deepest in range(4):
        want = read_streams(whole, layers, [deepest], ids_BT)[deepest]
        loaded = load_model(Model(name=str(tmp_path), dtype="float32"), [Site(deepest)], torch.device("cpu"))
        got = read_streams(loaded.module, loaded.layers, [deepest], ids_BT)[deepest]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert len(loaded.layers) == deepest + 1
        if can_be_cut:
            assert find_layers(loaded.module, max(2, deepest + 1))


def test_layers_of_several_streams_are_refused(tmp_path):
    config = transformers.Gemma3nTextConfig(
        **SIZES, head_dim=8, num_kv_shared_layers=2, vocab_size_per_layer_input=128, hidden_size_per_layer_input=8,
        laurel_rank=4, activation_sparsity_pattern=[0.0] * 4, layer_types=["sliding_attention", "full_attention"] * 2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"gives a tensor \[4, 2, 128, 32\], not rows"):
        load_model(Model(name=str(tmp_path), dtype="float32"), [Site(1)], torch.device("cpu"))


def test_a_config_is_left_as_it_is():
    config = transformers.LlamaConfig(**SIZES)
    assert cut_config(config, 1).num_hidden_layers == 2
    assert config.num_hidden_layers == 4
    assert cut_config(config, 3) is config
