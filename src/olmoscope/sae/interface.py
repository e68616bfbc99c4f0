"""What any sparse autoencoder offers to whoever trains, evaluates, indexes or shows it, whatever its kind and origin.

Shapes: B rows, D d_model, F latents, K places of a code.
"""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from olmoscope.kernels.dispatch import kernels_for
from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.rows import Normalize, RowStatistics, normalize_rows, restore_rows


class SparseAutoencoder(ABC):
    """Parameters of one SAE and what they compute; the kinds differ in how rows become codes.

    Attributes:
        W_enc_FD: encoder, one latent a row; in a tied SAE the very same tensor as `W_dec_FD`.
        W_dec_FD: decoder, one latent a row: the direction that it writes.
        b_pre_D: subtracted before encoding, added after decoding (of normalised rows).
        normalize: how rows are normalised before encoding; the reconstruction undoes it.
    """

    W_enc_FD: Tensor
    W_dec_FD: Tensor
    b_pre_D: Tensor
    normalize: Normalize

    @property
    def d_sae(self) -> int:
        return self.W_dec_FD.shape[0]

    @property
    def d_model(self) -> int:
        return self.W_dec_FD.shape[1]

    def center(self, x_BD: Tensor) -> tuple[Tensor, RowStatistics | None]:
        """Rows as the encoder sees them, u `[B, D]`: in the parameters' dtype, normalised, minus `b_pre`; and what
        normalisation took out."""
        normal_BD, statistics = normalize_rows(x_BD.to(self.W_enc_FD.dtype), self.normalize)
        return normal_BD - self.b_pre_D, statistics

    def encode(self, x_BD: Tensor) -> SparseCodes:
        """The active latents of each row of activations `[B, D]`, any float dtype. K is k in a TopK SAE, else the most
        active latents of any of these rows."""
        return self._encode(self.center(x_BD)[0])

    def decode(self, codes: SparseCodes, statistics: RowStatistics | None = None) -> Tensor:
        """The reconstruction `[B, D]` of codes.

        Args:
            codes: from `encode`, or made by hand.
            statistics: of the rows to restore, needed by an SAE that normalises rows (`center` gives them).

        Raises:
            ValueError: an SAE that normalises rows, without statistics: their scale would be a guess.
        """
        if self.normalize != "none" and statistics is None:
            raise ValueError(f"a {self.normalize} SAE needs the statistics of the rows it restores: pass what "
                             "center() gave")
        kernels = kernels_for(self.W_dec_FD.device)
        normal_BD = kernels.decode(codes.values_BK, codes.indices_BK, self.W_dec_FD) + self.b_pre_D
        return restore_rows(normal_BD, statistics)

    def reconstruct(self, x_BD: Tensor) -> tuple[Tensor, SparseCodes]:
        """x̂ `[B, D]` in the parameters' dtype, and the codes it was made from."""
        u_BD, statistics = self.center(x_BD)
        codes = self._encode(u_BD)
        return self.decode(codes, statistics), codes

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same SAE on another device."""

    @abstractmethod
    def _encode(self, u_BD: Tensor) -> SparseCodes:
        """Codes of rows that `center` gave."""
