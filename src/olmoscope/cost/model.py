"""What a forward pass up to a layer costs: parameters, FLOPs, memory. Worked out from the model's config, no weights.

The model is built on torch's `meta` device, cut off above the deepest layer, and its parameters are counted. A multiply
and an add are two FLOPs. For each token:

    2 · (parameters of matrices in the layers)      every matrix multiplies each token once; the embedding is looked up
                                                    and norms and biases are not counted (under 0.1%)
    + Σ over layers 4 · keys · heads · head_dim     q·k and the weighted sum of v over the keys that a token sees

In a sequence, token t sees t keys, or the window's if the layer slides one: what a causal kernel skips is not counted,
nor that documents kept apart see less. In a mixture of experts the experts' matrices count with the share of experts
that a token goes through.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from olmoscope.model.blueprint import blueprint
from olmoscope.model.cut import cut_config
from olmoscope.model.layers import find_layers


@dataclass(frozen=True)
class ModelCost:
    """A decoder cut off above the deepest layer wanted."""

    d_model: int
    layers: int
    """That run: the deepest one wanted and those below it."""
    parameters: int
    """Of all that is loaded, the embedding too."""
    multiplied: float
    """Parameters that multiply each token."""
    attention_width: int
    """heads · head_dim."""
    windows: tuple[int | None, ...]
    """Of each layer: how many keys it sees at most, None for all."""
    widest: int
    """The widest matrix of a layer: in most models the MLP's."""

    def flops_per_token(self, chunk_lengths: list[tuple[int, int]]) -> float:
        """Mean FLOPs of a token.

        Args:
            chunk_lengths: as in a recipe: buckets of sequence lengths, a bucket drawn at random, then a length in it.
        """
        keys = sum(mean_keys(chunk_lengths, window) for window in self.windows)
        return 2 * self.multiplied + 4 * self.attention_width * keys

    def batch_bytes(self, tokens: int, kept: int, bytes_each: int) -> int:
        """Activations alive at the fullest moment of a forward pass.

        In an MLP: the stream, its normed copy and the residual (4 widths with room for attention's output), gate,
        activated gate and product (3 of the widest matrix); and the outputs kept of the layers wanted.

        Args:
            tokens: of the batch, padding included.
            kept: how many layers' outputs are kept.
            bytes_each: of a number in the model's dtype.
        """
        return tokens * bytes_each * ((4 + kept) * self.d_model + 3 * self.widest)


def model_cost(config: Any, deepest: int, *, whole: bool = False) -> ModelCost:
    """Count a model.

    Args:
        config: of transformers, whole; it is not changed.
        deepest: the deepest layer that runs, counted from 0.
        whole: whether all of it is loaded nevertheless.

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
    """How many keys a token sees on average, itself too.

    Args:
        chunk_lengths: see `ModelCost.flops_per_token`.
        window: how many it sees at most; None for all before it.
    """
    keys = tokens = 0.0
    for low, high in chunk_lengths:
        length = np.arange(low, high + 1, dtype=np.float64)
        seen = np.minimum(length, window) if window else length
        keys += float((seen * (seen + 1) / 2 + (length - seen) * seen).mean())
        tokens += float(length.mean())
    return keys / tokens


def _windows(text: Any, layers: nn.ModuleList) -> list[int | None]:
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None) or ["full_attention"] * len(layers)
    return [window if kind == "sliding_attention" else None for kind in types[: len(layers)]]


def _expert_share(text: Any) -> float:
    """Share of a layer's experts that a token goes through; 1 in a model without experts."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if (experts := getattr(text, name, None)) and getattr(text, "num_experts_per_tok", None):
            return float(text.num_experts_per_tok / experts)
    return 1.0
