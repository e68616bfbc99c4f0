"""Logistic regression with an L2 penalty, solved to its optimum by Newton's method, and the area under a ROC curve.

Everything is float64 and solved to the optimum, so a probe does not depend on a solver's settings, and the same data
give the same probe anywhere. Shapes: N rows, P columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 200
"""Most Newton steps; about ten are needed, or fifty with a weak penalty on separable rows."""
CLOSE = 1e-7
"""Stop after a step whose expected relative decrease of the objective is below this; what is left is about its
square."""


@dataclass(frozen=True)
class Probe:
    """A direction and an offset; a score over 0 means class 1."""

    w_P: Tensor
    b: Tensor

    def __call__(self, x_NP: Tensor) -> Tensor:
        """Log odds of class 1, `[N]`."""
        return x_NP.to(self.w_P) @ self.w_P + self.b


def fit(x_NP: Tensor, y_N: Tensor, C: float, start: Probe | None = None, *, balanced: bool = False) -> Probe:
    """The minimum of C Σ s log(1 + exp(−±(w·x + b))) + ‖w‖²/2; the offset b has no penalty.

    Args:
        x_NP: of any float dtype.
        y_N: bool; both classes must occur.
        start: the starting point, for a series of penalties on the same rows.
        balanced: whether s is N / (2 · rows of the class); otherwise it is 1.
    """
    y_N = y_N.to(x_NP.device)
    assert bool(y_N.any()) and not bool(y_N.all()), "one class alone has no probe"
    mean_P = x_NP.double().mean(0)
    basis_PQ, u_NQ = _row_space(x_NP.double() - mean_P)
    u_NQ = torch.cat([u_NQ, u_NQ.new_ones(len(u_NQ), 1)], dim=1)
    sign_N = torch.where(y_N, 1.0, -1.0).double()
    weight_N = torch.full_like(sign_N, C)
    if balanced:
        weight_N *= torch.where(y_N, len(y_N) / (2 * y_N.sum()), len(y_N) / (2 * (~y_N).sum()))
    v_Q = u_NQ.new_zeros(u_NQ.shape[1])
    if start is not None:
        w_P = start.w_P.to(u_NQ)
        v_Q = torch.cat([w_P if basis_PQ is None else basis_PQ.T @ w_P, (start.b + mean_P @ w_P)[None]])
    penalty_Q = torch.ones_like(v_Q)
    penalty_Q[-1] = 0
    v_Q = _newton(u_NQ * sign_N[:, None], weight_N, penalty_Q, v_Q)
    w_P = v_Q[:-1] if basis_PQ is None else basis_PQ @ v_Q[:-1]
    return Probe(w_P, v_Q[-1] - mean_P @ w_P)


def _row_space(x_NP: Tensor) -> tuple[Tensor | None, Tensor]:
    """An orthonormal basis `[P, Q]` of the rows' span, and the rows in that basis, if it has fewer dimensions: the
    penalty keeps the solution in the span. Otherwise None and the rows."""
    if x_NP.shape[0] >= x_NP.shape[1]:
        return None, x_NP
    basis_PQ = torch.linalg.qr(x_NP.T).Q
    return basis_PQ, x_NP @ basis_PQ


def _newton(a_NQ: Tensor, weight_N: Tensor, penalty_Q: Tensor, v_Q: Tensor) -> Tensor:
    """The minimum of Σ weight log(1 + exp(−a·v)) + Σ penalty v²/2, from `v_Q`, by Newton steps that are halved until
    the objective falls."""
    def objective(v_Q: Tensor) -> Tensor:
        return weight_N @ torch.nn.functional.softplus(-(a_NQ @ v_Q)) + penalty_Q @ v_Q.square() / 2

    value = objective(v_Q)
    for _ in range(ROUNDS):
        wrong_N = torch.sigmoid(-(a_NQ @ v_Q))
        gradient_Q = penalty_Q * v_Q - a_NQ.T @ (weight_N * wrong_N)
        hessian_QQ = (a_NQ.T * (weight_N * wrong_N * (1 - wrong_N))) @ a_NQ
        diagonal_Q = hessian_QQ.diagonal()
        diagonal_Q += penalty_Q + 1e-12 * (1 + diagonal_Q.max())  # rows far from the boundary add no curvature
        step_Q = torch.cholesky_solve(gradient_Q[:, None], torch.linalg.cholesky(hessian_QQ))[:, 0]
        promised = gradient_Q @ step_Q
        if promised <= CLOSE * value:
            return v_Q - step_Q
        size = 1.0
        while objective(v_Q - size * step_Q) > value - 1e-4 * size * promised and size > 1e-10:
            size /= 2
        v_Q = v_Q - size * step_Q
        value = objective(v_Q)
    return v_Q


def area_under_curve(score_N: Tensor, y_N: Tensor) -> float:
    """The area under the ROC curve: how often a row of class 1 has a higher score than one of class 0; a tie counts
    half.

    Args:
        y_N: bool; both classes must occur.
    """
    _, place_N, count_V = torch.unique(score_N.double(), return_inverse=True, return_counts=True)
    rank_V = count_V.cumsum(0) - (count_V - 1) / 2  # mean rank of equal scores, from 1
    positive = int(y_N.sum())
    negative = len(y_N) - positive
    above = float(rank_V[place_N][y_N].double().sum()) - positive * (positive + 1) / 2
    return above / (positive * negative)


def accuracy(score_N: Tensor, y_N: Tensor) -> float:
    """Share of rows whose score is on the side of 0 that belongs to their class."""
    return float(((score_N > 0) == y_N).double().mean())
