"""The int8 product on a CPU, in tiles held in registers, for vector units that sum four byte products at once.

A processor with AVX-512 VNNI does in one instruction what takes four in float32. Processors with only AVX2 use
cpu_int8_avx2.py; others run this code with plain integer instructions, which gives the same sums to the last bit, but
slowly. oneDNN has such a product too, but rearranges the matrix of weights on one thread, which takes longer than the
product, and here the weights change at every step.

Layout of the weights: blocks of LATENTS latents; in a block, for each four neighbouring inputs, the four bytes of one
latent after another. The inputs are unsigned: byte 128 represents 0, and `start` corrects for that.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from olmoscope.kernels.compile import compiled
from olmoscope.kernels.cpu_quantize import inverse, largest_of, rounded
from olmoscope.kernels.cpu_tiles import INT, LONG, Tile
from olmoscope.kernels.interface import Quantized
from olmoscope.processor import has

FAST = has("avx512vnni")
"""Whether the processor has the instruction."""
ROWS = 6
"""Rows of a tile; with LATENTS, the sums take 24 of the 32 registers."""
VECTORS = 4
LATENTS = 16 * VECTORS
ROWS_PER_PIECE = 42 * ROWS
CENTRE = 128
LARGEST = 127

_BYTES = ir.VectorType(ir.IntType(8), 64)


def _dot4(tile, sums, inputs, weights):
    """sums + the four neighbouring products of unsigned inputs and signed weights, in each of 16 places."""
    builder = tile.builder
    if FAST:
        name = "llvm.x86.avx512.vpdpbusd.512"
        kind = ir.FunctionType(tile.ints, [tile.ints, _BYTES, _BYTES])
        return builder.call(builder.module.declare_intrinsic(name, (), kind), [sums, inputs, weights])
    wide = ir.VectorType(INT, 64)
    products = builder.mul(builder.zext(inputs, wide), builder.sext(weights, wide))
    for place in range(4):
        every_fourth = ir.Constant(tile.ints, list(range(place, 64, 4)))
        sums = builder.add(sums, builder.shuffle_vector(products, ir.Constant(wide, ir.Undefined), every_fourth))
    return sums


@intrinsic
def _tile(context, inputs, input_stride, weights, fours, start, scales, bias, input_scales, out, out_stride):
    """ROWS x LATENTS of the product. The arguments are addresses, strides in bytes, and the number of fours to sum."""

    def generate(target, builder, signature, arguments):
        inputs, input_stride, weights, fours, start, scales, bias, input_scales, out, out_stride = arguments
        tile = Tile(builder, 16)
        places = [(row, v) for row in range(ROWS) for v in range(VECTORS)]
        first = [tile.load(tile.at(start, 64 * v), tile.ints, 4) for v in range(VECTORS)]
        before = builder.block
        loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(loop)

        builder.position_at_end(loop)
        number = builder.phi(LONG)
        sums = {place: builder.phi(tile.ints) for place in places}
        w = [tile.load(tile.at(weights, tile.times(number, 4 * LATENTS), 64 * v), _BYTES, 1) for v in range(VECTORS)]
        new = {}
        for row in range(ROWS):
            four = tile.load(tile.at(inputs, tile.times(input_stride, row), tile.times(number, 4)), INT, 1)
            x = builder.bitcast(tile.spread(four, tile.ints), _BYTES)
            for v in range(VECTORS):
                new[row, v] = _dot4(tile, sums[row, v], x, w[v])
        following = builder.add(number, ir.Constant(LONG, 1))
        number.add_incoming(ir.Constant(LONG, 0), before)
        number.add_incoming(following, builder.block)
        for row, v in places:
            sums[row, v].add_incoming(first[v], before)
            sums[row, v].add_incoming(new[row, v], builder.block)
        builder.cbranch(builder.icmp_signed("<", following, fours), loop, done)

        builder.position_at_end(done)
        tile.store_scores(new, scales, bias, input_scales, out, out_stride)
        return target.get_dummy_value()

    return types.void(*[types.int64] * 10), generate


def empty(latents: int, d_model: int) -> Quantized:
    """Room for a dictionary; `latents` is rounded up to whole blocks."""
    blocks, width = -(-latents // LATENTS), -(-latents // LATENTS) * LATENTS
    return Quantized(torch.empty(blocks, -(-d_model // 4), LATENTS, 4, dtype=torch.int8), torch.empty(width),
                     torch.empty(width, dtype=torch.int32))


@compiled(parallel=True)
def product(inputs_BD, weights_NQLI, start_F, scales_F, bias_F, input_scales_B, pre_BF):
    """Fill `pre_BF` with (inputs · weights + start) · scale · input scale + bias.

    Args:
        inputs_BD: uint8; rows a multiple of ROWS, columns a multiple of 4.
        weights_NQLI: int8 `[F / LATENTS, D / 4, LATENTS, 4]`.
        start_F: int32, the initial values of the sums.
        scales_F, bias_F, input_scales_B, pre_BF: float32; F a multiple of LATENTS.
    """
    pieces = (len(inputs_BD) + ROWS_PER_PIECE - 1) // ROWS_PER_PIECE
    for piece in prange(pieces * len(weights_NQLI)):
        block = piece // pieces
        first = piece % pieces * ROWS_PER_PIECE
        product_piece(block, first, min(len(inputs_BD), first + ROWS_PER_PIECE), inputs_BD, weights_NQLI, start_F,
                       scales_F, bias_F, input_scales_B, pre_BF)


@compiled()
def product_piece(block, first, stop, inputs_BD, weights_NQLI, start_F, scales_F, bias_F, input_scales_B, pre_BF):
    d_model, width = inputs_BD.shape[1], pre_BF.shape[1]
    inputs, weights, out = inputs_BD.ctypes.data, weights_NQLI[block].ctypes.data, pre_BF.ctypes.data
    latent = 4 * block * LATENTS
    start, scales, bias = start_F.ctypes.data + latent, scales_F.ctypes.data + latent, bias_F.ctypes.data + latent
    for row in range(first, stop, ROWS):
        _tile(inputs + row * d_model, d_model, weights, d_model // 4, start, scales, bias,
              input_scales_B.ctypes.data + 4 * row, out + 4 * row * width + latent, 4 * width)


@compiled(parallel=True)
def quantize_inputs(u_BD, inputs_BD, input_scales_B):
    """Write rows as unsigned bytes around 128, with each row's largest value 127 away from it; padding is 128."""
    for row in prange(len(inputs_BD)):
        inputs_BD[row] = np.uint8(CENTRE)
        input_scales_B[row] = 0
        if row < len(u_BD):
            scratch = np.empty(u_BD.shape[1], np.float32)
            input_scales_B[row] = largest_of(u_BD[row]) / np.float32(LARGEST)
            rounded(u_BD[row], inverse(input_scales_B[row]), np.int32(CENTRE), scratch, inputs_BD[row])


