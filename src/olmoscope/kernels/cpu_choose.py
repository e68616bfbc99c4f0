"""The top k of a row on a CPU among candidates that a rough product proposes, by their exact scores.

Shapes: C rows, D d_model, F latents, K active latents a row, M candidates a row.
"""

import numpy as np
from numba import prange

from olmoscope.kernels import cpu_topk
from olmoscope.kernels.compile import compiled

ROWS_PER_PIECE = 8


@compiled(parallel=True)
def choose(pre_CF, u_CD, W_FD, b_latent_F, candidates, values_CK, indices_CK):
    """ReLU of the top k, by exact scores, of the top candidates of pre, row by row, descending."""
    rows = len(u_CD)
    for piece in prange((rows + ROWS_PER_PIECE - 1) // ROWS_PER_PIECE):
        first = piece * ROWS_PER_PIECE
        _choose_rows(first, min(rows, first + ROWS_PER_PIECE), pre_CF, u_CD, W_FD, b_latent_F, candidates, values_CK,
                     indices_CK)


@compiled()
def _choose_rows(first, stop, pre_CF, u_CD, W_FD, b_latent_F, candidates, values_CK, indices_CK):
    rough_CM = np.empty((stop - first, candidates), pre_CF.dtype)
    indices_CM = np.empty((stop - first, candidates), np.int64)
    exact_M = np.empty(candidates, W_FD.dtype)
    cpu_topk.topk_rows(0, stop - first, pre_CF[first:stop], rough_CM, indices_CM)
    for row in range(first, stop):
        indices_M = indices_CM[row - first]
        if _scores(u_CD[row], W_FD, b_latent_F, indices_M, exact_M):
            cpu_topk.rank(exact_M, indices_M, values_CK[row], indices_CK[row])
        else:  # not a number: to be seen in the loss, as with the exact product
            values_CK[row] = np.nan
            for place in range(values_CK.shape[1]):
                indices_CK[row, place] = place


@compiled(reorder=True)
def _scores(u, W_FD, b_latent_F, indices_M, exact_M):
    """Fill exact with u · W + b of some latents; says whether all are numbers. Four latents share each load of u."""
    count, d_model = len(indices_M), len(u)
    for place in range(0, count, 4):
        a, b = W_FD[indices_M[place]], W_FD[indices_M[min(place + 1, count - 1)]]
        c, d = W_FD[indices_M[min(place + 2, count - 1)]], W_FD[indices_M[min(place + 3, count - 1)]]
        sum_a = sum_b = sum_c = sum_d = u.dtype.type(0)
        for at in range(d_model):
            sum_a += u[at] * a[at]
            sum_b += u[at] * b[at]
            sum_c += u[at] * c[at]
            sum_d += u[at] * d[at]
        exact_M[place] = sum_a + b_latent_F[indices_M[place]]
        for more, total in ((1, sum_b), (2, sum_c), (3, sum_d)):
            if place + more < count:
                exact_M[place + more] = total + b_latent_F[indices_M[place + more]]
    return np.isfinite(exact_M).all()
