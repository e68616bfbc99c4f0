"""Facts that follow only from decoder directions: nearest neighbours, promoted and suppressed tokens. Computed in
chunks.

Shapes: F latents, D d_model, C latents of a part, A kept, V vocabulary, M rows of a matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.kernels.dispatch import kernels_for
from olmoscope.model.unembed import Unembedding

LATENTS_AT_ONCE = 512


@dataclass(frozen=True)
class Ranked:
    """The A best items for each latent, best first; id -1 where there are fewer."""

    ids_CA: Tensor
    """int32."""
    values_CA: Tensor
    """float32."""


def nearest(unit_FD: Tensor, first: int, stop: int, count: int) -> Ranked:
    """The latents with the largest positive cosine to each of latents `first` to `stop`, without the latent itself.

    Args:
        unit_FD: directions of unit norm (`sae/directions.py`).
    """
    found = _best(unit_FD[first:stop], unit_FD, min(count + 1, len(unit_FD)))
    own_C1 = torch.arange(first, stop, dtype=torch.int32)[:, None]
    others_CA = (found.ids_CA != own_C1).int()
    # The latent itself is among these, unless many directions are equal; then drop the last one. If there are no more
    # latents than `count`, drop nothing; the latent itself is last.
    places_CA = torch.argsort(others_CA, dim=1, descending=True, stable=True)[:, :count]
    ids_CA = found.ids_CA.gather(1, places_CA)
    return Ranked(ids_CA.masked_fill(ids_CA == own_C1, -1), found.values_CA.gather(1, places_CA))


def logit_extremes(W_dec_FD: Tensor, unembedding: Unembedding, first: int, stop: int, count: int
                   ) -> tuple[Ranked, Ranked]:
    """The tokens whose logits each of latents `first` to `stop` raises most, and those whose logits it lowers most."""
    normal_CD = unembedding.through_norm(W_dec_FD[first:stop])
    nothing_V = normal_CD.new_zeros(len(unembedding.U_VD))
    count = min(count, len(nothing_V))
    raised: list[Ranked] = []
    lowered: list[Ranked] = []
    for some_BD in _chunks(normal_CD):
        logits_BV = kernels_for(normal_CD.device).product(some_BD, unembedding.U_VD, nothing_V)
        for sign, into in ((1, raised), (-1, lowered)):
            found = logits_BV.topk(count, dim=1, largest=sign > 0)
            into.append(_exact(some_BD, unembedding.U_VD, found.indices, sign * found.values > 0))
    return _joined(raised), _joined(lowered)


def _best(rows_CD: Tensor, W_MD: Tensor, count: int) -> Ranked:
    """The rows of a matrix with the largest positive products. The encoder's kernel does this, since it is the same
    operation."""
    nothing_M = W_MD.new_zeros(len(W_MD))
    parts = []
    for some_BD in _chunks(rows_CD):
        values_BK, indices_BK = kernels_for(W_MD.device).encode_topk(some_BD, W_MD, nothing_M, count)
        parts.append(_exact(some_BD, W_MD, indices_BK, values_BK > 0))
    return _joined(parts)


def _chunks(rows_CD: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(rows_CD), LATENTS_AT_ONCE):
        yield rows_CD[start : start + LATENTS_AT_ONCE].contiguous()


def _exact(rows_BD: Tensor, W_MD: Tensor, indices_BK: Tensor, there_BK: Tensor) -> Ranked:
    """Compute the products with chosen rows of a matrix again: kernels may use a lower precision."""
    values_BK = torch.einsum("bkd,bd->bk", W_MD[indices_BK], rows_BD)
    return Ranked(torch.where(there_BK, indices_BK, -1).int().cpu(), values_BK.cpu())


def _joined(parts: list[Ranked]) -> Ranked:
    return Ranked(torch.cat([part.ids_CA for part in parts]), torch.cat([part.values_CA for part in parts]))
