"""What follows from decoder directions alone: nearest neighbours, promoted and suppressed tokens; chunk by chunk.

Shapes: F latents, D d_model, C latents of a chunk, A kept, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.model.unembed import Unembedding

ELEMENTS_AT_ONCE = 2**25
"""Of a chunk's products (128 MiB in float32)."""


@dataclass(frozen=True)
class Ranked:
    """The A best of something for each latent, best first."""

    indices_CA: Tensor
    """int32."""
    values_CA: Tensor
    """float32."""


def nearest(unit_FD: Tensor, first: int, stop: int, count: int) -> Ranked:
    """The latents with the largest cosine to each of latents `first` to `stop`, itself left out.

    Args:
        unit_FD: directions of unit norm (`unit_directions`).
    """
    count = min(count, len(unit_FD) - 1)
    parts = []
    for start in range(first, stop, chunk := max(1, ELEMENTS_AT_ONCE // len(unit_FD))):
        end = min(stop, start + chunk)
        cosine_CF = unit_FD[start:end] @ unit_FD.T
        cosine_CF[torch.arange(end - start), torch.arange(start, end)] = -torch.inf
        parts.append(cosine_CF.topk(count, dim=1))
    return _joined(parts)


def unit_directions(W_dec_FD: Tensor) -> Tensor:
    """Directions of unit norm in float32; one without length stays 0, at cosine 0 to all."""
    W_dec_FD = W_dec_FD.float()
    length_F1: Tensor = W_dec_FD.norm(dim=1, keepdim=True)
    return W_dec_FD / length_F1.clamp_min(torch.finfo(torch.float32).tiny)


def logit_extremes(W_dec_FD: Tensor, unembedding: Unembedding, first: int, stop: int, count: int
                   ) -> tuple[Ranked, Ranked]:
    """The tokens whose logits each of latents `first` to `stop` raises most and lowers most."""
    count = min(count, len(unembedding.U_VD))
    raised, lowered = [], []
    for start in range(first, stop, chunk := max(1, ELEMENTS_AT_ONCE // len(unembedding.U_VD))):
        logits_CV = unembedding.logits(W_dec_FD[start : min(stop, start + chunk)])
        raised.append(logits_CV.topk(count, dim=1))
        lowered.append(logits_CV.topk(count, dim=1, largest=False))
    return _joined(raised), _joined(lowered)


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> Ranked:
    return Ranked(torch.cat([indices for _, indices in parts]).int().cpu(),
                  torch.cat([values for values, _ in parts]).cpu())
