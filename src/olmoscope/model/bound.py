"""How large the residual stream can get at most, from the weights alone.

If a model adds only the normed outputs of attention and MLP to the residual stream, each step adds γ·u with u an
RMS-normalised vector, and |u_i| ≤ √d for every input. So after layer L, for each channel

    |x| ≤ max over tokens |embedding| + Σ_{l ≤ L} √d (|γ_attention,l| + |γ_mlp,l|).

Rounding can make a number larger than its exact value. For each of the four rounded steps of a sublayer (the norm's
statistics, normalise, weight, add), the bound has a factor 1 + eps of the model's dtype, twice what rounding to nearest
can add.
"""

import math

import torch
from torch import Tensor, nn

from olmoscope.model.load import LoadedModel
from olmoscope.site import Site

PROVABLE = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
"""Architectures that add only the embedding and the outputs of two norms per layer to the residual stream."""


def bounds_of(model: LoadedModel) -> dict[Site, float]:
    """A proven bound on max|x| at each of the model's sites that has one."""
    bounds = residual_bound(model.module, model.layers, model.architecture)
    return {site: bounds[site.layer] for site in model.sites.widths if bounds and site.is_layer_output}


@torch.no_grad()
def residual_bound(module: nn.Module, layers: nn.ModuleList, architecture: str) -> list[float] | None:
    """A proven bound on max|x| after each layer, or None for an architecture without a known bound.

    Args:
        module: the decoder that holds `layers`, with its embedding.
    """
    if architecture not in PROVABLE:
        return None
    embedding_VD: Tensor = module.get_input_embeddings().weight  # type: ignore[operator]
    rounding = 1 + torch.finfo(embedding_VD.dtype).eps
    root = math.sqrt(embedding_VD.shape[1])
    bound_D = embedding_VD.abs().amax(dim=0).double()
    bounds = []
    for layer in layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            gamma_D = norm.weight.abs().double()  # type: ignore[union-attr, operator]
            bound_D = (bound_D + root * gamma_D * rounding**3) * rounding
        bounds.append(float(bound_D.max()))
    return bounds
