"""The group-max sparse autoencoder: latents form k groups of neighbours, and only the largest of each group is active.

    z_j = ReLU(p_j) where p_j is the largest of its group, else 0        p = (n(x) − b_in) W_encᵀ + b_latent

It is cheaper than a top-k, since each group is searched separately, and as sparse. Source: EleutherAI's sparsify,
`groupmax`. Shapes: N and B rows, C rows of a chunk, D d_model, F latents, K groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.kernels.interface import Kernels
from olmoscope.sae.topk import TopK


@dataclass(eq=False, repr=False)
class GroupMax(TopK):
    """Like `TopK`, with k groups of `d_sae / k` latents each: latents 0 to `d_sae / k` − 1 are the first group."""

    def _choose(self, u_ND: Tensor) -> tuple[Tensor, Tensor]:
        return encode_groups(self.kernels, u_ND, self.W_enc.detach(), self.b_latent.detach(), self.k)


def encode_groups(kernels: Kernels, u_BD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor,
                  groups: int) -> tuple[Tensor, Tensor]:
    """The largest latent of each group, after the ReLU: values_BK, descending in each row, and indices_BK."""
    values_BK = u_BD.new_empty(len(u_BD), groups)
    indices_BK = torch.empty(len(u_BD), groups, dtype=torch.int64, device=u_BD.device)
    firsts_K = torch.arange(0, len(W_enc_FD), len(W_enc_FD) // groups, device=u_BD.device)
    rows = kernels.rows_at_once(len(W_enc_FD))
    for start in range(0, len(u_BD), rows):
        chunk = slice(start, start + rows)
        pre_CF = kernels.product(u_BD[chunk], W_enc_FD, b_latent_F)
        largest = pre_CF.view(len(pre_CF), groups, -1).max(dim=2)
        values_BK[chunk], indices_BK[chunk] = largest.values, largest.indices + firsts_K
    values_BK, order_BK = values_BK.relu_().sort(dim=1, descending=True, stable=True)
    return values_BK, indices_BK.gather(1, order_BK)
