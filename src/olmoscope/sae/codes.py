"""What a sparse coder makes of activations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.sae.normalize import RowStatistics


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """The active latents of rows, K places each; a place whose value is 0 is not active. `...` are the leading
    dimensions of the rows: none for one vector, `[B]`, `[B, T]`.

    `dataclasses.replace(codes, values=edited)` changes values and keeps what `decode` needs of the rows.

    Attributes:
        values: `[..., K]`, activations; as `encode` gives them not negative and descending in each row.
        indices: `[..., K]` int64, which latent each value belongs to; at an inactive place any latent, perhaps an
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
    """What normalisation took out of the rows, if it did: `decode` puts it back."""
    _rows: Tensor | None = None
    """The rows themselves, `[N, D_in]`, for a coder whose output skips the latents in part."""

    def to_dense(self) -> Tensor:
        """The dense code, `[..., d_sae]`. Large: at 131072 latents half a megabyte a row in float32."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return dense.scatter_add_(-1, self.indices, self.values)

    def l0(self) -> Tensor:
        """Active latents of each row, `[...]` int64; under K where fewer pre-activations than K were positive."""
        return torch.count_nonzero(self.values, dim=-1)
