"""Updates of the matrices that the product does not have (lever_step.py). F latents, D width, B rows, P pairs."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from olmoscope.kernels.interface import SortedPairs
from olmoscope.sae.topk import TopK

if TYPE_CHECKING:
    from lever_step import LeverStep

MOMENTUM = {"signum": 0.9, "muon": 0.95}
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the odd polynomial that Muon iterates (Jordan et al. 2024), 5 times."""


def dense_gradients(sae: TopK, pairs: SortedPairs, e_BD: Tensor, u_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of encoder and decoder, `[F, D]` each; the gradient of tied weights is their sum."""
    count = int(pairs.offsets[-1])
    rows_P = pairs.rows[:count].long()
    latents_P = torch.arange(sae.d_sae).repeat_interleave(pairs.offsets.diff())
    encoder_FD, decoder_FD = torch.zeros_like(sae.W_dec), torch.zeros_like(sae.W_dec)
    encoder_FD.index_add_(0, latents_P, pairs.gradients[:count, None] * u_BD[rows_P])
    decoder_FD.index_add_(0, latents_P, pairs.values[:count, None] * e_BD[rows_P])
    return encoder_FD, decoder_FD


def momentum_update(step: "LeverStep", pairs: SortedPairs, e_BD: Tensor, u_BD: Tensor, lr: float,
                    optimiser: str) -> tuple[Tensor, Tensor]:
    """A step of Signum (the sign of the momentum) or of Muon (the momentum with equal singular values) for both
    matrices; returns what Adam's update would give for the biases. Adam's first moment is the momentum."""
    sae, beta = step.sae, MOMENTUM[optimiser]
    encoder_FD, decoder_FD = dense_gradients(sae, pairs, e_BD, u_BD)
    decoder_FD.addcmul_(sae.W_dec, torch.linalg.vecdot(decoder_FD, sae.W_dec).unsqueeze(1), value=-1)
    db_latent_F = torch.segment_reduce(pairs.gradients[:int(pairs.offsets[-1])], "sum", offsets=pairs.offsets,
                                       initial=0)
    b_pull_D = sae.W_enc.T @ db_latent_F
    for name, W_FD, dW_FD, rate in (("W_enc", sae.W_enc, encoder_FD, lr),
                                    ("W_dec", sae.W_dec, decoder_FD, lr * step.adam.decoder_rate)):
        first_FD = step.moments[name].first
        first_FD.lerp_(dW_FD, 1 - beta)
        W_FD.sub_(rate * (first_FD.sign() if optimiser == "signum" else orthogonalised(dW_FD.lerp(first_FD, beta))))
    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return db_latent_F, b_pull_D


def orthogonalised(G_FD: Tensor) -> Tensor:
    """U V^T of G = U S V^T, scaled so that the root mean square of its entries is 1 (as in Adam's first step). Five
    iterations of Muon's polynomial, on the D x D Gram matrix."""
    a, b, c = NEWTON_SCHULZ
    X_FD = G_FD / G_FD.norm().clamp_min(1e-30)
    gram_DD, there_DD = X_FD.T @ X_FD, torch.eye(G_FD.shape[1])
    for _ in range(5):
        factor_DD = a * torch.eye(len(gram_DD)) + b * gram_DD + c * gram_DD @ gram_DD
        there_DD, gram_DD = there_DD @ factor_DD, factor_DD @ gram_DD @ factor_DD
    return X_FD @ there_DD * len(G_FD) ** 0.5


def limited(ratio_F: Tensor, power: float) -> Tensor:
    """Factors for the learning rate: `ratio ** power`, limited to the range 1/2 to 2."""
    return ratio_F.pow(power).clamp(0.5, 2.0)


def per_row(sae: TopK, factor_F: Tensor, update: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """An update of the matrices that moves each latent's rows by its factor times as far."""
    before = sae.W_enc.clone(), sae.W_dec.clone()
    found = update()
    for old_FD, W_FD in zip(before, (sae.W_enc, sae.W_dec), strict=True):
        W_FD.copy_(old_FD + factor_F[:, None] * (W_FD - old_FD))
    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return found


def aligned(W_enc_FD: Tensor, W_dec_FD: Tensor) -> None:
    """Move each encoder row along its decoder row until their inner product is 1 (arXiv:2605.18629)."""
    W_enc_FD.addcmul_(W_dec_FD, 1 - torch.linalg.vecdot(W_enc_FD, W_dec_FD).unsqueeze(1))
