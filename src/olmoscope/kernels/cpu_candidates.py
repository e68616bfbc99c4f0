"""The top k on a CPU from a product in 8 bits: it proposes k + margin latents a row, their exact scores decide.

Shapes: B rows, C rows of one chunk, D d_model, F latents, K active latents a row.
"""

import numpy as np
import torch
from torch import Tensor

from olmoscope.kernels import cpu_choose, cpu_int8
from olmoscope.kernels.compile import call
from olmoscope.kernels.interface import Quantized

PRE_ACTIVATIONS_AT_ONCE = 2**22
"""Elements of the product held at a time (16 MiB)."""
ROWS_AT_LEAST = 252


def quantize(W_enc_FD: Tensor, into: Quantized | None = None) -> Quantized:
    """F is rounded up to whole blocks of `cpu_int8.product`."""
    latents, d_model = W_enc_FD.shape
    if into is None:
        blocks = -(-latents // cpu_int8.LATENTS)
        width = blocks * cpu_int8.LATENTS
        into = Quantized(torch.empty(blocks, -(-d_model // 4), cpu_int8.LATENTS, 4, dtype=torch.int8),
                         torch.empty(width), torch.empty(width, dtype=torch.int32))
    call(cpu_int8.quantize_weights, W_enc_FD, into.weights, into.start_F, into.scales_F)
    return into


def encode_candidates(u_BD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor, quantized: Quantized, k: int,
                      margin: int) -> tuple[Tensor, Tensor]:
    latents, rows = len(W_enc_FD), len(u_BD)
    width = len(quantized.scales_F)
    tile = cpu_int8.ROWS
    at_once = max(ROWS_AT_LEAST, PRE_ACTIVATIONS_AT_ONCE // width // tile * tile)
    bias_F = torch.full((width,), -torch.inf)
    bias_F[:latents] = b_latent_F
    room = -(-min(rows, at_once) // tile) * tile
    inputs_CD = torch.empty(room, 4 * quantized.weights.shape[1], dtype=torch.uint8)
    input_scales_C, pre_CF = torch.empty(room), torch.empty(room, width)
    values_BK, indices_BK = u_BD.new_empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    for start in range(0, rows, at_once):
        chunk = slice(start, start + at_once)
        u_CD = u_BD[chunk]
        used = slice(0, -(-len(u_CD) // tile) * tile)
        call(cpu_int8.quantize_inputs, u_CD, inputs_CD[used], input_scales_C[used])
        call(cpu_int8.product, inputs_CD[used], quantized.weights, quantized.start_F, quantized.scales_F, bias_F,
             input_scales_C[used], pre_CF[used])
        call(cpu_choose.choose, pre_CF, u_CD, W_enc_FD, b_latent_F, np.int64(min(k + margin, latents)),
             values_BK[chunk], indices_BK[chunk])
    return values_BK, indices_BK
