"""The 8-bit product for processors without AVX-512 VNNI: `vpmaddubsw`, and sums that stay in 16 bits.

`vpmaddubsw` multiplies 32 unsigned bytes by 32 signed ones and adds neighbouring products: 16 sums of two, in 16 bits.
Widening them to 32 bits immediately, as is usual, costs two more instructions. Here they are added up in 16 bits over a
block of BLOCK inputs, which is two instructions for 32 products; float32 takes four, on fewer units. A sum may leave
the range of 16 bits temporarily: only the sum of a block must fit. By the Cauchy-Schwarz inequality it does if rows and
weights are scaled so that the product of their norms is under 2¹⁵. Hence, in each block, a latent's weights have a norm
of at most WEIGHT_NORM, and a row's inputs one of at most INPUT_NORM.

Inputs are unsigned: byte CENTRE represents 0, and `start` corrects for that. A byte is at most 127, so the sum of two
products is under 2¹⁵ too.

Layout of the weights: as in cpu_int8.py, with blocks of LATENTS latents. A 16-bit lane sums every other pair of inputs
(half a block); two lanes belong to one latent.
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

ROWS = 6
"""Rows of a tile; with LATENTS, the sums take 12 of the 16 registers."""
VECTORS = 2
LATENTS = 8 * VECTORS
ROWS_PER_PIECE = 42 * ROWS
BLOCK = 512
"""How many inputs' products are added up in 16 bits."""
CENTRE = 64
INPUT_NORM = 256.0
WEIGHT_NORM = 120.0
LARGEST_INPUT = 63
LARGEST_WEIGHT = 127

_BYTE, _SHORT = ir.IntType(8), ir.IntType(16)
_BYTES, _SHORTS = ir.VectorType(_BYTE, 32), ir.VectorType(_SHORT, 16)


