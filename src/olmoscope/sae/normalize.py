"""Normalisation of input rows, which the reconstruction undoes: none, layer norm without weights, a fixed length, or
subtraction of the mean."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Normalize = Literal["none", "layer_norm", "constant_norm_rescale", "centred"]
"""Named as in SAELens. Our SAEs are trained with the first two; the third is for reading other trainers' SAEs, and so
is the last, which is how TransformerLens' `center_writing_weights` changes rows."""

EPS = 1e-5
"""Added to the standard deviation before dividing, as SAELens and the reference trainer do."""


@dataclass(frozen=True)
class RowStatistics:
    """What normalisation removed from each row, `[B, 1]` each: needed to restore it."""

    mean_B1: Tensor
    std_B1: Tensor


def normalize_rows(x_BD: Tensor, normalize: Normalize) -> tuple[Tensor, RowStatistics | None]:
    """Rows as the encoder sees them: unchanged, centred, centred and divided by (unbiased std + 1e-5), or of length √D.

    Source: SAELens' `layer_norm`, which the reference release uses (standard deviation with n - 1), and its
    `constant_norm_rescale` (here a row of zeros stays zero; in SAELens it becomes NaN).
    """
    if normalize == "none":
        return x_BD, None
    if normalize == "constant_norm_rescale":
        scale_B1 = x_BD.norm(dim=1, keepdim=True) / x_BD.shape[1] ** 0.5
        return (x_BD / scale_B1.clamp_min(torch.finfo(x_BD.dtype).tiny),
                RowStatistics(torch.zeros_like(scale_B1), scale_B1))
    mean_B1 = x_BD.mean(dim=1, keepdim=True)
    centred_BD = x_BD - mean_B1
    if normalize == "centred":
        return centred_BD, RowStatistics(mean_B1, torch.ones_like(mean_B1))
    std_B1 = centred_BD.std(dim=1, keepdim=True)
    return centred_BD / (std_B1 + EPS), RowStatistics(mean_B1, std_B1)


def restore_rows(x_BD: Tensor, statistics: RowStatistics | None) -> Tensor:
    """The reconstruction in the model's own space: multiplied by std (without the 1e-5), shifted by the mean."""
    if statistics is None:
        return x_BD
    return x_BD * statistics.std_B1 + statistics.mean_B1
