"""The hot operations (interface.py) in plain torch, on any device: the other kernels must agree with them.

Shapes: B rows, D d_model, F latents, K active latents per row, C latents (or rows) of one chunk.

No `[B, F]` code and no `[F, D]` gradient is ever whole in memory: the encoder's product is taken over chunks of rows
and reduced to its top k immediately; the gradient of the dictionary is computed and used for one chunk of latents at a
time.
"""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from olmoscope.kernels.interface import AdamStep, Moments, Quantized, Residual, SortedPairs
from olmoscope.kernels.rounding import random_bits, round_to_bfloat16, step_seed

PRE_ACTIVATIONS_AT_ONCE = 2**24
"""Most elements of the encoder product held at a time (64 MiB in float32)."""

GRADIENT_AT_ONCE = 2**20
"""Most elements of the dictionary's gradient held at a time (4 MiB in float32: it should stay in cache)."""

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def encode_topk(u_BD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values_BK = u_BD.new_empty(len(u_BD), k)
    indices_BK = torch.empty(len(u_BD), k, dtype=torch.int64, device=u_BD.device)
    rows = rows_at_once(len(W_enc_FD))
    for start in range(0, len(u_BD), rows):
        chunk = slice(start, start + rows)
        torch.topk(product(u_BD[chunk], W_enc_FD, b_latent_F), k, out=(values_BK[chunk], indices_BK[chunk]))
    return values_BK.relu_(), indices_BK


def quantize(W_enc_FD: Tensor, into: Quantized | None = None) -> Quantized:
    weights_FD, scales_F1 = quantize_rows(W_enc_FD)
    if into is None:
        return Quantized(weights_FD, scales_F1.squeeze(1))
    into.weights.copy_(weights_FD)
    into.scales_F.copy_(scales_F1.squeeze(1))
    return into


def quantize_rows(rows_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127 as int8, and the value of 1 in each row, `[R, 1]` float32."""
    scales_R1 = rows_RD.abs().amax(dim=1, keepdim=True).float() / 127
    inverse_R1 = torch.where(scales_R1 > 0, 1 / scales_R1, 0)
    return (rows_RD * inverse_R1).round_().to(torch.int8), scales_R1


def encode_candidates(u_BD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor, quantized: Quantized, k: int,
                      margin: int) -> tuple[Tensor, Tensor]:
    values_BK = u_BD.new_empty(len(u_BD), k)
    indices_BK = torch.empty(len(u_BD), k, dtype=torch.int64, device=u_BD.device)
    candidates = min(k + margin, len(W_enc_FD))
    weights_FD = quantized.weights.float()  # sums of products of bytes are whole numbers, nearly exact in float32
    rows = rows_at_once(len(W_enc_FD))
    for start in range(0, len(u_BD), rows):
        chunk = slice(start, start + rows)
        inputs_CD, scales_C1 = quantize_rows(u_BD[chunk])
        rough_CF = (inputs_CD.float() @ weights_FD.T) * quantized.scales_F * scales_C1 + b_latent_F
        chosen_CM = rough_CF.topk(candidates).indices
        exact_CM = scores(u_BD[chunk], W_enc_FD, b_latent_F, chosen_CM)
        values_BK[chunk], order_CK = exact_CM.topk(k)
        indices_BK[chunk] = chosen_CM.gather(1, order_CK)
    return values_BK.relu_(), indices_BK


def scores(u_CD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor, chosen_CM: Tensor) -> Tensor:
    """u · W + b of some latents of each row, `[C, M]`."""
    exact_CM = b_latent_F[chosen_CM]
    rows = max(1, PRE_ACTIVATIONS_AT_ONCE // (W_enc_FD.shape[1] * chosen_CM.shape[1]))
    for start in range(0, len(u_CD), rows):
        chunk = slice(start, start + rows)
        exact_CM[chunk] += torch.bmm(W_enc_FD[chosen_CM[chunk]], u_CD[chunk].unsqueeze(2)).squeeze(2)
    return exact_CM


def rows_at_once(d_sae: int) -> int:
    return max(1, PRE_ACTIVATIONS_AT_ONCE // d_sae)


def workspace_bytes(rows: int, d_model: int, d_sae: int, places: int, margin: int | None = None) -> int:
    pre_CF = 4 * min(rows, rows_at_once(d_sae)) * d_sae
    most = [pre_CF, residual_bytes(rows, d_model, places), sort_bytes(rows * places, d_sae),
            # For a chunk: the gradient, both moments, their old values, new rows, and terms of these; random bits as
            # 64-bit integers.
            72 * min(max(GRADIENT_AT_ONCE, d_model), d_sae * d_model)]
    if margin is not None:
        weights_FD = 4 * d_sae * d_model
        most += [weights_FD + 2 * pre_CF + 4 * rows * d_model + 12 * rows * (places + margin),
                 weights_FD + pre_CF + score_bytes(rows, d_model, places + margin), quantize_bytes(d_sae, d_model)]
    return max(most)


def residual_bytes(rows: int, d_model: int, places: int) -> int:
    """Workspace of `residual`: the squares of all rows, or the gathered dictionary rows of one chunk."""
    return max(4 * rows * d_model, _gathered_bytes(rows, d_model, places))


def score_bytes(rows: int, d_model: int, candidates: int) -> int:
    """Workspace of `scores`, including its result and the indices it is given."""
    return _gathered_bytes(rows, d_model, candidates) + 12 * rows * candidates


def sort_bytes(pairs: int, d_sae: int) -> int:
    """Workspace of `sort_pairs`: keys, sorted keys, their order, and as much again for the sort itself."""
    return 48 * pairs + 8 * d_sae


def quantize_bytes(d_sae: int, d_model: int) -> int:
    """Workspace of `quantize`: all weights in units of their steps, in float32 and as bytes."""
    return 5 * d_sae * d_model + 8 * d_sae


def _gathered_bytes(rows: int, d_model: int, places: int) -> int:
    return 4 * min(rows * places * d_model, max(PRE_ACTIVATIONS_AT_ONCE, places * d_model))


def product(u_CD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor) -> Tensor:
    return torch.addmm(b_latent_F, u_CD, W_enc_FD.T)


def decode(values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    if not values_BK.numel():  # embedding_bag has no bags without places
        return W_dec_FD.new_zeros(len(values_BK), W_dec_FD.shape[1])
    return torch.nn.functional.embedding_bag(indices_BK, W_dec_FD, per_sample_weights=values_BK, mode="sum")


def residual(x_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor, b_pre_D: Tensor,
             mean_B1: Tensor | None, std_B1: Tensor | None) -> Residual:
    xhat_BD = decode(values_BK, indices_BK, W_dec_FD).add_(b_pre_D)
    loss_B, e_BD = _error_in_place(x_BD, xhat_BD, len(x_BD), mean_B1, std_B1)
    return Residual(loss_B, e_BD, code_gradient(e_BD, values_BK, indices_BK, W_dec_FD))


def error(x_BD: Tensor, xhat_BD: Tensor, rows: int, mean_B1: Tensor | None,
          std_B1: Tensor | None) -> tuple[Tensor, Tensor]:
    return _error_in_place(x_BD, xhat_BD.clone(), rows, mean_B1, std_B1)


def _error_in_place(x_BD: Tensor, error_BD: Tensor, rows: int, mean_B1: Tensor | None,
                    std_B1: Tensor | None) -> tuple[Tensor, Tensor]:
    """`error`, with e written over the reconstruction."""
    if mean_B1 is not None and std_B1 is not None:
        error_BD.mul_(std_B1).add_(mean_B1)
    error_BD.sub_(x_BD)
    power_B1 = x_BD.square().sum(dim=1, keepdim=True)
    zero_B1 = power_B1 == 0
    power_B1.clamp_min_(torch.finfo(x_BD.dtype).tiny)  # a subnormal power would make the gradient infinite
    loss_B = (error_BD.square().sum(dim=1, keepdim=True) / power_B1).masked_fill_(zero_B1, 0).squeeze(1).double()
    scale_B1 = (2 / (rows * power_B1)).masked_fill_(zero_B1, 0)
    if std_B1 is not None:
        scale_B1 = scale_B1 * std_B1
    return loss_B, error_BD.mul_(scale_B1)


def code_gradient(e_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    dz_BK = torch.empty_like(values_BK)
    rows = max(1, PRE_ACTIVATIONS_AT_ONCE // (W_dec_FD.shape[1] * values_BK.shape[1]))
    for start in range(0, len(e_BD), rows):
        chunk = slice(start, start + rows)
        dz_BK[chunk] = torch.bmm(W_dec_FD[indices_BK[chunk]], e_BD[chunk].unsqueeze(2)).squeeze(2)
    return dz_BK.masked_fill_(values_BK == 0, 0)


def sort_pairs(values_BK: Tensor, dz_BK: Tensor, indices_BK: Tensor, d_sae: int,
               rows_P: Tensor | None = None) -> SortedPairs:
    key_BK = torch.where(values_BK != 0, indices_BK, d_sae)
    latents, order = torch.sort(key_BK.flatten(), stable=True)
    bounds = torch.arange(d_sae + 1, device=latents.device)
    return SortedPairs(
        offsets=torch.searchsorted(latents, bounds),
        rows=order // indices_BK.shape[1] if rows_P is None else rows_P[order],
        values=values_BK.flatten()[order],
        gradients=dz_BK.flatten()[order])


def update_tied(W_FD: Tensor, moments: Moments, pairs: SortedPairs, e_BD: Tensor, u_BD: Tensor,
                adam: AdamStep) -> tuple[Tensor, Tensor]:
    biases = _bias_gradients(W_FD, pairs)
    _update_rows(W_FD, moments, pairs, {"values": e_BD, "gradients": u_BD}, adam, unit=True)
    return biases


def update_encoder(W_enc_FD: Tensor, moments: Moments, pairs: SortedPairs, u_BD: Tensor,
                   adam: AdamStep) -> tuple[Tensor, Tensor]:
    biases = _bias_gradients(W_enc_FD, pairs)
    _update_rows(W_enc_FD, moments, pairs, {"gradients": u_BD}, adam, unit=False)
    return biases


def update_decoder(W_dec_FD: Tensor, moments: Moments, pairs: SortedPairs, e_BD: Tensor, adam: AdamStep) -> None:
    _update_rows(W_dec_FD, moments, pairs, {"values": e_BD}, adam, unit=True)


def _bias_gradients(W_enc_FD: Tensor, pairs: SortedPairs) -> tuple[Tensor, Tensor]:
    active = slice(0, int(pairs.offsets[-1]))
    db_latent_F = torch.segment_reduce(pairs.gradients[active], "sum", offsets=pairs.offsets, initial=0)
    return db_latent_F, W_enc_FD.T @ db_latent_F


def _update_rows(W_FD: Tensor, moments: Moments, pairs: SortedPairs, terms: dict[str, Tensor], adam: AdamStep, *,
                 unit: bool) -> None:
    """Gradient, projection if `unit`, Adam, unit norm if `unit`.

    Args:
        terms: the rows `[B, D]` that enter the gradient, by the name of the pairs' tensor that weights them.
    """
    for chunk, dW_CD in _row_gradients(pairs, terms):
        W_CD = W_FD[chunk]
        if unit:
            dW_CD.addcmul_(W_CD, torch.linalg.vecdot(dW_CD, W_CD).unsqueeze(1), value=-1)
        touched_C = pairs.offsets[chunk.start : chunk.stop + 1].diff() > 0
        _adam_rows(W_CD, dW_CD, moments, chunk, touched_C, adam, unit=unit)


def _row_gradients(pairs: SortedPairs, terms: dict[str, Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of latents and their gradient `[C, D]`; together they cover all latents, each once."""
    latents = len(pairs.offsets) - 1
    rows, d_model = next(iter(terms.values())).shape
    size = max(1, GRADIENT_AT_ONCE // d_model)
    starts = range(0, latents, size)
    firsts = [*pairs.offsets[:-1:size].tolist(), int(pairs.offsets[-1])]  # one wait for the device, not one per chunk
    for number, start in enumerate(starts):
        chunk = slice(start, min(start + size, latents))
        inside = slice(firsts[number], firsts[number + 1])
        offsets = pairs.offsets[chunk.start : chunk.stop + 1] - firsts[number]
        dW_CD = torch.zeros(chunk.stop - chunk.start, d_model, dtype=pairs.values.dtype, device=offsets.device)
        for weights, rows_BD in terms.items():
            weights_CB = torch.sparse_csr_tensor(offsets, pairs.rows[inside], getattr(pairs, weights)[inside],
                                                 (len(dW_CD), rows), check_invariants=False)
            dW_CD = torch.addmm(dW_CD, weights_CB, rows_BD)
        yield chunk, dW_CD


def _adam_rows(W_CD: Tensor, dW_CD: Tensor, moments: Moments, chunk: slice, touched_C: Tensor, adam: AdamStep, *,
               unit: bool) -> None:
    first_CD, second_CD = moments.first[chunk].to(W_CD.dtype), moments.second[chunk].to(W_CD.dtype)
    steps_C1: Tensor | int = 1
    if moments.updated is not None:
        steps_C1 = (adam.count - moments.updated[chunk]).unsqueeze(1).to(W_CD.dtype)
        moments.updated[chunk].masked_fill_(touched_C, adam.count)
    first_CD = first_CD * adam.beta1**steps_C1 + (1 - adam.beta1) * dW_CD
    second_CD = second_CD * adam.beta2**steps_C1 + (1 - adam.beta2) * dW_CD.square()
    new_CD = W_CD - adam.rate * first_CD / (second_CD.sqrt() * adam.root_scale + adam.eps)
    if unit:
        new_CD /= new_CD.norm(dim=1, keepdim=True)
    if moments.first.dtype != W_CD.dtype:
        rows, d_model = W_CD.shape
        elements = torch.arange(chunk.start * d_model, chunk.stop * d_model, device=W_CD.device)
        bits = random_bits(elements, step_seed(adam.count, adam.shard)).view(rows, d_model)
        first_CD, second_CD = round_to_bfloat16(first_CD, bits & 0xFFFF), round_to_bfloat16(second_CD, bits >> 16)
    keep_C1 = touched_C.unsqueeze(1) if moments.updated is not None else torch.ones_like(touched_C).unsqueeze(1)
    for target, new in ((W_CD, new_CD), (moments.first[chunk], first_CD), (moments.second[chunk], second_CD)):
        target.copy_(torch.where(keep_C1, new, target))