@intrinsic
def _tile(context, inputs, input_stride, weights, fours, start, blocks, scales, bias, input_scales, out, out_stride):
    """ROWS x LATENTS of the product. The arguments are addresses, strides in bytes, and counts of fours and blocks."""

    def generate(target, builder, signature, arguments):
        inputs, input_stride, weights, fours, start, blocks, scales, bias, input_scales, out, out_stride = arguments
        tile = Tile(builder, 8)
        places = [(row, v) for row in range(ROWS) for v in range(VECTORS)]
        pairs_of_bytes = builder.module.declare_intrinsic("llvm.x86.avx2.pmadd.ub.sw", (),
                                                          ir.FunctionType(_SHORTS, [_BYTES, _BYTES]))
        pairs_of_shorts = builder.module.declare_intrinsic("llvm.x86.avx2.pmadd.wd", (),
                                                           ir.FunctionType(tile.ints, [_SHORTS, _SHORTS]))
        ones, zeros = ir.Constant(_SHORTS, [1] * 16), ir.Constant(tile.ints, [0] * 8)
        zero, one = ir.Constant(LONG, 0), ir.Constant(LONG, 1)
        entry = builder.block
        outer, inner, widen, done = (builder.append_basic_block(name) for name in ("outer", "inner", "widen", "done"))
        builder.branch(outer)

        builder.position_at_end(outer)
        block = builder.phi(LONG)
        sums = {place: builder.phi(tile.ints) for place in places}
        first_four = tile.times(block, BLOCK // 4)
        behind = builder.add(first_four, ir.Constant(LONG, BLOCK // 4))
        last_four = builder.select(builder.icmp_signed("<", behind, fours), behind, fours)
        begin = [tile.load(tile.at(start, tile.times(block, 4 * LATENTS), 32 * v), _SHORTS, 2) for v in range(VECTORS)]
        builder.branch(inner)

        builder.position_at_end(inner)
        four = builder.phi(LONG)
        short = {place: builder.phi(_SHORTS) for place in places}
        w = [tile.load(tile.at(weights, tile.times(four, 4 * LATENTS), 32 * v), _BYTES, 1) for v in range(VECTORS)]
        new = {}
        for row in range(ROWS):
            bytes4 = tile.load(tile.at(inputs, tile.times(input_stride, row), tile.times(four, 4)), INT, 1)
            x = builder.bitcast(tile.spread(bytes4, tile.ints), _BYTES)
            for v in range(VECTORS):
                new[row, v] = builder.add(short[row, v], builder.call(pairs_of_bytes, [x, w[v]]))
        following = builder.add(four, one)
        four.add_incoming(first_four, outer)
        four.add_incoming(following, inner)
        for row, v in places:
            short[row, v].add_incoming(begin[v], outer)
            short[row, v].add_incoming(new[row, v], inner)
        builder.cbranch(builder.icmp_signed("<", following, last_four), inner, widen)

        builder.position_at_end(widen)
        total = {place: builder.add(sums[place], builder.call(pairs_of_shorts, [new[place], ones])) for place in places}
        following_block = builder.add(block, one)
        block.add_incoming(zero, entry)
        block.add_incoming(following_block, widen)
        for place in places:
            sums[place].add_incoming(zeros, entry)
            sums[place].add_incoming(total[place], widen)
        builder.cbranch(builder.icmp_signed("<", following_block, blocks), outer, done)

        builder.position_at_end(done)
        tile.store_scores(total, scales, bias, input_scales, out, out_stride)
        return target.get_dummy_value()

    return types.void(*[types.int64] * 11), generate


@compiled(parallel=True)
def product(inputs_BD, weights_NQLI, start_NKL2, scales_F, bias_F, input_scales_B, pre_BF):
    """Fill `pre_BF` with (inputs · weights) · scale · input scale + bias.

    Args:
        inputs_BD: uint8 around CENTRE; rows a multiple of ROWS, columns a multiple of 4.
        weights_NQLI: int8 `[F / LATENTS, D / 4, LATENTS, 4]`.
        start_NKL2: int16 `[F / LATENTS, blocks, LATENTS, 2]`, the initial values of a block's sums.
        scales_F, bias_F, input_scales_B, pre_BF: float32; F a multiple of LATENTS.
    """
    pieces = (len(inputs_BD) + ROWS_PER_PIECE - 1) // ROWS_PER_PIECE
    for piece in prange(pieces * len(weights_NQLI)):
        block = piece // pieces
        first = piece % pieces * ROWS_PER_PIECE
        product_piece(block, first, min(len(inputs_BD), first + ROWS_PER_PIECE), inputs_BD, weights_NQLI, start_NKL2,
                       scales_F, bias_F, input_scales_B, pre_BF)


@compiled()
def product_piece(block, first, stop, inputs_BD, weights_NQLI, start_NKL2, scales_F, bias_F, input_scales_B, pre_BF):
    d_model, width = inputs_BD.shape[1], pre_BF.shape[1]
    inputs, weights, out = inputs_BD.ctypes.data, weights_NQLI[block].ctypes.data, pre_BF.ctypes.data
    latent = 4 * block * LATENTS
    start, scales, bias = start_NKL2[block].ctypes.data, scales_F.ctypes.data + latent, bias_F.ctypes.data + latent
    for row in range(first, stop, ROWS):
        _tile(inputs + row * d_model, d_model, weights, d_model // 4, start, start_NKL2.shape[1], scales, bias,
              input_scales_B.ctypes.data + 4 * row, out + 4 * row * width + latent, 4 * width)


def empty(latents: int, d_model: int) -> Quantized:
    """Room for a dictionary; `latents` is rounded up to whole blocks."""
    blocks, width = -(-latents // LATENTS), -(-latents // LATENTS) * LATENTS
    return Quantized(torch.empty(blocks, -(-d_model // 4), LATENTS, 4, dtype=torch.int8), torch.empty(width),
                     torch.empty(blocks, -(-d_model // BLOCK), LATENTS, 2, dtype=torch.int16))


@compiled(parallel=True)
def quantize_inputs(u_BD, inputs_BD, input_scales_B):
    """Write rows as unsigned bytes around CENTRE; padding is CENTRE."""
    for row in prange(len(inputs_BD)):
        inputs_BD[row] = np.uint8(CENTRE)
        input_scales_B[row] = 0
        if row < len(u_BD):
            scratch = np.empty(u_BD.shape[1], np.float32)
            input_scales_B[row] = _step(u_BD[row], np.float32(LARGEST_INPUT), np.float32(INPUT_NORM))
            rounded(u_BD[row], inverse(input_scales_B[row]), np.int32(CENTRE), scratch, inputs_BD[row])


@compiled(parallel=True)
def quantize_weights(W_FD, weights_NQLI, start_NKL2, scales_F):
    """Write rows as signed bytes in the layout of `product`; latents beyond W are 0."""
    for block in prange(len(weights_NQLI)):
        _quantize_block(block, W_FD, weights_NQLI[block], start_NKL2[block], scales_F)


@compiled()
def _quantize_block(block, W_FD, weights_QLI, start_KL2, scales_F):
    fours = weights_QLI.shape[0]
    # Rows are 64 bytes longer than needed: rows a power of two apart would map to the same cache set.
    rows = np.zeros((LATENTS, 4 * fours + 64), np.uint8)
    scratch = np.empty(W_FD.shape[1], np.float32)
    for lane in range(LATENTS):
        latent = LATENTS * block + lane
        scales_F[latent] = 0
        if latent < len(W_FD):
            scales_F[latent] = _step(W_FD[latent], np.float32(LARGEST_WEIGHT), np.float32(WEIGHT_NORM))
            rounded(W_FD[latent], inverse(scales_F[latent]), np.int32(0), scratch, rows[lane])
    signed = rows.view(np.int8)
    for part in range(start_KL2.shape[0]):
        for lane in range(LATENTS):
            first = second = np.int32(0)
            for four in range(part * (BLOCK // 4), min(fours, (part + 1) * (BLOCK // 4))):
                first += np.int32(signed[lane, 4 * four]) + np.int32(signed[lane, 4 * four + 1])
                second += np.int32(signed[lane, 4 * four + 2]) + np.int32(signed[lane, 4 * four + 3])
            start_KL2[part, lane, 0] = np.int16(-CENTRE * first)  # may wrap around; the block's sum is right
            start_KL2[part, lane, 1] = np.int16(-CENTRE * second)
    from_rows = rows.view(np.int32)
    into = weights_QLI.reshape(fours, 4 * LATENTS).view(np.int32)
    for four in range(fours):
        for lane in range(LATENTS):
            into[four, lane] = from_rows[lane, four]


@compiled()
def _step(row, largest_whole, most_norm):
    """The value of one step, large enough that neither a number nor the norm of half a block becomes too large."""
    largest = largest_of(row)
    norm2 = np.float32(0)
    for start in range(0, len(row), BLOCK):
        first, second = _half_norms(row[start : start + BLOCK])
        norm2 = max(norm2, first, second)
    return max(largest / largest_whole, np.sqrt(norm2) / most_norm)


@compiled(reorder=True)
def _half_norms(part):
    """Squared norms of the even pairs and of the odd pairs."""
    first = second = np.float32(0)
    whole = len(part) // 4 * 4
    for d in range(0, whole, 4):
        first += np.float32(part[d]) * np.float32(part[d]) + np.float32(part[d + 1]) * np.float32(part[d + 1])
        second += np.float32(part[d + 2]) * np.float32(part[d + 2]) + np.float32(part[d + 3]) * np.float32(part[d + 3])
    for d in range(whole, len(part)):
        if d - whole < 2:
            first += np.float32(part[d]) * np.float32(part[d])
        else:
            second += np.float32(part[d]) * np.float32(part[d])
    return first, second
