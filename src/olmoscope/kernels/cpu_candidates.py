"""The top k on a CPU from a product in 8 bits: it proposes k + margin latents per row, and their exact scores decide.

Shapes: B rows, C rows of one chunk, D d_model, F latents, K active latents per row, M = K + margin candidates.
"""

import torch
from torch import Tensor

from olmoscope.kernels import cpu_choose, cpu_int8, cpu_int8_avx2, cpu_topk
from olmoscope.kernels.compile import call
from olmoscope.kernels.interface import Quantized
from olmoscope.processor import has

INT8 = cpu_int8_avx2 if has("avx2") and not cpu_int8.FAST else cpu_int8
"""The 8-bit product for this processor."""

PRE_ACTIVATIONS_AT_ONCE = 2**22
"""Elements of the encoder product held at a time (16 MiB in float32, so that the top-k finds them in cache; over 32
MiB, the C library would return the memory and fetch it again, page by page, for each chunk)."""

ROWS_AT_LEAST = 256
"""The fewest rows of a chunk, however wide the dictionary: the product is slow on fewer."""


def quantize(W_enc_FD: Tensor, into: Quantized | None = None) -> Quantized:
    if into is None:
        into = INT8.empty(*W_enc_FD.shape)
    call(INT8.quantize_weights, W_enc_FD, into.weights, into.start, into.scales_F)
    return into


def candidate_bytes(rows: int, d_model: int, d_sae: int, places: int, margin: int) -> int:
    """Workspace and result of `encode_candidates`: rows as bytes, biases, one chunk of the product, codes."""
    tile, block = int(INT8.ROWS), int(INT8.LATENTS)  # rows and latents are rounded up to multiples of these
    chunk = min(rows, max(ROWS_AT_LEAST, PRE_ACTIVATIONS_AT_ONCE // d_sae)) + tile
    product = 4 * (1 + chunk) * (d_sae + block)
    return (rows + tile) * (d_model + 8) + product + (4 * chunk + 32 * rows) * (places + margin)


def encode_candidates(u_BD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor, quantized: Quantized, k: int,
                      margin: int) -> tuple[Tensor, Tensor]:
    (rows, width), latents = (len(u_BD), len(quantized.scales_F)), len(W_enc_FD)
    tile = INT8.ROWS
    whole = -(-rows // tile) * tile
    inputs_BD = torch.empty(whole, 4 * quantized.weights.shape[1], dtype=torch.uint8)
    input_scales_B = torch.empty(whole)
    call(INT8.quantize_inputs, u_BD, inputs_BD, input_scales_B)
    bias_F = torch.full((width,), -torch.inf)
    bias_F[:latents] = b_latent_F
    indices_BM = torch.empty(rows, min(k + margin, latents), dtype=torch.int64)
    chunks = -(-rows // max(ROWS_AT_LEAST, PRE_ACTIVATIONS_AT_ONCE // width))
    at_once = -(-rows // (chunks * tile)) * tile  # chunks of equal size, since each reads all the weights
    pre_CF, rough_CM = torch.empty(at_once, width), torch.empty(at_once, indices_BM.shape[1])
    for start in range(0, rows, at_once):
        chunk = slice(start, start + at_once)
        inputs_CD, indices_CM = inputs_BD[chunk], indices_BM[chunk]
        call(INT8.product, inputs_CD, quantized.weights, quantized.start, quantized.scales_F, bias_F,
             input_scales_B[chunk], pre_CF[: len(inputs_CD)])
        call(cpu_topk.topk, pre_CF[: len(indices_CM)], rough_CM[: len(indices_CM)], indices_CM)
    exact_BM = u_BD.new_empty(indices_BM.shape)
    call(cpu_choose.scores, u_BD, W_enc_FD, b_latent_F, indices_BM, exact_BM)
    values_BK, indices_BK = u_BD.new_empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    call(cpu_choose.rank, exact_BM, indices_BM, values_BK, indices_BK)
    return values_BK, indices_BK
