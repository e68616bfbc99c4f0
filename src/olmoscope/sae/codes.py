"""What a sparse coder encodes activations to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.sae.normalize import RowStatistics


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """The active latents of rows, K places each; a place whose value is 0 is inactive. `...` are the leading dimensions
    of the rows: none for one vector, `[B]`, `[B, T]`.

    `dataclasses.replace(codes, values=edited)` changes values and keeps what `decode` needs from the rows.

    Attributes:
        values: `[..., K]`, activations; from `encode`, they are not negative and descend in each row.
        indices: `[..., K]` int64, the latent that each value belongs to; at an inactive place any latent, perhaps an
            active one.
        d_sae: width of the dictionary.

    Example:
        >>> import torch
        >>> from olmoscope import SparseCodes
        >>> codes = SparseCodes(torch.tensor([[2.0, 0.5]]), torch.tensor([[3, 0]]), d_sae=4)
        >>> codes.to_dense()
        tensor([[0.5000, 0.0000, 0.0000, 2.0000]])
        >>> codes.l0()
        tensor([2])
    """

    values: Tensor
    indices: Tensor
    d_sae: int
    _statistics: RowStatistics | None = None
    """What normalisation removed from the rows, if anything: `decode` restores it."""
    _rows: Tensor | None = None
    """The rows themselves, `[N, D_in]`, for a coder with a skip connection."""

    def to_dense(self) -> Tensor:
        """The dense code, `[..., d_sae]`. It is large: at 131072 latents, half a megabyte per row in float32."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return dense.scatter_add_(-1, self.indices, self.values)

    def l0(self) -> Tensor:
        """Number of active latents in each row, `[...]` int64; under K if fewer pre-activations were positive."""
        return torch.count_nonzero(self.values, dim=-1)
