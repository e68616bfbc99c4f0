"""The hot operations of a tied TopK SAE in plain torch, on any device: one dense product, the rest sparse.

Shapes: B rows, D d_model, F latents, K active latents a row, C latents of one chunk.

No `[B, F]` code and no `[F, D]` gradient is ever whole in memory: the encoder's product is taken over chunks of rows
and cut to its top k at once; the gradient of the dictionary is made for a chunk of latents at a time, so that
the optimiser can use it while it is there.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PRE_ACTIVATIONS_AT_ONCE = 2**24
"""Most elements of the encoder product held at a time (64 MiB in float32)."""

GRADIENT_AT_ONCE = 2**20
"""Most elements of the dictionary's gradient held at a time (4 MiB in float32: it should stay in cache)."""

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def encode_topk(u_BD: Tensor, W_FD: Tensor, b_latent_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ReLU(TopK_k(u Wᵀ + b)), without the zeros.

    Args:
        u_BD: centred input rows.
        W_FD: the dictionary, one latent a row.
        b_latent_F: bias of each latent.
        k: how many latents to keep in each row, at most F.

    Returns:
        values_BK, not negative and descending in each row, and indices_BK (int64). A value is 0 where the
        pre-activation was not positive: the ReLU comes after the top-k, so fewer than k may be active.
    """
    values_BK = u_BD.new_empty(len(u_BD), k)
    indices_BK = torch.empty(len(u_BD), k, dtype=torch.int64, device=u_BD.device)
    rows = max(1, PRE_ACTIVATIONS_AT_ONCE // len(W_FD))
    for start in range(0, len(u_BD), rows):
        chunk = slice(start, start + rows)
        pre_CF = torch.addmm(b_latent_F, u_BD[chunk], W_FD.T)
        torch.topk(pre_CF, k, out=(values_BK[chunk], indices_BK[chunk]))
    return values_BK.relu_(), indices_BK


def decode(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
    """Σ_k values · W[indices], `[B, D]`: the rows of the dictionary, weighted and summed."""
    return torch.nn.functional.embedding_bag(indices_BK, W_FD, per_sample_weights=values_BK, mode="sum")


def code_gradient(e_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
    """dL/dz of the active latents, `[B, K]`: e · W_j, and 0 where the ReLU is shut.

    Args:
        e_BD: dL/dx̂, the gradient at the reconstruction (before the SAE's own de-normalisation).
    """
    dz_BK = torch.empty_like(values_BK)
    rows = max(1, PRE_ACTIVATIONS_AT_ONCE // (W_FD.shape[1] * values_BK.shape[1]))
    for start in range(0, len(e_BD), rows):
        chunk = slice(start, start + rows)
        W_CKD = W_FD[indices_BK[chunk]]
        dz_BK[chunk] = torch.bmm(W_CKD, e_BD[chunk].unsqueeze(2)).squeeze(2)
    return dz_BK.mul_(values_BK > 0)


@dataclass(frozen=True)
class SortedPairs:
    """The active (row, latent) pairs of a batch, sorted by latent: compressed sparse rows, one row a latent."""

    offsets: Tensor
    """`[F + 1]` int64: the pairs of latent f are `offsets[f]` to `offsets[f + 1]`."""
    rows: Tensor
    """`[B K]` int64: the batch row of each pair."""
    values: Tensor
    """`[B K]`: z of each pair."""
    gradients: Tensor
    """`[B K]`: dL/dz of each pair."""


def sort_pairs(values_BK: Tensor, dz_BK: Tensor, indices_BK: Tensor, d_sae: int) -> SortedPairs:
    """Sort a batch's pairs by latent; stable, so that sums are always taken in the same order."""
    latents, order = torch.sort(indices_BK.flatten(), stable=True)
    bounds = torch.arange(d_sae + 1, device=latents.device)
    return SortedPairs(
        offsets=torch.searchsorted(latents, bounds),
        rows=order // indices_BK.shape[1],
        values=values_BK.flatten()[order],
        gradients=dz_BK.flatten()[order])


def bias_gradient(pairs: SortedPairs) -> Tensor:
    """Gradient of each latent's bias, Σ_b dz_bj, `[F]`."""
    return torch.segment_reduce(pairs.gradients, "sum", offsets=pairs.offsets, initial=0)


def dictionary_gradients(pairs: SortedPairs, e_BD: Tensor, u_BD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Gradient of the tied rows, Σ_b z_bj e_b + dz_bj u_b, for one chunk of latents after the other.

    The first term is the decoder's, the second the encoder's; W is both.

    Args:
        pairs: the batch's pairs.
        e_BD: dL/dx̂ as in `code_gradient`.
        u_BD: centred input rows, as given to `encode_topk`.

    Yields:
        The latents of the chunk, and their gradient `[C, D]`; together all latents, each once.
    """
    latents = len(pairs.offsets) - 1
    size = max(1, GRADIENT_AT_ONCE // e_BD.shape[1])
    starts = range(0, latents, size)
    firsts = [*pairs.offsets[:-1:size].tolist(), len(pairs.rows)]  # one wait for the device, not one a chunk
    for number, start in enumerate(starts):
        chunk = slice(start, min(start + size, latents))
        inside = slice(firsts[number], firsts[number + 1])
        offsets = pairs.offsets[chunk.start : chunk.stop + 1] - firsts[number]
        shape = (chunk.stop - chunk.start, len(e_BD))
        z, dz = (torch.sparse_csr_tensor(offsets, pairs.rows[inside], values[inside], shape, check_invariants=False)
                 for values in (pairs.values, pairs.gradients))
        yield chunk, torch.addmm(z @ e_BD, dz, u_BD)
