"""Move similar rows of the decoder apart, so that fewer features absorb others (`train.orthogonal`).

The penalty is that of OrtSAE (Korznikov et al. 2025, arXiv:2509.22033): the squared cosine of each row with the most
similar row of its chunk. Chunks are random, so the cost grows with the number of latents and not with its square.
OrtSAE adds the penalty to the loss. Here rows take a step of descent on it after Adam's step, because Adam would divide
it by the size of the loss's gradients. That is done at every `EVERY`th step only, because it takes long
(docs/recipe-study.md has the effect on absorption).

Shapes: F latents, C rows of a chunk, D the width of the decoder.
"""

import torch
from torch import Tensor

from olmoscope.kernels.interface import AdamStep

EVERY = 8
"""Rows are moved at every so many steps."""
SMALLEST_CHUNK = 1024
"""The fewest rows that are compared with each other, if there are that many."""


def move_apart(W_dec_FD: Tensor, strength: float, adam: AdamStep, batch: int) -> None:
    """At every `EVERY`th step, move each row away from the most similar row of its chunk, in place.

    The chunks depend only on the number of the step and on the shard, so a resumed run draws the same.

    Args:
        W_dec_FD: rows of unit norm, `[F, D]`; they keep it.
        strength: how far, as a multiple of the length of a step of Adam in which every entry moves by the whole rate; a
            row goes that far, times its cosine with the other.
        adam: this step of Adam.
        batch: rows of a batch. Chunks have as many rows, if that is more than `SMALLEST_CHUNK`; per step they then cost
            an eighth of the encoder's product.
    """
    if adam.count % EVERY:
        return
    length = strength * adam.lr * W_dec_FD.shape[1] ** 0.5
    generator = torch.Generator().manual_seed(adam.count << 16 | adam.shard)
    order_F = torch.randperm(len(W_dec_FD), generator=generator).to(W_dec_FD.device)
    for places_C in torch.split(order_F, chunk_rows(batch)):
        W_CD = W_dec_FD[places_C]
        cosine_CC = (W_CD @ W_CD.T).fill_diagonal_(0)
        nearest_C = cosine_CC.abs().argmax(dim=1)
        cosine_C1 = cosine_CC.gather(1, nearest_C[:, None])
        W_CD = W_CD - length * cosine_C1 * (W_CD[nearest_C] - cosine_C1 * W_CD)
        W_dec_FD[places_C] = W_CD / W_CD.norm(dim=1, keepdim=True)


def chunk_rows(batch: int) -> int:
    """The most rows of a chunk."""
    return max(SMALLEST_CHUNK, batch)
