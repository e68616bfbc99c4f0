"""Per-row work on a CPU: reconstruction, its error, the gradient of the codes; and sorting the pairs by latent.

Loops that sum do not write. A loop that does both is compiled twice, vectorised and scalar, because the arrays may
overlap; their addresses decide at run time which version runs, so the place in memory would change the order of the
sum.
"""

import numpy as np
from numba import prange

from olmoscope.kernels.compile import compiled

ROWS_PER_PIECE = 8


@compiled(parallel=True)
def residual(x_BD, values_BK, indices_BK, W_FD, b_pre_D, mean_B1, std_B1, loss_B, e_BD, dz_BK):
    """Fill loss, e and dz."""
    rows = len(x_BD)
    for piece in prange((rows + ROWS_PER_PIECE - 1) // ROWS_PER_PIECE):
        first = piece * ROWS_PER_PIECE
        _residual_rows(first, min(rows, first + ROWS_PER_PIECE), x_BD, values_BK, indices_BK, W_FD, b_pre_D, mean_B1,
                       std_B1, loss_B, e_BD, dz_BK)


@compiled(reorder=True)
def _residual_rows(first, stop, x_BD, values_BK, indices_BK, W_FD, b_pre_D, mean_B1, std_B1, loss_B, e_BD, dz_BK):
    """Fill some rows. The K rows of W are fetched from memory once; the second time they are in cache."""
    rows, d_model = x_BD.shape
    k = values_BK.shape[1]
    tiny = np.finfo(x_BD.dtype).tiny
    layer_norm = len(std_B1) > 0
    one = x_BD.dtype.type(1)
    for row in range(first, stop):
        values, indices, x, e, dz = values_BK[row], indices_BK[row], x_BD[row], e_BD[row], dz_BK[row]
        active = k
        while active > 0 and values[active - 1] == 0:
            active -= 1
        for d in range(d_model):
            e[d] = b_pre_D[d]
        add_rows(e, W_FD, indices, values, active)
        mean, std = (mean_B1[row, 0], std_B1[row, 0]) if layer_norm else (one - one, one)
        error2 = power = one - one
        for d in range(d_model):
            error = e[d] * std + mean - x[d]
            error2 += error * error
            power += x[d] * x[d]
        zero = power == 0
        power = max(power, tiny)  # a subnormal power would make the gradient infinite
        loss_B[row] = 0 if zero else error2 / power
        scale = one - one if zero else x_BD.dtype.type(2 / (np.float64(rows) * power)) * std
        for d in range(d_model):
            e[d] = (e[d] * std + mean - x[d]) * scale
        for place in range(active):
            if values[place] == 0:  # a Matryoshka prefix leaves zeros in between
                dz[place] = 0
                continue
            latent = indices[place]
            total = one - one
            for d in range(d_model):
                total += e[d] * W_FD[latent, d]
            dz[place] = total
        for place in range(active, k):
            dz[place] = 0


@compiled(parallel=True)
def decode(values_BK, indices_BK, W_FD, xhat_BD):
    """Fill x̂ without a bias. Rows of W after the last active place are not read; if a code is spread over shards, that
    is most of each shard's places."""
    rows = len(values_BK)
    for piece in prange((rows + ROWS_PER_PIECE - 1) // ROWS_PER_PIECE):
        first = piece * ROWS_PER_PIECE
        _decode_rows(first, min(rows, first + ROWS_PER_PIECE), values_BK, indices_BK, W_FD, xhat_BD)


@compiled(reorder=True)
def _decode_rows(first, stop, values_BK, indices_BK, W_FD, xhat_BD):
    for row in range(first, stop):
        values, xhat = values_BK[row], xhat_BD[row]
        active = len(values)
        while active > 0 and values[active - 1] == 0:
            active -= 1
        for d in range(len(xhat)):
            xhat[d] = 0
        add_rows(xhat, W_FD, indices_BK[row], values, active)


@compiled(parallel=True)
def error(x_BD, xhat_BD, rows, mean_B1, std_B1, loss_B, e_BD):
    """Fill loss and e, as `residual` does; the loss is a mean over `rows`."""
    for piece in prange((len(x_BD) + ROWS_PER_PIECE - 1) // ROWS_PER_PIECE):
        first = piece * ROWS_PER_PIECE
        _error_rows(first, min(len(x_BD), first + ROWS_PER_PIECE), x_BD, xhat_BD, rows, mean_B1, std_B1, loss_B, e_BD)


@compiled(reorder=True)
def _error_rows(first, stop, x_BD, xhat_BD, rows, mean_B1, std_B1, loss_B, e_BD):
    tiny = np.finfo(x_BD.dtype).tiny
    layer_norm = len(std_B1) > 0
    one = x_BD.dtype.type(1)
    for row in range(first, stop):
        x, xhat, e = x_BD[row], xhat_BD[row], e_BD[row]
        mean, std = (mean_B1[row, 0], std_B1[row, 0]) if layer_norm else (one - one, one)
        error2 = power = one - one
        for d in range(len(x)):
            off = xhat[d] * std + mean - x[d]
            error2 += off * off
            power += x[d] * x[d]
        zero = power == 0
        power = max(power, tiny)  # as in `residual`
        loss_B[row] = 0 if zero else error2 / power
        scale = one - one if zero else x_BD.dtype.type(2 / (np.float64(rows) * power)) * std
        for d in range(len(x)):
            e[d] = (xhat[d] * std + mean - x[d]) * scale


@compiled(parallel=True)
def code_gradient(e_BD, values_BK, indices_BK, W_FD, dz_BK):
    """Fill dz: e · W of the active latents."""
    rows = len(e_BD)
    for piece in prange((rows + ROWS_PER_PIECE - 1) // ROWS_PER_PIECE):
        first = piece * ROWS_PER_PIECE
        _code_gradient_rows(first, min(rows, first + ROWS_PER_PIECE), e_BD, values_BK, indices_BK, W_FD, dz_BK)


@compiled(reorder=True)
def _code_gradient_rows(first, stop, e_BD, values_BK, indices_BK, W_FD, dz_BK):
    zero = e_BD.dtype.type(0)
    for row in range(first, stop):
        e, values, indices, dz = e_BD[row], values_BK[row], indices_BK[row], dz_BK[row]
        for place in range(len(values)):
            total = zero
            if values[place] != 0:
                latent = indices[place]
                for d in range(len(e)):
                    total += e[d] * W_FD[latent, d]
            dz[place] = total


@compiled(reorder=True)
def add_rows(total, table, indices, weights, count):
    """total += Σ weights · table[indices], four rows at a time, so that total is loaded and stored less often."""
    whole = count // 4 * 4
    for place in range(0, whole, 4):
        a, b, c, d = indices[place], indices[place + 1], indices[place + 2], indices[place + 3]
        wa, wb, wc, wd = weights[place], weights[place + 1], weights[place + 2], weights[place + 3]
        for i in range(len(total)):
            total[i] += wa * table[a, i] + wb * table[b, i] + wc * table[c, i] + wd * table[d, i]
    for place in range(whole, count):
        a, wa = indices[place], weights[place]
        for i in range(len(total)):
            total[i] += wa * table[a, i]


@compiled()
def counting_sort(values_BK, dz_BK, indices_BK, numbers_B, offsets, rows_P, values_P, gradients_P):
    """Sort pairs by latent, rows ascending. One thread is enough: this takes under a hundredth of a step.

    Args:
        numbers_B: the number of each row; if empty, its index.
    """
    rows, k = values_BK.shape
    for row in range(rows):
        for place in range(k):
            if values_BK[row, place] != 0:
                offsets[indices_BK[row, place] + 1] += 1
    for latent in range(1, len(offsets)):
        offsets[latent] += offsets[latent - 1]
    following = offsets[:-1].copy()
    for row in range(rows):
        number = numbers_B[row] if len(numbers_B) else row
        for place in range(k):
            if values_BK[row, place] != 0:
                latent = indices_BK[row, place]
                at = following[latent]
                following[latent] = at + 1
                rows_P[at], values_P[at], gradients_P[at] = number, values_BK[row, place], dz_BK[row, place]
