"""The top k on a GPU from a product in 8 bits: it proposes k + margin latents per row, and their exact scores decide.

The product is torch's int8 product. With torch 2.11 on an H200 it takes 4.8 ms, and the bfloat16 product takes 5.7
(torch has no Hopper kernel for int8), so candidates do not pay there.

Shapes: B rows, C rows of one chunk, D d_model, F latents, K active latents per row, M = K + margin candidates,
G groups.
"""

import torch
import triton
from torch import Tensor

from olmoscope.kernels import cuda_candidates_kernels as kernels
from olmoscope.kernels.cuda_tiles import MOST_IN_TILE, row_tile
from olmoscope.kernels.cuda_topk import GROUP, group_tiles, topk_of_groups
from olmoscope.kernels.interface import Quantized
from olmoscope.kernels.reference import score_bytes, scores

SUMS_AT_ONCE = 2**28
"""Most elements of the product held at a time (1 GiB)."""
LEAST_ROWS = 32
"""torch._int_mm needs more than 16 rows, and columns in multiples of 8; torch itself tests multiples of 16."""


def quantize(W_enc_FD: Tensor, into: Quantized | None = None) -> Quantized:
    if into is None:
        into = Quantized(torch.empty_like(W_enc_FD, dtype=torch.int8),
                         torch.empty(len(W_enc_FD), dtype=torch.float32, device=W_enc_FD.device))
    _quantize_rows(W_enc_FD, into.weights, into.scales_F)
    return into


def encode_candidates(u_BD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor, quantized: Quantized, k: int,
                      margin: int) -> tuple[Tensor, Tensor]:
    values_BK = u_BD.new_empty(len(u_BD), k)
    indices_BK = torch.empty(len(u_BD), k, dtype=torch.int64, device=u_BD.device)
    rows = max(1, SUMS_AT_ONCE // len(W_enc_FD))
    for start in range(0, len(u_BD), rows):
        chunk = slice(start, start + rows)
        u_CD = u_BD[chunk].contiguous()
        chosen_CM = _candidates(u_CD, b_latent_F, quantized, min(k + margin, len(W_enc_FD)))
        exact_CM = _scores(u_CD, W_enc_FD, b_latent_F, chosen_CM)
        values_BK[chunk], order_CK = exact_CM.topk(k)
        indices_BK[chunk] = chosen_CM.gather(1, order_CK)
    return values_BK.relu_(), indices_BK


def candidate_bytes(rows: int, d_model: int, d_sae: int, places: int, margin: int) -> int:
    """Workspace and result of `encode_candidates`: the inputs in 8 bits, one chunk of the product, the maxima of its
    groups, and padded copies if the sizes need them; then the scores."""
    chunk, candidates = min(rows, max(1, SUMS_AT_ONCE // d_sae)), places + margin
    sums = 4 * chunk * (d_sae + -(-d_sae // GROUP))
    whole_tiles = d_sae % 16 == 0 and d_model % 16 == 0 and chunk >= LEAST_ROWS
    # Padded weights, and the sums without the padding.
    padded = 0 if whole_tiles else d_sae * d_model + 4 * chunk * d_sae
    codes = 20 * chunk * candidates + 12 * rows * places
    product = 6 * chunk * d_model + sums + padded
    return codes + max(product, score_bytes(chunk, d_model, candidates) if candidates > MOST_IN_TILE else 0)


def _candidates(u_CD: Tensor, b_latent_F: Tensor, quantized: Quantized, count: int) -> Tensor:
    """The latents with the largest products, `[C, M]`, in any order."""
    inputs_CD = torch.empty_like(u_CD, dtype=torch.int8)
    scales_C = torch.empty(len(u_CD), dtype=torch.float32, device=u_CD.device)
    _quantize_rows(u_CD, inputs_CD, scales_C)
    sums_CF = _product(inputs_CD, quantized.weights)
    pre_CF = sums_CF.view(torch.float32)  # each sum is overwritten by its score
    maxima_CG, programs, at_once = group_tiles(pre_CF)
    kernels.scale_sums[programs](sums_CF, pre_CF, maxima_CG, quantized.scales_F, scales_C, b_latent_F.float(),
                                 pre_CF.shape[1], maxima_CG.shape[1], GROUP=GROUP, GROUPS_AT_ONCE=at_once)
    chosen_CM = torch.empty(len(u_CD), count, dtype=torch.int64, device=u_CD.device)
    topk_of_groups(pre_CF, maxima_CG, torch.empty_like(chosen_CM, dtype=pre_CF.dtype), chosen_CM)
    return chosen_CM


def _quantize_rows(rows_RD: Tensor, whole_RD: Tensor, scales_R: Tensor) -> None:
    """Like `reference.quantize_rows` up to rounding, but reads the rows only once."""
    D = triton.next_power_of_2(rows_RD.shape[1])
    shift = 1.5 / torch.finfo(rows_RD.dtype).eps
    kernels.quantize_rows[(len(rows_RD),)](rows_RD, whole_RD, scales_R, rows_RD.shape[1], D=D, SHIFT=shift,
                                           num_warps=min(16, max(1, D // 512)))


def _product(inputs_CD: Tensor, weights_FD: Tensor) -> Tensor:
    """int32 sums, `[C, F]`."""
    rows, (latents, d_model) = len(inputs_CD), weights_FD.shape
    short, odd, narrow = max(0, LEAST_ROWS - rows), -d_model % 16, -latents % 16
    if short or odd or narrow:
        inputs_CD = torch.nn.functional.pad(inputs_CD, (0, odd, 0, short))
        weights_FD = torch.nn.functional.pad(weights_FD, (0, odd, 0, narrow))
    return torch._int_mm(inputs_CD, weights_FD.T)[:rows, :latents].contiguous()


def _scores(u_CD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor, chosen_CM: Tensor) -> Tensor:
    """u · W + b of the chosen latents."""
    if chosen_CM.shape[1] > MOST_IN_TILE:
        return scores(u_CD, W_enc_FD, b_latent_F, chosen_CM)
    exact_CM = torch.empty_like(chosen_CM, dtype=u_CD.dtype)
    M = triton.next_power_of_2(chosen_CM.shape[1])
    tile, warps = row_tile(M, u_CD.shape[1])
    kernels.exact_scores[(len(u_CD),)](u_CD, W_enc_FD, b_latent_F, chosen_CM, exact_CM, u_CD.shape[1],
                                       chosen_CM.shape[1], M=M, TILE=tile, num_warps=warps)
    return exact_CM
