"""The int8 product on a CPU: tiles of it in registers, written for vector units that sum four byte products at once.

A processor with AVX-512 VNNI does in one instruction what takes four in float32. Those with AVX2 alone have
cpu_int8_avx2.py; others run this code with plain integer instructions: the same sums to the last bit, but slowly.
oneDNN has such a product too, but lays a matrix of weights out anew on one thread, which takes longer than the product,
and here the weights change at each step.

Layout of the weights: blocks of LATENTS latents; in a block, for each four neighbouring inputs, the four bytes of one
latent after the other. What multiplies them is unsigned: byte 128 stands for 0, and `start` takes that off again.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from olmoscope.kernels.compile import compiled
from olmoscope.kernels.cpu_quantize import inverse, largest_of, rounded
from olmoscope.kernels.interface import Quantized
from olmoscope.processor import has

FAST = has("avx512vnni")
"""Whether there is the instruction."""
ROWS = 6
"""Rows of a tile: with LATENTS, 24 registers of sums, of 32 that there are."""
VECTORS = 4
LATENTS = 16 * VECTORS
ROWS_PER_PIECE = 42 * ROWS
CENTRE = 128
LARGEST = 127

_BYTE, _INT, _LONG, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_BYTES, _INTS, _FLOATS = ir.VectorType(_BYTE, 64), ir.VectorType(_INT, 16), ir.VectorType(_FLOAT, 16)


def _spread(builder, scalar, vector_type):
    """A scalar in all places of a vector of 16."""
    empty = ir.Constant(vector_type, ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(_INTS, [0] * 16))


def _dot4(builder, sums, inputs, weights):
    """sums + the four neighbouring products of unsigned inputs and signed weights, in each of 16 places."""
    if FAST:
        name = "llvm.x86.avx512.vpdpbusd.512"
        function = builder.module.declare_intrinsic(name, (), ir.FunctionType(_INTS, [_INTS, _BYTES, _BYTES]))
        return builder.call(function, [sums, inputs, weights])
    wide = ir.VectorType(_INT, 64)
    products = builder.mul(builder.zext(inputs, wide), builder.sext(weights, wide))
    for place in range(4):
        every_fourth = ir.Constant(_INTS, list(range(place, 64, 4)))
        sums = builder.add(sums, builder.shuffle_vector(products, ir.Constant(wide, ir.Undefined), every_fourth))
    return sums


@intrinsic
def _tile(context, inputs, input_stride, weights, fours, start, scales, bias, input_scales, out, out_stride):
    """ROWS x LATENTS of the product. All arguments are addresses, strides in bytes, and how many fours to sum."""

    def generate(target, builder, signature, arguments):
        inputs, input_stride, weights, fours, start, scales, bias, input_scales, out, out_stride = arguments

        def at(base, *offsets):
            for offset in offsets:
                base = builder.add(base, ir.Constant(_LONG, offset) if isinstance(offset, int) else offset)
            return base

        def load(address, kind, align):
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)

        def times(value, factor):
            return builder.mul(value, ir.Constant(_LONG, factor))

        vectors = range(VECTORS)
        first = [load(at(start, 64 * v), _INTS, 4) for v in vectors]
        before = builder.block
        loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        number = builder.phi(_LONG)
        number.add_incoming(ir.Constant(_LONG, 0), before)
        sums = [[builder.phi(_INTS) for _ in vectors] for _ in range(ROWS)]
        w = [load(at(weights, times(number, 4 * LATENTS), 64 * v), _BYTES, 1) for v in vectors]
        new = []
        for row in range(ROWS):
            four = load(at(inputs, times(input_stride, row), times(number, 4)), _INT, 1)
            x = builder.bitcast(_spread(builder, four, _INTS), _BYTES)
            new.append([_dot4(builder, sums[row][v], x, w[v]) for v in vectors])
        following = builder.add(number, ir.Constant(_LONG, 1))
        number.add_incoming(following, builder.block)
        for row in range(ROWS):
            for v in vectors:
                sums[row][v].add_incoming(first[v], before)
                sums[row][v].add_incoming(new[row][v], builder.block)
        builder.cbranch(builder.icmp_signed("<", following, fours), loop, done)
        builder.position_at_end(done)
        for row in range(ROWS):
            scale = _spread(builder, load(at(input_scales, 4 * row), _FLOAT, 4), _FLOATS)
            for v in vectors:
                value = builder.fmul(builder.sitofp(new[row][v], _FLOATS), load(at(scales, 64 * v), _FLOATS, 4))
                value = builder.fadd(builder.fmul(value, scale), load(at(bias, 64 * v), _FLOATS, 4))
                address = at(out, times(out_stride, row), 64 * v)
                builder.store(value, builder.inttoptr(address, _FLOATS.as_pointer()), align=4)
        return target.get_dummy_value()

    return types.void(*[types.int64] * 10), generate


def empty(latents: int, d_model: int) -> Quantized:
    """Room for a dictionary; `latents` is rounded up to whole blocks."""
    blocks, width = -(-latents // LATENTS), -(-latents // LATENTS) * LATENTS
    return Quantized(torch.empty(blocks, -(-d_model // 4), LATENTS, 4, dtype=torch.int8), torch.empty(width),
                     torch.empty(width, dtype=torch.int32))


@compiled(parallel=True)
def product(inputs_BD, weights_NQLI, start_F, scales_F, bias_F, input_scales_B, pre_BF):
    """Fill pre with (inputs · weights + start) · scale · input scale + bias.

    Args:
        inputs_BD: uint8; rows a multiple of ROWS, columns a multiple of 4.
        weights_NQLI: int8 `[F / LATENTS, D / 4, LATENTS, 4]`.
        start_F: int32, what sums start with.
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
    """Rows as unsigned bytes around 128, the largest of each row 127 away from it; rows and columns beyond u: 128."""
    for row in prange(len(inputs_BD)):
        inputs_BD[row] = np.uint8(CENTRE)
        input_scales_B[row] = 0
        if row < len(u_BD):
            scratch = np.empty(u_BD.shape[1], np.float32)
            input_scales_B[row] = largest_of(u_BD[row]) / np.float32(LARGEST)
            rounded(u_BD[row], inverse(input_scales_B[row]), np.int32(CENTRE), scratch, inputs_BD[row])


@compiled(parallel=True)
def quantize_weights(W_FD, weights_NQLI, start_F, scales_F):
    """Rows as signed bytes in the layout of `product`; latents beyond W are 0."""
    for part in prange(len(scales_F) // 16):
        _quantize_part(part, W_FD, weights_NQLI, start_F, scales_F)


@compiled()
def _quantize_part(part, W_FD, weights_NQLI, start_F, scales_F):
    """16 latents: a cache line for each four inputs."""
    fours = weights_NQLI.shape[1]
    # Rows 64 bytes longer than needed: 16 rows a power of two apart would fall on one set of the cache.
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
