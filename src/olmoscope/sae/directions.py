"""Directions of a dictionary's latents. Shapes: F latents, D width."""

import torch
from torch import Tensor


def unit_directions(W_FD: Tensor) -> Tensor:
    """Rows scaled to unit norm, in float32; a zero row stays 0, with cosine 0 to all."""
    W_FD = W_FD.float()
    length_F1: Tensor = W_FD.norm(dim=1, keepdim=True)
    return W_FD / length_F1.clamp_min(torch.finfo(torch.float32).tiny)
