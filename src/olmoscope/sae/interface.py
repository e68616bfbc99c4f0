"""What any sparse autoencoder offers to whoever evaluates, indexes or shows it, whatever its kind and origin.

Shapes: B rows, D d_model, F latents, K places of a code.
"""

from typing import Protocol, Self

import torch
from torch import Tensor

from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.rows import Normalize, RowStatistics


class SparseAutoencoder(Protocol):
    """Parameters of one SAE and what they compute."""

    @property
    def d_model(self) -> int: ...

    @property
    def d_sae(self) -> int: ...

    @property
    def normalize(self) -> Normalize:
        """How rows are normalised before encoding; the reconstruction undoes it."""

    @property
    def W_enc_FD(self) -> Tensor:
        """Encoder, one latent a row; in a tied SAE the same tensor as `W_dec_FD`."""

    @property
    def W_dec_FD(self) -> Tensor:
        """Decoder, one latent a row: the direction that it writes."""

    @property
    def b_pre_D(self) -> Tensor:
        """Added to each reconstruction (of normalised rows)."""

    def center(self, x_BD: Tensor) -> tuple[Tensor, RowStatistics | None]:
        """Rows as the encoder sees them, u `[B, D]`, in the parameters' dtype; and what normalisation took out."""

    def encode(self, x_BD: Tensor) -> SparseCodes:
        """The active latents of each row of activations `[B, D]`, any float dtype. K is k in a TopK SAE, else the most
        active latents of any of these rows."""

    def decode(self, codes: SparseCodes, statistics: RowStatistics | None = None) -> Tensor:
        """The reconstruction `[B, D]` of codes.

        Args:
            codes: from `encode`, or made by hand.
            statistics: of the rows to restore, needed by a layer-norm SAE (`center` gives them).

        Raises:
            ValueError: a layer-norm SAE without statistics: their scale would be a guess.
        """

    def reconstruct(self, x_BD: Tensor) -> tuple[Tensor, SparseCodes]:
        """x̂ `[B, D]` in the parameters' dtype, and the codes it was made from."""

    def to(self, device: torch.device | str) -> Self:
        """The same SAE on another device."""