@compiled(parallel=True)
def quantize_weights(W_FD, weights_NQLI, start_F, scales_F):
    """Write rows as signed bytes in the layout of `product`; latents beyond W are 0."""
    for part in prange(len(scales_F) // 16):
        _quantize_part(part, W_FD, weights_NQLI, start_F, scales_F)


@compiled()
def _quantize_part(part, W_FD, weights_NQLI, start_F, scales_F):
    """Quantise 16 latents, which take one cache line for each four inputs."""
    fours = weights_NQLI.shape[1]
    # Rows are 64 bytes longer than needed: 16 rows a power of two apart would map to the same cache set.
    rows = np.zeros((16, 4 * fours + 64), np.uint8)
    scratch = np.empty(W_FD.shape[1], np.float32)
    for lane in range(16):
        latent = 16 * part + lane
        scales_F[latent] = 0
        start_F[latent] = 0
        if latent < len(W_FD):
            scales_F[latent] = largest_of(W_FD[latent]) / np.float32(LARGEST)
            rounded(W_FD[latent], inverse(scales_F[latent]), np.int32(0), scratch, rows[lane])
            signed = rows[lane].view(np.int8)
            total = np.int32(0)
            for d in range(4 * fours):
                total += np.int32(signed[d])
            start_F[latent] = np.int32(-CENTRE) * total
    from_rows = rows.view(np.int32)
    block = weights_NQLI[16 * part // LATENTS].reshape(fours, 4 * LATENTS).view(np.int32)
    first = 16 * part % LATENTS
    for four in range(fours):
        for lane in range(16):
            block[four, first + lane] = from_rows[lane, four]
