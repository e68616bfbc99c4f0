"""Exact top-k of rows on a GPU: taken from the k groups with the largest maxima, which contain all of them.

A group of 32 neighbours is 128 bytes, what a GPU reads at once. Shapes: C rows, F latents, K kept per row, G groups.
"""

import torch
import triton
from torch import Tensor

from olmoscope.kernels import cuda_kernels as kernels

GROUP = 32
MOST_SELECTED = 256
"""The largest k for which the candidates fit into the registers of one program; above this, torch.topk selects."""
MOST_GROUPS = 16384
"""The same limit for the maxima (524288 latents)."""


def group_tiles(pre_CF: Tensor) -> tuple[Tensor, tuple[int, int], int]:
    """Memory for the group maxima of some rows, `[C, G]`; the grid of programs that fill it; the groups per program."""
    rows, width = pre_CF.shape
    groups = triton.cdiv(width, GROUP)
    at_once = min(128, triton.next_power_of_2(groups))
    maxima_CG = torch.empty(rows, groups, dtype=pre_CF.dtype, device=pre_CF.device)
    return maxima_CG, (rows, triton.cdiv(groups, at_once)), at_once


def topk(pre_CF: Tensor, b_latent_F: Tensor, values_CK: Tensor, indices_CK: Tensor) -> None:
    """The top k of each row of pre + b, in any order. `pre_CF` may be overwritten."""
    width, k = pre_CF.shape[1], values_CK.shape[1]
    if not _fits(width, k):
        torch.topk(pre_CF.add_(b_latent_F), k, sorted=False, out=(values_CK, indices_CK))
        return
    maxima_CG, programs, at_once = group_tiles(pre_CF)
    kernels.group_maxima[programs](pre_CF, b_latent_F, maxima_CG, width, maxima_CG.shape[1], GROUP=GROUP,
                                   GROUPS_AT_ONCE=at_once)
    _select(pre_CF, b_latent_F, maxima_CG, values_CK, indices_CK)


def topk_bytes(rows: int, width: int, k: int) -> int:
    """Workspace of `topk`: the maxima of the groups, and which groups were chosen."""
    return 4 * rows * (-(-width // GROUP) + k)


def topk_of_groups(pre_CF: Tensor, maxima_CG: Tensor, values_CK: Tensor, indices_CK: Tensor) -> None:
    """The top k of each row of pre, in any order, if the maxima of its groups are known."""
    if _fits(pre_CF.shape[1], values_CK.shape[1]):
        _select(pre_CF, None, maxima_CG, values_CK, indices_CK)
    else:
        torch.topk(pre_CF, values_CK.shape[1], sorted=False, out=(values_CK, indices_CK))


def _select(pre_CF: Tensor, b_latent_F: Tensor | None, maxima_CG: Tensor, values_CK: Tensor,
            indices_CK: Tensor) -> None:
    """Select from the maxima of pre (+ b): first the groups, then their elements."""
    (rows, groups), width, k = maxima_CG.shape, pre_CF.shape[1], values_CK.shape[1]
    chosen_CK = torch.empty(rows, k, dtype=torch.int32, device=pre_CF.device)
    bits = torch.finfo(pre_CF.dtype).bits
    kernels.select_groups[(rows,)](
        maxima_CG, chosen_CK, groups, k, BITS=bits, GROUPS=triton.next_power_of_2(groups), num_warps=8)
    kernels.select_elements[(rows,)](
        pre_CF, b_latent_F, chosen_CK, values_CK, indices_CK, width, k, BIAS=b_latent_F is not None, BITS=bits,
        GROUP=GROUP, K=triton.next_power_of_2(k), num_warps=8)


def _fits(width: int, k: int) -> bool:
    groups = -(-width // GROUP)
    return k <= min(groups, MOST_SELECTED) and groups <= MOST_GROUPS
