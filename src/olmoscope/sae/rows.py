"""Normalisation of input rows: none, or a layer norm without weights that the reconstruction undoes."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Normalize = Literal["none", "layer_norm"]

EPS = 1e-5
"""Added to the standard deviation before dividing, as SAELens and the reference trainer do."""


@dataclass(frozen=True)
class RowStatistics:
    """What normalisation took out of each row, `[B, 1]` each: needed to put it back."""

    mean_B1: Tensor
    std_B1: Tensor


def normalize_rows(x_BD: Tensor, normalize: Normalize) -> tuple[Tensor, RowStatistics | None]:
    """Rows as the encoder sees them: unchanged, or centred and divided by (unbiased std + 1e-5).

    Source: SAELens `layer_norm` activations, which the reference release uses (standard deviation with n - 1).
    """
    if normalize == "none":
        return x_BD, None
    mean_B1 = x_BD.mean(dim=1, keepdim=True)
    centred_BD = x_BD - mean_B1
    std_B1 = centred_BD.std(dim=1, keepdim=True)
    return centred_BD / (std_B1 + EPS), RowStatistics(mean_B1, std_B1)


def restore_rows(x_BD: Tensor, statistics: RowStatistics | None) -> Tensor:
    """The reconstruction in the model's own space: multiplied by std (without the 1e-5), shifted by the mean."""
    if statistics is None:
        return x_BD
    return x_BD * statistics.std_B1 + statistics.mean_B1
