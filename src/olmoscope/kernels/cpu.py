"""The hot operations on a CPU: oneDNN for the one dense product, numba for everything sparse.

interface.py says what each does. Work is cut into pieces whose number and bounds do not depend on the number of
threads, and sums over pieces are taken in a fixed order, so any number of threads gives the same bits (except for
oneDNN's product, which promises this only for the same number of threads).

Shapes: B rows, D d_model, F latents, K active latents per row, C rows of one chunk, P pairs, S shares of the work.
"""

import numpy as np
import torch
from torch import Tensor

from olmoscope.kernels import cpu_rows, cpu_topk, cpu_update
from olmoscope.kernels.compile import call
from olmoscope.kernels.cpu_candidates import PRE_ACTIVATIONS_AT_ONCE, ROWS_AT_LEAST, candidate_bytes
from olmoscope.kernels.cpu_candidates import encode_candidates as encode_candidates
from olmoscope.kernels.cpu_candidates import quantize as quantize
from olmoscope.kernels.interface import AdamStep, Moments, Residual, SortedPairs
from olmoscope.kernels.rounding import step_seed


def encode_topk(u_BD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values_BK = u_BD.new_empty(len(u_BD), k)
    indices_BK = torch.empty(len(u_BD), k, dtype=torch.int64)
    rows = rows_at_once(len(W_enc_FD))
    for start in range(0, len(u_BD), rows):
        chunk = slice(start, start + rows)
        call(cpu_topk.topk, product(u_BD[chunk], W_enc_FD, b_latent_F), values_BK[chunk], indices_BK[chunk])
    return values_BK, indices_BK


def rows_at_once(d_sae: int) -> int:
    rows = max(ROWS_AT_LEAST, PRE_ACTIVATIONS_AT_ONCE // d_sae)
    # A power of two: a batch is one, too, as a rule, and a few rows that are left over cost another pass over W.
    return 1 << (rows.bit_length() - 1)


def workspace_bytes(rows: int, d_model: int, d_sae: int, places: int, margin: int | None = None) -> int:
    pre_CF = 4 * min(rows, rows_at_once(d_sae)) * d_sae
    # Rows of e and u are summed in place, except for the parts of hot latents, which have more pairs than one part.
    parts = 2 * rows * places // cpu_update.PART
    most = [pre_CF, 16 * d_sae, 4 * (parts + cpu_update.SHARES) * d_model]
    if margin is not None:
        most.append(candidate_bytes(rows, d_model, d_sae, places, margin))
    return max(most)


def product(u_CD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor) -> Tensor:
    # oneDNN uses the widest vectors on every maker's processors; the library behind torch.mm does so only on Intel's,
    # and is 2 to 2.5 times slower on AMD's.
    if u_CD.dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pre_CF: Tensor = torch.ops.mkldnn._linear_pointwise(u_CD, W_enc_FD, b_latent_F, "none", [], "")
        return pre_CF
    return torch.addmm(b_latent_F, u_CD, W_enc_FD.T)


def decode(values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    xhat_BD = W_dec_FD.new_empty(len(values_BK), W_dec_FD.shape[1])
    call(cpu_rows.decode, values_BK.contiguous(), indices_BK.contiguous(), W_dec_FD.contiguous(), xhat_BD)
    return xhat_BD


def residual(x_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor, b_pre_D: Tensor,
             mean_B1: Tensor | None, std_B1: Tensor | None) -> Residual:
    out = Residual(x_BD.new_empty(len(x_BD), dtype=torch.float64), torch.empty_like(x_BD), torch.empty_like(values_BK))
    none = x_BD.new_empty(0, 1)
    call(cpu_rows.residual, x_BD, values_BK, indices_BK, W_dec_FD, b_pre_D, none if mean_B1 is None else mean_B1,
         none if std_B1 is None else std_B1, out.loss_B, out.e_BD, out.dz_BK)
    return out


def error(x_BD: Tensor, xhat_BD: Tensor, rows: int, mean_B1: Tensor | None,
          std_B1: Tensor | None) -> tuple[Tensor, Tensor]:
    loss_B, e_BD = x_BD.new_empty(len(x_BD), dtype=torch.float64), torch.empty_like(x_BD)
    none = x_BD.new_empty(0, 1)
    call(cpu_rows.error, x_BD, xhat_BD, np.int64(rows), none if mean_B1 is None else mean_B1,
         none if std_B1 is None else std_B1, loss_B, e_BD)
    return loss_B, e_BD


def code_gradient(e_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    dz_BK = torch.empty_like(values_BK)
    call(cpu_rows.code_gradient, e_BD, values_BK, indices_BK, W_dec_FD, dz_BK)
    return dz_BK


def sort_pairs(values_BK: Tensor, dz_BK: Tensor, indices_BK: Tensor, d_sae: int,
               rows_P: Tensor | None = None) -> SortedPairs:
    pairs = SortedPairs(
        offsets=torch.zeros(d_sae + 1, dtype=torch.int64),
        rows=torch.empty(values_BK.numel(), dtype=torch.int32),
        values=values_BK.new_empty(values_BK.numel()),
        gradients=values_BK.new_empty(values_BK.numel()))
    if rows_P is None:
        rows_P = torch.empty(0, dtype=torch.int32)
    else:
        values_BK, dz_BK, indices_BK = (tensor.unsqueeze(1) for tensor in (values_BK, dz_BK, indices_BK))
    call(cpu_rows.counting_sort, values_BK, dz_BK, indices_BK, rows_P, pairs.offsets, pairs.rows, pairs.values,
         pairs.gradients)
    return pairs


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
    none = W_FD.new_empty(0, W_FD.shape[1])
    half = moments.first.dtype == torch.bfloat16
    full = [none] * 2 if half else [moments.first, moments.second]
    bits = ([moment.view(torch.uint16) for moment in (moments.first, moments.second)] if half
            else [torch.empty(0, W_FD.shape[1], dtype=torch.uint16)] * 2)
    updated = torch.empty(0, dtype=torch.int32) if moments.updated is None else moments.updated
    numbers = torch.tensor([adam.rate, adam.root_scale, adam.beta1, adam.beta2, adam.eps], dtype=W_FD.dtype)
    db_latent_F = W_FD.new_empty(len(W_FD))
    b_pull_SD = W_FD.new_zeros(cpu_update.SHARES, W_FD.shape[1])
    call(cpu_update.update_rows, W_FD, *full, *bits, updated, pairs.offsets, pairs.rows, pairs.values,
         pairs.gradients, none if e_BD is None else e_BD, none if u_BD is None else u_BD, numbers,
         np.int64(adam.count), np.uint32(step_seed(adam.count, adam.shard)), db_latent_F, b_pull_SD)
    return db_latent_F, b_pull_SD.sum(dim=0)
