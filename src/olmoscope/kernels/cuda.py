"""The hot operations on a GPU: cuBLAS for the one dense product, Triton for the rest; nothing waits for the device.

interface.py says what each does. The product is taken in bfloat16 with float32 sums, as in other trainers (float32
would take ten times as long); everything else is in the parameters' dtype.

With `TRITON_INTERPRET=1` (read when triton is imported) the kernels run on a CPU, slowly; that is how they are tested
without a GPU.

Shapes: B rows, D d_model, F latents, K active latents, C rows of one chunk, G groups, P pairs or parts, S shares.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor

from olmoscope.kernels import reference
from olmoscope.kernels.interface import AdamStep, Moments, Residual, SortedPairs
from olmoscope.kernels.reference import sort_pairs as sort_pairs
from olmoscope.kernels.rounding import MIX1, MIX2, step_seed

# triton 3.9 warns at each start unless this says whether a * b + c may be one instruction; it may.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
import triton

from olmoscope.kernels import cuda_kernels as kernels
from olmoscope.kernels.cuda_candidates import candidate_bytes
from olmoscope.kernels.cuda_candidates import encode_candidates as encode_candidates
from olmoscope.kernels.cuda_candidates import quantize as quantize
from olmoscope.kernels.cuda_tiles import MOST_IN_TILE, row_tile
from olmoscope.kernels.cuda_topk import topk, topk_bytes

PRE_ACTIVATIONS_AT_ONCE = 2**28
"""Most elements of the encoder product held at a time (1 GiB in float32)."""
PART = 256
"""How many pairs of a hot latent one program sums."""
ROW_COST = 4
"""The cost of reading and writing a row of W with its moments, in pairs."""
SHARES = 1056
"""How many programs share the latents: 8 for each of the 132 multiprocessors of an H100."""


def rows_at_once(d_sae: int) -> int:
    return max(1, PRE_ACTIVATIONS_AT_ONCE // d_sae)


def workspace_bytes(rows: int, d_model: int, d_sae: int, places: int, margin: int | None = None) -> int:
    pairs, chunk = rows * places, min(rows, rows_at_once(d_sae))
    W_low_FD = 2 * d_sae * d_model
    pre_CF = chunk * (4 * d_sae + 2 * d_model) + topk_bytes(chunk, d_sae, places)
    codes = 20 * pairs  # values and indices as they were found, and the order in which they are returned
    parts = 2 * pairs // PART
    update = 4 * (parts + SHARES) * d_model + 56 * parts + 64 * d_sae
    most = [W_low_FD + max(pre_CF, codes), update, reference.sort_bytes(pairs, d_sae)]
    if places > MOST_IN_TILE:
        most.append(reference.residual_bytes(rows, d_model, places))
    if margin is not None:
        most.append(candidate_bytes(rows, d_model, d_sae, places, margin))
    return max(most)


def product(u_CD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor) -> Tensor:
    return _without_bias(u_CD, W_enc_FD).add_(b_latent_F)


def _without_bias(u_CD: Tensor, W_enc_FD: Tensor) -> Tensor:
    """u Wᵀ, `[C, F]`."""
    if u_CD.is_cuda and W_enc_FD.dtype in (torch.float32, torch.bfloat16):
        return torch.mm(u_CD.bfloat16(), W_enc_FD.bfloat16().T, out_dtype=torch.float32)
    return u_CD @ W_enc_FD.T


def encode_topk(u_BD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values_BK = u_BD.new_empty(len(u_BD), k)
    indices_BK = torch.empty(len(u_BD), k, dtype=torch.int64, device=u_BD.device)
    # Convert once, for all chunks.
    W_low_FD = W_enc_FD.bfloat16() if u_BD.is_cuda and W_enc_FD.dtype == torch.float32 else W_enc_FD
    rows = rows_at_once(len(W_enc_FD))
    for start in range(0, len(u_BD), rows):
        chunk = slice(start, start + rows)
        topk(_without_bias(u_BD[chunk], W_low_FD), b_latent_F, values_BK[chunk], indices_BK[chunk])
    values_BK, order_BK = values_BK.relu_().sort(dim=1, descending=True, stable=True)
    return values_BK, indices_BK.gather(1, order_BK)


def decode(values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    if values_BK.shape[1] > MOST_IN_TILE or not values_BK.numel():
        return reference.decode(values_BK, indices_BK, W_dec_FD)
    values_BK, indices_BK, W_dec_FD = values_BK.contiguous(), indices_BK.contiguous(), W_dec_FD.contiguous()
    xhat_BD = W_dec_FD.new_empty(len(values_BK), W_dec_FD.shape[1])
    K = triton.next_power_of_2(values_BK.shape[1])
    tile, warps = row_tile(K, xhat_BD.shape[1])
    kernels.decode[(len(xhat_BD),)](values_BK, indices_BK, W_dec_FD, xhat_BD, xhat_BD.shape[1], values_BK.shape[1],
                                    K=K, TILE=tile, num_warps=warps)
    return xhat_BD


def residual(x_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor, b_pre_D: Tensor,
             mean_B1: Tensor | None, std_B1: Tensor | None) -> Residual:
    if values_BK.shape[1] > MOST_IN_TILE:
        return reference.residual(x_BD, values_BK, indices_BK, W_dec_FD, b_pre_D, mean_B1, std_B1)
    out = Residual(x_BD.new_empty(len(x_BD), dtype=torch.float64), torch.empty_like(x_BD), torch.empty_like(values_BK))
    K = triton.next_power_of_2(values_BK.shape[1])
    tile, warps = row_tile(K, x_BD.shape[1])
    tiny = x_BD.new_full((1,), torch.finfo(x_BD.dtype).tiny)
    kernels.residual[(len(x_BD),)](
        x_BD, values_BK, indices_BK, W_dec_FD, b_pre_D, mean_B1, std_B1, out.loss_B, out.e_BD, out.dz_BK, len(x_BD),
        x_BD.shape[1], values_BK.shape[1], tiny, LAYER_NORM=std_B1 is not None, K=K, TILE=tile, num_warps=warps)
    return out


def error(x_BD: Tensor, xhat_BD: Tensor, rows: int, mean_B1: Tensor | None,
          std_B1: Tensor | None) -> tuple[Tensor, Tensor]:
    loss_B, e_BD = x_BD.new_empty(len(x_BD), dtype=torch.float64), torch.empty_like(x_BD)
    tile, warps = row_tile(1, x_BD.shape[1])
    tiny = x_BD.new_full((1,), torch.finfo(x_BD.dtype).tiny)
    kernels.error[(len(x_BD),)](
        x_BD, xhat_BD, mean_B1, std_B1, loss_B, e_BD, rows, x_BD.shape[1], tiny, LAYER_NORM=std_B1 is not None,
        TILE=tile, num_warps=warps)
    return loss_B, e_BD


def code_gradient(e_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    if values_BK.shape[1] > MOST_IN_TILE:
        return reference.code_gradient(e_BD, values_BK, indices_BK, W_dec_FD)
    dz_BK = torch.empty_like(values_BK)
    K = triton.next_power_of_2(values_BK.shape[1])
    tile, warps = row_tile(K, e_BD.shape[1])
    kernels.code_gradient[(len(e_BD),)](e_BD, values_BK, indices_BK, W_dec_FD, dz_BK, e_BD.shape[1],
                                        values_BK.shape[1], K=K, TILE=tile, num_warps=warps)
    return dz_BK


def update_tied(W_FD: Tensor, moments: Moments, pairs: SortedPairs, e_BD: Tensor, u_BD: Tensor,
                adam: AdamStep) -> tuple[Tensor, Tensor]:
    return _update_rows(W_FD, moments, pairs, e_BD, u_BD, adam)


def update_encoder(W_enc_FD: Tensor, moments: Moments, pairs: SortedPairs, u_BD: Tensor,
                   adam: AdamStep) -> tuple[Tensor, Tensor]:
    return _update_rows(W_enc_FD, moments, pairs, None, u_BD, adam)


def update_decoder(W_dec_FD: Tensor, moments: Moments, pairs: SortedPairs, e_BD: Tensor, adam: AdamStep) -> None:
    _update_rows(W_dec_FD, moments, pairs, e_BD, None, adam)


def _update_rows(W_FD: Tensor, moments: Moments, pairs: SortedPairs, e_BD: Tensor | None, u_BD: Tensor | None,
                 adam: AdamStep) -> tuple[Tensor, Tensor]:
    """Update the rows as a decoder's if `e_BD` is given, as an encoder's if `u_BD` is given; the result is for an
    encoder."""
    latents, d_model = W_FD.shape
    D = triton.next_power_of_2(d_model)
    options: dict[str, Any] = {"D": D, "num_warps": min(16, max(1, D // 512)), "DECODER": e_BD is not None,
                               "ENCODER": u_BD is not None}
    parts_PD, part_offsets = _sum_hot(pairs, e_BD, u_BD, d_model, options)
    db_latent_F = W_FD.new_empty(latents)
    pull_SD = W_FD.new_empty(SHARES, d_model)
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (adam.beta1, adam.beta2)]
    numbers = torch.tensor([adam.rate, adam.root_scale, adam.beta1, adam.beta2, adam.eps, *logs], dtype=W_FD.dtype)
    if W_FD.is_cuda:
        numbers = numbers.pin_memory().to(W_FD.device, non_blocking=True)
    seed = step_seed(adam.count, adam.shard)
    seed -= 2**32 if seed >= 2**31 else 0  # always a 32-bit integer: another type would be recompiled
    kernels.update_rows[(SHARES,)](
        W_FD, moments.first, moments.second, moments.updated, pairs.offsets, parts_PD, part_offsets, pairs.rows,
        pairs.values, pairs.gradients, e_BD, u_BD, _share_bounds(pairs.offsets), db_latent_F, pull_SD, numbers,
        adam.count, seed, d_model, TOUCHED=moments.updated is not None,
        HALF=moments.first.dtype != W_FD.dtype, MIX1=MIX1, MIX2=MIX2, **options)
    if moments.updated is not None:  # not in the kernel, since warps of one program read it at different times
        moments.updated.masked_fill_(pairs.offsets.diff() > 0, adam.count)
    return db_latent_F, pull_SD.sum(dim=0)


def _sum_hot(pairs: SortedPairs, e_BD: Tensor | None, u_BD: Tensor | None, d_model: int,
             options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Sum the pairs of latents that have more than PART of them, part by part, so that none holds up one program.

    Returns:
        The parts, and the offsets `[F + 1]` of each latent's parts. There are as many programs as there could be parts,
        since only the device knows how many there are.
    """
    counts_F = pairs.offsets.diff()
    parts_F = torch.where(counts_F > PART, (counts_F + PART - 1) // PART, 0)
    part_offsets = torch.nn.functional.pad(parts_F.cumsum(0), (1, 0))
    most = 2 * len(pairs.rows) // PART
    if most == 0:
        return pairs.values.new_empty(0, d_model), part_offsets
    part_P = torch.arange(most, device=counts_F.device)
    latent_P = torch.searchsorted(part_offsets, part_P, right=True).sub_(1).clamp_max_(len(counts_F) - 1)
    start_P = pairs.offsets[latent_P] + (part_P - part_offsets[latent_P]) * PART
    stop_P = torch.minimum(start_P + PART, pairs.offsets[latent_P + 1])
    stop_P = torch.where(part_P < part_offsets[-1], stop_P, start_P)
    parts_PD = pairs.values.new_empty(most, d_model)
    kernels.sum_parts[(most,)](parts_PD, latent_P, start_P, stop_P, pairs.rows, pairs.values, pairs.gradients, e_BD,
                               u_BD, d_model, **options)
    return parts_PD, part_offsets


def _share_bounds(offsets: Tensor) -> Tensor:
    """Bounds of shares of latents with equal cost, `[S + 1]`."""
    counts_F = offsets.diff()
    cost_F = (torch.where(counts_F > PART, 0, counts_F) + ROW_COST).cumsum(0)
    wanted_S = torch.arange(SHARES + 1, device=offsets.device) * cost_F[-1] // SHARES
    return torch.searchsorted(cost_F, wanted_S, right=True).to(torch.int32)
