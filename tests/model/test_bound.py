"""The bound on the residual stream from weights alone holds where it is nearly reached, and is absent elsewhere."""

import pytest
import torch

from helpers import ARCHITECTURES, read_streams, small_model
from olmoscope.model.bound import residual_bound
from olmoscope.model.layers import find_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_holds_and_is_not_far_off(dtype, seed):
    model = small_model("Olmo3", seed).to(dtype)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight.copy_(torch.randn(32, generator=random))
            # nearly rank one: the norm's whole output falls into few channels, as near to the bound as it gets
            layer.mlp.down_proj.weight[1:] *= 1e-3
            layer.self_attn.o_proj.weight[1:] *= 1e-3
    layers = find_layers(model, 4)[1]
    bounds = residual_bound(model.model, layers, "Olmo3ForCausalLM")
    tokens_BT = torch.randint(2, 4096, (8, 200), generator=random)
    outputs = read_streams(model, layers, [0, 1, 2, 3], tokens_BT)
    for layer, bound in enumerate(bounds):
        assert outputs[layer].abs().max() <= bound
    assert outputs[0].abs().max() > 0.2 * bounds[0]
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "Olmo3"])
def test_nothing_is_claimed_for_other_architectures(architecture):
    model = small_model(architecture)
    assert residual_bound(model, find_layers(model, 4)[1], type(model).__name__) is None
