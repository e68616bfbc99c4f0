"""What a forward pass up to a layer costs (parameters, FLOPs, memory), from the model's config, without weights.

The model is built on torch's `meta` device, cut off above the deepest layer, and its parameters are counted. A multiply
and an add are two FLOPs. For each token:

    2 · (parameters of matrices in the layers)      every matrix multiplies each token once; the embedding is looked up,
                                                    and norms and biases are not counted (under 0.1%)
    + Σ over layers 4 · keys · heads · head_dim     q·k and the weighted sum of v over the keys that a token sees

Token t of a sequence sees t keys, or at most as many as the window has in a layer with a sliding window. Keys that a
causal kernel skips are not counted. Tokens see fewer keys if documents are kept apart; this is ignored. In a mixture of
experts, the experts' matrices count in proportion to the share of experts that a token passes through.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from olmoscope.model.blueprint import blueprint
from olmoscope.model.cut import cut_config
from olmoscope.model.layers import find_layers
from olmoscope.site import Site


@dataclass(frozen=True)
class ModelCost:
    """A decoder cut off above the deepest layer wanted."""

    d_model: int
    layers: int
    """How many layers run: the deepest one wanted and those below it."""
    parameters: int
    """All parameters that are loaded, including the embedding."""
    multiplied: float
    """Parameters that multiply each token."""
    attention_width: int
    """heads · head_dim."""
    windows: tuple[int | None, ...]
    """For each layer, the most keys that a token sees; None for all."""
    widest: int
    """The widest matrix of a layer: in most models the MLP's."""

    def flops_per_token(self, chunk_lengths: list[tuple[int, int]]) -> float:
        """Mean FLOPs per token.

        Args:
            chunk_lengths: as in a recipe: buckets of sequence lengths, a bucket drawn at random, then a length in it.
        """
        keys = sum(mean_keys(chunk_lengths, window) for window in self.windows)
        return 2 * self.multiplied + 4 * self.attention_width * keys

    def batch_bytes(self, tokens: int, kept: int, bytes_each: int) -> int:
        """Bytes of activations that are allocated at the peak of a forward pass.

        The peak is in an MLP: the residual stream, its normed copy and the residual (4 widths, with room for the output
        of attention); gate, activated gate and product (3 times the widest matrix); and the outputs kept from the
        layers wanted.

        Args:
            tokens: tokens of the batch, padding included.
            kept: how many layers' outputs are kept.
            bytes_each: bytes of a number in the model's dtype.
        """
        return tokens * bytes_each * ((4 + kept) * self.d_model + 3 * self.widest)


def model_cost(config: Any, deepest: int, *, whole: bool = False) -> ModelCost:
    """Count a model's parameters and operations.

    Args:
        config: the whole config of transformers; it is not changed.
        deepest: the deepest layer that runs, counted from 0.
        whole: whether the whole model is loaded, including the layers above the deepest one.

    Raises:
        UserError: its layers cannot be found.
    """
    config = config if whole else cut_config(config, deepest)
    text = config.get_text_config()
    module = blueprint(config).base_model
    layers = find_layers(module, text.num_hidden_layers)[1][: deepest + 1]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    share = _expert_share(text)
    matrices = [(name, parameter) for name, parameter in layers.named_parameters() if parameter.dim() >= 2]
    return ModelCost(
        d_model=text.hidden_size,
        layers=deepest + 1,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        multiplied=sum(parameter.numel() * (share if ".experts." in name else 1) for name, parameter in matrices),
        attention_width=text.num_attention_heads * head_dim,
        windows=tuple(_windows(text, layers)),
        widest=max(max(parameter.shape[-2:]) for _, parameter in matrices))


def mean_keys(chunk_lengths: list[tuple[int, int]], window: int | None) -> float:
    """How many keys a token sees on average, including its own.

    Args:
        chunk_lengths: see `ModelCost.flops_per_token`.
        window: the most keys that a token sees; None for all before it.
    """
    keys = tokens = 0.0
    for low, high in chunk_lengths:
        length = np.arange(low, high + 1, dtype=np.float64)
        seen = np.minimum(length, window) if window else length
        keys += float((seen * (seen + 1) / 2 + (length - seen) * seen).mean())
        tokens += float(length.mean())
    return keys / tokens


def site_width(site: Site, d_model: int, config: Any | None) -> int:
    """The width of a site's rows: all heads of attention's `z`, else d_model."""
    if site.part != "attn.z" or config is None:
        return d_model
    text = config.get_text_config()
    heads = text.num_attention_heads
    return int(heads * (getattr(text, "head_dim", None) or d_model // heads))


def _windows(text: Any, layers: nn.ModuleList) -> list[int | None]:
    """The window of each layer. A model whose config has no `layer_types`, such as Mixtral, has it in all layers."""
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None) or ["sliding_attention"] * len(layers)
    return [window if kind == "sliding_attention" else None for kind in types[: len(layers)]]


def _expert_share(text: Any) -> float:
    """The share of a layer's experts that a token passes through; 1 in a model without experts."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if (experts := getattr(text, name, None)) and getattr(text, "num_experts_per_tok", None):
            return float(text.num_experts_per_tok / experts)
    return 1.0
