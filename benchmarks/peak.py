"""Measures the float32 peak of this machine's processors: no product can be faster.

    python benchmarks/peak.py

Each thread does fused multiply-adds only in registers, in enough independent sums to fill the pipelines.
"""

import time

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from olmoscope.processor import has

LANES = 16 if has("avx512f") else 8
SUMS = 24 if has("avx512f") else 12
ROUNDS = 2_000_000
_VECTOR, _LONG = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)


@intrinsic
def _multiply_and_add(context, rounds):
    """ROUNDS times: each of SUMS vectors times a constant plus a constant; gives back one number of their sum."""

    def generate(target, builder, signature, arguments):
        fma = builder.module.declare_intrinsic(f"llvm.fma.v{LANES}f32", (), ir.FunctionType(_VECTOR, [_VECTOR] * 3))
        factor, term = (ir.Constant(_VECTOR, [value] * LANES) for value in (0.9999, 0.0001))
        before = builder.block
        loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        number, sums = builder.phi(_LONG), [builder.phi(_VECTOR) for _ in range(SUMS)]
        new = [builder.call(fma, [value, factor, term]) for value in sums]
        following = builder.add(number, ir.Constant(_LONG, 1))
        number.add_incoming(ir.Constant(_LONG, 0), before)
        number.add_incoming(following, loop)
        for place, value in enumerate(sums):
            value.add_incoming(ir.Constant(_VECTOR, [float(place)] * LANES), before)
            value.add_incoming(new[place], loop)
        builder.cbranch(builder.icmp_signed("<", following, arguments[0]), loop, done)
        builder.position_at_end(done)
        total = new[0]
        for value in new[1:]:
            total = builder.fadd(total, value)
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.int64), generate


@numba.njit(parallel=True, nogil=True)
def _run(out, rounds):
    for thread in prange(len(out)):
        out[thread] = _multiply_and_add(rounds[thread])  # else it would be computed once for all


def float32_peak(threads: int) -> float:
    """Operations per second of this number of threads together (a fused multiply-add counts as two); the best of
    five."""
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    out = np.empty(threads, np.float32)
    rounds = np.full(threads, ROUNDS)
    _run(out, rounds)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        _run(out, rounds)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)  # numba shares torch's OpenMP
    return 2 * threads * ROUNDS * SUMS * LANES / min(seconds)


if __name__ == "__main__":
    for count in (1, torch.get_num_threads()):
        print(f"{count} threads: {float32_peak(count) / 1e9:.0f} GFLOP/s in float32")
