"""Gradients through encoding and decoding, by the same kernels that compute without gradients.

With dz = dL/dz of the active latents, 0 where z is 0, and g = dL/dy of the decoded rows:

    z_nk = s_j (u_n · W_j) + b_j      du = Σ_k s_j dz W_j (decode)      dW_j = Σ_n s_j dz u_n
                                      db_j = Σ_n dz                     ds_j = Σ_n dz (u_n · W_j)
    y_n = Σ_k z_nk W_j                dz = g · W_j (code_gradient)      dW_j = Σ_n z g_n

j is the latent at a place, `indices[n, k]`. The choice of active latents has no gradient. Sums over rows are taken in
the order of the rows, so that the same input gives the same bits. The gradient of a whole matrix is dense, as torch's
optimisers need; training (train/step.py) never makes one.

Shapes: N rows, D width, F latents, K places of a code, P pairs of a row and an active latent.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from olmoscope.kernels.interface import Kernels

Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Gives values_NK and indices_NK of rows u_ND, without gradients."""


def activations(kernels: Kernels, choose: Choose, u_ND: Tensor, W_enc_FD: Tensor, bias_F: Tensor,
                scale_F: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result of `choose`, with gradients if any are needed: values are scale · (u · W) + bias where over 0."""
    if _asked(u_ND, W_enc_FD, bias_F, scale_F):
        return cast(tuple[Tensor, Tensor], _Activations.apply(  # type: ignore[no-untyped-call]
            kernels, choose, u_ND, W_enc_FD, bias_F, scale_F))
    with torch.no_grad():
        return choose(u_ND.detach())


def decoded(kernels: Kernels, values_NK: Tensor, indices_NK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Σ_k values · W[indices], `[N, D]`, with gradients if any are needed."""
    if _asked(values_NK, W_dec_FD):
        return cast(Tensor, _Decoded.apply(  # type: ignore[no-untyped-call]
            kernels, values_NK, indices_NK, W_dec_FD))
    return kernels.decode(values_NK.detach(), indices_NK, W_dec_FD.detach())


def _asked(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Activations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, choose: Choose, u_ND: Tensor, W_enc_FD: Tensor, bias_F: Tensor,
                scale_F: Tensor | None) -> tuple[Tensor, Tensor]:
        values_NK, indices_NK = choose(u_ND.detach())
        ctx.kernels = kernels
        ctx.save_for_backward(u_ND, W_enc_FD, scale_F, values_NK, indices_NK)
        ctx.mark_non_differentiable(indices_NK)
        return values_NK, indices_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, values_gradient_NK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        u_ND, W_enc_FD, scale_F, values_NK, indices_NK = ctx.saved_tensors
        kernels, (_, _, needs_u, needs_W, needs_bias, needs_scale) = ctx.kernels, ctx.needs_input_grad
        u_ND, W_enc_FD = u_ND.detach(), W_enc_FD.detach()
        dz_NK = torch.where(values_NK > 0, values_gradient_NK, 0)
        dp_NK = dz_NK if scale_F is None else dz_NK * scale_F.detach()[indices_NK]
        F = len(W_enc_FD)
        du_ND = kernels.decode(dp_NK, indices_NK, W_enc_FD) if needs_u else None
        dW_FD = _sums_by_latent(kernels, dp_NK, indices_NK, u_ND, F) if needs_W else None
        ones_N1 = dz_NK.new_ones(len(dz_NK), 1)
        dbias_F = _sums_by_latent(kernels, dz_NK, indices_NK, ones_N1, F).squeeze(1) if needs_bias else None
        dscale_F = None
        if needs_scale:
            p_NK = kernels.code_gradient(u_ND, values_NK, indices_NK, W_enc_FD)
            dscale_F = _sums_by_latent(kernels, dz_NK * p_NK, indices_NK, ones_N1, F).squeeze(1)
        return None, None, du_ND, dW_FD, dbias_F, dscale_F


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, values_NK: Tensor, indices_NK: Tensor, W_dec_FD: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(values_NK, indices_NK, W_dec_FD)
        return kernels.decode(values_NK.detach(), indices_NK, W_dec_FD.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_ND: Tensor) -> tuple[Tensor | None, ...]:
        values_NK, indices_NK, W_dec_FD = (tensor.detach() for tensor in ctx.saved_tensors)
        _, needs_values, _, needs_W = ctx.needs_input_grad
        g_ND = g_ND.contiguous()
        dvalues_NK = dW_FD = None
        if needs_values:  # for all places: y is linear in a value, even where that is 0
            dvalues_NK = ctx.kernels.code_gradient(g_ND, torch.ones_like(values_NK), indices_NK, W_dec_FD)
        if needs_W:
            dW_FD = _sums_by_latent(ctx.kernels, values_NK, indices_NK, g_ND, len(W_dec_FD))
        return None, dvalues_NK, None, dW_FD


def _sums_by_latent(kernels: Kernels, weights_NK: Tensor, indices_NK: Tensor, rows_ND: Tensor, F: int) -> Tensor:
    """Σ weights · row over the places of each latent, `[F, D]`.

    This is `decode` with rows and latents exchanged: the places sorted by latent are codes of varying length.
    """
    # sort_pairs leaves out places whose value is not over 0; a weight may be negative.
    there_NK = (weights_NK != 0).to(weights_NK.dtype)
    pairs = kernels.sort_pairs(there_NK, weights_NK, indices_NK, F)
    active = slice(0, int(pairs.offsets[-1]))
    return torch.nn.functional.embedding_bag(
        pairs.rows[active].long(), rows_ND, pairs.offsets, per_sample_weights=pairs.gradients[active], mode="sum",
        include_last_offset=True)
