"""The top k of each row on a CPU, by exact score, among the candidates that a rough product proposed.

Shapes: B rows, D d_model, F latents, K active latents per row, M candidates per row, P = B M pairs.
"""

import numpy as np
from numba import prange

from olmoscope.kernels import cpu_topk
from olmoscope.kernels.compile import compiled

PAIRS_PER_PIECE = 256
ROWS_PER_PIECE = 32


@compiled(parallel=True)
def scores(u_BD, W_FD, b_latent_F, indices_BM, exact_BM):
    """Fill `exact_BM` with u · W + b of each row's candidates.

    Pairs are taken latent by latent, so a wide dictionary is read from memory once, while the rows stay in cache.
    """
    order_P = _by_latent(indices_BM, len(W_FD))
    for piece in prange((len(order_P) + PAIRS_PER_PIECE - 1) // PAIRS_PER_PIECE):
        first = piece * PAIRS_PER_PIECE
        _score_pairs(order_P[first : first + PAIRS_PER_PIECE], u_BD, W_FD, b_latent_F, indices_BM, exact_BM)


@compiled()
def _by_latent(indices_BM, latents):
    """The places of the candidates, sorted by latent."""
    rows, candidates = indices_BM.shape
    following = np.zeros(latents + 1, np.int64)
    for row in range(rows):
        for place in range(candidates):
            following[indices_BM[row, place] + 1] += 1
    for latent in range(latents):
        following[latent + 1] += following[latent]
    order_P = np.empty(rows * candidates, np.int64)
    for row in range(rows):
        for place in range(candidates):
            latent = indices_BM[row, place]
            order_P[following[latent]] = row * candidates + place
            following[latent] += 1
    return order_P


@compiled(reorder=True)
def _score_pairs(order_P, u_BD, W_FD, b_latent_F, indices_BM, exact_BM):
    """Score four pairs at a time, since each addition to a single sum would wait for the one before; the last pair may
    be scored several times."""
    last, candidates = len(order_P) - 1, indices_BM.shape[1]
    for pair in range(0, last + 1, 4):
        i, j, k, m = (order_P[pair], order_P[min(pair + 1, last)], order_P[min(pair + 2, last)],
                      order_P[min(pair + 3, last)])
        row_i, row_j, row_k, row_m = i // candidates, j // candidates, k // candidates, m // candidates
        at_i, at_j, at_k, at_m = i % candidates, j % candidates, k % candidates, m % candidates
        latent_i, latent_j = indices_BM[row_i, at_i], indices_BM[row_j, at_j]
        latent_k, latent_m = indices_BM[row_k, at_k], indices_BM[row_m, at_m]
        sum_i = sum_j = sum_k = sum_m = u_BD.dtype.type(0)
        for d in range(u_BD.shape[1]):
            sum_i += u_BD[row_i, d] * W_FD[latent_i, d]
            sum_j += u_BD[row_j, d] * W_FD[latent_j, d]
            sum_k += u_BD[row_k, d] * W_FD[latent_k, d]
            sum_m += u_BD[row_m, d] * W_FD[latent_m, d]
        exact_BM[row_i, at_i] = sum_i + b_latent_F[latent_i]
        exact_BM[row_j, at_j] = sum_j + b_latent_F[latent_j]
        exact_BM[row_k, at_k] = sum_k + b_latent_F[latent_k]
        exact_BM[row_m, at_m] = sum_m + b_latent_F[latent_m]


@compiled(parallel=True)
def rank(exact_BM, indices_BM, values_BK, indices_BK):
    """ReLU of the k best candidates of each row, descending."""
    rows = len(exact_BM)
    for piece in prange((rows + ROWS_PER_PIECE - 1) // ROWS_PER_PIECE):
        first = piece * ROWS_PER_PIECE
        _rank_rows(first, min(rows, first + ROWS_PER_PIECE), exact_BM, indices_BM, values_BK, indices_BK)


@compiled()
def _rank_rows(first, stop, exact_BM, indices_BM, values_BK, indices_BK):
    for row in range(first, stop):
        if np.isfinite(exact_BM[row]).all():
            cpu_topk.rank(exact_BM[row], indices_BM[row], values_BK[row], indices_BK[row])
        else:  # give NaN, so that it shows in the loss, as with the exact product
            values_BK[row] = np.nan
            for place in range(values_BK.shape[1]):
                indices_BK[row, place] = place
