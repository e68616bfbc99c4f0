"""What an SAE makes of activations."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseCodes:
    """The active latents of B rows, K places each; a place whose value is 0 is not active.

    Attributes:
        values_BK: activations, not negative, descending in each row.
        indices_BK: int64, which latent each value belongs to; at an inactive place any latent, perhaps an active one.
        d_sae: width of the dictionary.
    """

    values_BK: Tensor
    indices_BK: Tensor
    d_sae: int

    def to_dense(self) -> Tensor:
        """The dense code, `[B, d_sae]`. Large: at 131072 latents half a megabyte a row in float32."""
        dense_BF = self.values_BK.new_zeros(len(self.values_BK), self.d_sae)
        return dense_BF.scatter_add_(1, self.indices_BK, self.values_BK)

    def l0(self) -> Tensor:
        """Active latents of each row, `[B]`; under K where fewer pre-activations than K were positive."""
        return torch.count_nonzero(self.values_BK, dim=1)
