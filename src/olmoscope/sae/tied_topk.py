"""The tied TopK sparse autoencoder: parameters, encode, decode.

    z = ReLU(TopK_k((n(x) − b_pre) Wᵀ + b_latent))        x̂ = n⁻¹(z W + b_pre)

`W [F, D]`, rows of unit norm, is encoder and decoder; n is the row normalisation (rows.py). Source: the reference
release (Gao et al. 2024, arXiv:2406.04093, for TopK; tied weights as in Cunningham et al. 2023, arXiv:2309.08600).
Shapes: B rows, D d_model, F latents, K active.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.kernels.dispatch import kernels_for
from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.rows import Normalize, RowStatistics, normalize_rows, restore_rows


@dataclass
class TiedTopK:
    """Parameters of one SAE and what they compute."""

    W_FD: Tensor
    b_latent_F: Tensor
    b_pre_D: Tensor
    k: int
    normalize: Normalize

    @property
    def d_sae(self) -> int:
        return self.W_FD.shape[0]

    @property
    def d_model(self) -> int:
        return self.W_FD.shape[1]

    def center(self, x_BD: Tensor) -> tuple[Tensor, RowStatistics | None]:
        """Rows as the dictionary sees them: in the parameters' dtype, normalised, minus `b_pre`."""
        normal_BD, statistics = normalize_rows(x_BD.to(self.W_FD.dtype), self.normalize)
        return normal_BD - self.b_pre_D, statistics

    def encode(self, x_BD: Tensor) -> SparseCodes:
        """The active latents of each row of activations `[B, D]`, any float dtype."""
        return self._encode(self.center(x_BD)[0])

    def decode(self, codes: SparseCodes, statistics: RowStatistics | None = None) -> Tensor:
        """The reconstruction `[B, D]` of codes.

        Args:
            codes: from `encode`, or made by hand.
            statistics: of the rows to restore, needed by a layer-norm SAE (`center` gives them).

        Raises:
            ValueError: a layer-norm SAE without statistics: their scale would be a guess.
        """
        if self.normalize != "none" and statistics is None:
            raise ValueError("a layer_norm SAE needs the statistics of the rows it restores: pass what center() gave")
        kernels = kernels_for(self.W_FD.device)
        normal_BD = kernels.decode(codes.values_BK, codes.indices_BK, self.W_FD) + self.b_pre_D
        return restore_rows(normal_BD, statistics)

    def reconstruct(self, x_BD: Tensor) -> tuple[Tensor, SparseCodes]:
        """x̂ `[B, D]` in the parameters' dtype, and the codes it was made from."""
        u_BD, statistics = self.center(x_BD)
        codes = self._encode(u_BD)
        return self.decode(codes, statistics), codes

    def _encode(self, u_BD: Tensor) -> SparseCodes:
        kernels = kernels_for(self.W_FD.device)
        values_BK, indices_BK = kernels.encode_topk(u_BD, self.W_FD, self.b_latent_F, self.k)
        return SparseCodes(values_BK, indices_BK, self.d_sae)

    def to(self, device: torch.device | str) -> "TiedTopK":
        """The same SAE on another device."""
        return TiedTopK(self.W_FD.to(device), self.b_latent_F.to(device), self.b_pre_D.to(device),
                        self.k, self.normalize)


def initialize(d_model: int, d_sae: int, k: int, normalize: Normalize, mean_D: Tensor, seed: int) -> TiedTopK:
    """A fresh SAE: random unit rows, no latent bias, `b_pre` at the mean of the (normalised) data.

    Args:
        mean_D: mean of the rows as `normalize_rows` gives them.
        seed: the same seed gives the same rows on every device (drawn on the CPU).
    """
    generator = torch.Generator().manual_seed(seed)
    W_FD = torch.randn(d_sae, d_model, generator=generator)
    W_FD /= W_FD.norm(dim=1, keepdim=True)
    device = mean_D.device
    return TiedTopK(W_FD.to(device), torch.zeros(d_sae, device=device), mean_D.float().clone(), k, normalize)
