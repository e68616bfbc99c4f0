"""Rows of numbers as bytes: what the 8-bit products on a CPU share."""

import numpy as np

from olmoscope.kernels.compile import compiled

ROUNDER = np.float32(1.5 * 2**23)


@compiled()
def largest_of(row):
    """The largest absolute value, taken over 64 lanes in parallel, which suits vector units."""
    width = len(row)
    whole = width // 64 * 64
    lanes = np.zeros(64, np.float32)
    for start in range(0, whole, 64):
        for lane in range(64):
            size = np.float32(abs(row[start + lane]))
            lanes[lane] = size if size > lanes[lane] else lanes[lane]
    largest = np.float32(0)
    for lane in range(64):
        largest = lanes[lane] if lanes[lane] > largest else largest
    for d in range(whole, width):
        size = np.float32(abs(row[d]))
        largest = size if size > largest else largest
    return largest


@compiled()
def inverse(step):
    return np.float32(1) / step if step > 0 else np.float32(0)


@compiled()
def rounded(row, steps_of_one, zero, scratch, quantized):
    """Fill the first places of `quantized` with zero + the nearest whole number of steps.

    Adding 1.5 · 2**23 to a number leaves it, rounded to an integer, in the low bits of the sum; vector units do that at
    the speed of memory.
    """
    for d in range(len(row)):
        scratch[d] = np.float32(row[d]) * steps_of_one + ROUNDER
    bits = scratch.view(np.int32)
    for d in range(len(row)):
        quantized[d] = np.uint8(bits[d] + zero)
