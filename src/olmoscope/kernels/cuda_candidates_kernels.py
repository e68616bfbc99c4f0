"""Triton kernels for the top k from a product in 8 bits, and for the quantisation (see cuda_candidates.py)."""

import triton
import triton.language as tl


@triton.jit
def quantize_rows(rows_RD, whole_RD, scales_R, d_model, D: tl.constexpr, SHIFT: tl.constexpr):
    """Quantise one row to integers from -127 to 127, and store its scale, the value of 1.

    Adding SHIFT and subtracting it again rounds to integers, halves to even: near SHIFT, neighbouring floats are 1
    apart.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    inside = d < d_model
    values = tl.load(rows_RD + row * d_model + d, mask=inside, other=0.0)
    scale = tl.max(tl.abs(values)).to(tl.float32) / 127
    tl.store(scales_R + row, scale)
    inverse = tl.where(scale > 0, 1 / scale, 0.0).to(values.dtype)
    tl.store(whole_RD + row * d_model + d, ((values * inverse + SHIFT) - SHIFT).to(tl.int8), mask=inside)


@triton.jit
def scale_sums(sums_CF, pre_CF, maxima_CG, scales_F, input_scales_C, bias_F, width, groups, GROUP: tl.constexpr,
               GROUPS_AT_ONCE: tl.constexpr):
    """Scores from integer sums, which may be in the same memory, and the largest of each GROUP neighbours."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS_AT_ONCE + tl.arange(0, GROUPS_AT_ONCE)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < width
    sums = tl.load(sums_CF + row * width + column, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales_F + column, mask=inside, other=0.0) * tl.load(input_scales_C + row)
    pre = sums * scale + tl.load(bias_F + column, mask=inside, other=float("-inf"))
    tl.store(pre_CF + row * width + column, pre, mask=inside)
    tl.store(maxima_CG + row * groups + group, tl.max(pre, axis=1), mask=group < groups)


@triton.jit
def exact_scores(u_CD, W_FD, b_F, chosen_CM, exact_CM, d_model, count, M: tl.constexpr, TILE: tl.constexpr):
    """u · W + b of one row's chosen latents, TILE columns at a time."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, M)
    inside = place < count
    latent = tl.load(chosen_CM + row * count + place, mask=inside, other=0)
    b = tl.load(b_F + latent, mask=inside, other=0.0)
    column = tl.arange(0, TILE)
    total = tl.zeros((M, TILE), dtype=b.dtype)  # summed over its columns once, at the end
    for start in range(0, d_model, TILE):
        d = start + column
        u = tl.load(u_CD + row * d_model + d, mask=d < d_model, other=0.0)
        w = tl.load(W_FD + latent[:, None] * d_model + d[None, :],
                    mask=inside[:, None] & (d < d_model)[None, :], other=0.0)
        total += w * u[None, :]
    tl.store(exact_CM + row * count + place, tl.sum(total, axis=1) + b, mask=inside)
