"""Triton kernels: group maxima, exact selection, residual and its parts, the update of the dictionary's rows
(see cuda.py).

All element offsets are 64-bit: a dictionary may have more than 2**31 elements. Sums are taken in a fixed order and
there are no atomics, so the same input gives the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def group_maxima(pre_BF, bias_F, maxima_BG, width, groups, GROUP: tl.constexpr, GROUPS_AT_ONCE: tl.constexpr):
    """The largest of each GROUP neighbours of a row of pre + bias; one program for GROUPS_AT_ONCE groups of one row.

    The sum is not stored: that would read and write all of pre once more. `select_elements` computes it again.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS_AT_ONCE + tl.arange(0, GROUPS_AT_ONCE)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < width
    pre = tl.load(pre_BF + row * width + column, mask=inside, other=float("-inf"))
    pre += tl.load(bias_F + column, mask=inside, other=0.0)
    tl.store(maxima_BG + row * groups + group, tl.max(pre, axis=1), mask=group < groups)


@triton.jit
def _ordered(value, inside, BITS: tl.constexpr):
    """Integers in the same order as the floats (NaN above all); the smallest integer where not `inside`."""
    least: tl.constexpr = -(2 ** (BITS - 1))
    if BITS == 64:
        key = value.to(tl.int64, bitcast=True)
        key = tl.where(key < 0, key ^ 0x7FFFFFFFFFFFFFFF, key)
    else:
        key = value.to(tl.int32, bitcast=True)
        key = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int64)
    return tl.where(inside, key, least)


@triton.jit
def _top(key, inside, k, BITS: tl.constexpr):
    """A mask of the k largest elements (the first of equals), from the k-th largest, which is found bit by bit."""
    kth = tl.where(tl.sum((key >= 0).to(tl.int32)) >= k, 0, -(2 ** (BITS - 1))).to(tl.int64)
    for step in range(BITS - 1):
        attempt = kth + (tl.full((), 1, tl.int64) << (BITS - 2 - step))
        kth = tl.where(tl.sum((key >= attempt).to(tl.int32)) >= k, attempt, kth)
    above = (key > kth) & inside
    equal = (key == kth) & inside
    room = k - tl.sum(above.to(tl.int32))
    return above | (equal & (tl.cumsum(equal.to(tl.int32)) <= room))


@triton.jit
def select_groups(maxima_BG, chosen_BK, groups, k, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """The k groups of a row with the largest maxima, ascending; one program per row, with the maxima in registers."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    inside = group < groups
    maxima = tl.load(maxima_BG + row * groups + group, mask=inside, other=float("-inf"))
    top = _top(_ordered(maxima, inside, BITS), inside, k, BITS)
    place = tl.cumsum(top.to(tl.int32)) - 1
    tl.store(chosen_BK + row * k + place, group, mask=top)


@triton.jit
def select_elements(pre_BF, bias_F, chosen_BK, values_BK, indices_BK, width, k, BIAS: tl.constexpr,
                    BITS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr):
    """The k largest elements of pre (with BIAS, of pre + bias) in the k chosen groups of a row, in the order of their
    indices."""
    row = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, K * GROUP)
    place = element // GROUP
    group = tl.load(chosen_BK + row * k + place, mask=place < k, other=0)
    column = group * GROUP + element % GROUP
    inside = (place < k) & (column < width)
    pre = tl.load(pre_BF + row * width + column, mask=inside, other=float("-inf"))
    if BIAS:
        pre += tl.load(bias_F + column, mask=inside, other=0.0)
    top = _top(_ordered(pre, inside, BITS), inside, k, BITS)
    to = tl.cumsum(top.to(tl.int32)) - 1
    tl.store(values_BK + row * k + to, pre, mask=top)
    tl.store(indices_BK + row * k + to, column.to(tl.int64), mask=top)


@triton.jit
def residual(x_BD, values_BK, indices_BK, W_FD, b_pre_D, mean_B, std_B, loss_B, e_BD, dz_BK, rows, d_model, k, tiny,
             LAYER_NORM: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    """Loss, e and dz of one batch row, TILE columns at a time, so that each of the K rows of W is read once.

    That works because the scale of e (from ‖x‖ and the std) is known before the reconstruction.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K)
    z = tl.load(values_BK + row * k + place, mask=place < k, other=0.0)
    # Only zeros are inactive: a NaN must show in the loss.
    active = (z != 0) & (place < k)
    latent = tl.load(indices_BK + row * k + place, mask=place < k, other=0)
    column = tl.arange(0, TILE)
    squares = tl.zeros((TILE,), dtype=z.dtype)
    for start in range(0, d_model, TILE):
        d = start + column
        x = tl.load(x_BD + row * d_model + d, mask=d < d_model, other=0.0)
        squares += x * x
    power = tl.sum(squares)
    zero = power == 0
    power = tl.maximum(power, tl.load(tiny))  # a subnormal power would make the gradient infinite
    if LAYER_NORM:
        mean = tl.load(mean_B + row)
        std = tl.load(std_B + row)
        scale = 2.0 / (rows * power) * std
    else:
        scale = 2.0 / (rows * power)
    scale = tl.where(zero, 0.0, scale)
    dz = tl.zeros((K, TILE), dtype=z.dtype)  # summed over its columns once, at the end
    errors = tl.zeros((TILE,), dtype=z.dtype)
    for start in range(0, d_model, TILE):
        d = start + column
        inside = d < d_model
        w = tl.load(W_FD + latent[:, None] * d_model + d[None, :], mask=active[:, None] & inside[None, :], other=0.0)
        xhat = tl.sum(z[:, None] * w, axis=0) + tl.load(b_pre_D + d, mask=inside, other=0.0)
        if LAYER_NORM:
            xhat = xhat * std + mean
        error = tl.where(inside, xhat - tl.load(x_BD + row * d_model + d, mask=inside, other=0.0), 0.0)
        errors += error * error
        e = error * scale
        tl.store(e_BD + row * d_model + d, e, mask=inside)
        dz += w * e[None, :]
    tl.store(loss_B + row, tl.where(zero, 0.0, tl.sum(errors) / power).to(tl.float64))
    dz = tl.where(active, tl.sum(dz, axis=1), 0.0)  # 0 times an error that is not finite is not 0
    tl.store(dz_BK + row * k + place, dz, mask=place < k)


@triton.jit
def decode(values_BK, indices_BK, W_FD, xhat_BD, d_model, k, K: tl.constexpr, TILE: tl.constexpr):
    """x̂ of one batch row, without a bias; rows of W whose value is 0 are not read."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K)
    z = tl.load(values_BK + row * k + place, mask=place < k, other=0.0)
    active = (z != 0) & (place < k)
    latent = tl.load(indices_BK + row * k + place, mask=place < k, other=0)
    for start in range(0, d_model, TILE):
        d = start + tl.arange(0, TILE)
        inside = d < d_model
        w = tl.load(W_FD + latent[:, None] * d_model + d[None, :], mask=active[:, None] & inside[None, :], other=0.0)
        tl.store(xhat_BD + row * d_model + d, tl.sum(z[:, None] * w, axis=0), mask=inside)


@triton.jit
def error(x_BD, xhat_BD, mean_B, std_B, loss_B, e_BD, rows, d_model, tiny, LAYER_NORM: tl.constexpr,
          TILE: tl.constexpr):
    """Loss and e of one row of a reconstruction, as in `residual`; the loss is a mean over `rows`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    least = tl.load(tiny)
    squares = tl.zeros((TILE,), dtype=least.dtype)
    for start in range(0, d_model, TILE):
        d = start + column
        x = tl.load(x_BD + row * d_model + d, mask=d < d_model, other=0.0)
        squares += x * x
    power = tl.sum(squares)
    zero = power == 0
    power = tl.maximum(power, least)
    if LAYER_NORM:
        mean = tl.load(mean_B + row)
        std = tl.load(std_B + row)
        scale = 2.0 / (rows * power) * std
    else:
        scale = 2.0 / (rows * power)
    scale = tl.where(zero, 0.0, scale)
    errors = tl.zeros((TILE,), dtype=least.dtype)
    for start in range(0, d_model, TILE):
        d = start + column
        inside = d < d_model
        xhat = tl.load(xhat_BD + row * d_model + d, mask=inside, other=0.0)
        if LAYER_NORM:
            xhat = xhat * std + mean
        off = tl.where(inside, xhat - tl.load(x_BD + row * d_model + d, mask=inside, other=0.0), 0.0)
        errors += off * off
        tl.store(e_BD + row * d_model + d, off * scale, mask=inside)
    tl.store(loss_B + row, tl.where(zero, 0.0, tl.sum(errors) / power).to(tl.float64))


@triton.jit
def code_gradient(e_BD, values_BK, indices_BK, W_FD, dz_BK, d_model, k, K: tl.constexpr, TILE: tl.constexpr):
    """dz of one batch row: e times each of its K rows of W, TILE columns at a time."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K)
    z = tl.load(values_BK + row * k + place, mask=place < k, other=0.0)
    active = (z != 0) & (place < k)
    latent = tl.load(indices_BK + row * k + place, mask=place < k, other=0)
    dz = tl.zeros((K, TILE), dtype=z.dtype)  # summed over its columns once, at the end
    for start in range(0, d_model, TILE):
        d = start + tl.arange(0, TILE)
        inside = d < d_model
        w = tl.load(W_FD + latent[:, None] * d_model + d[None, :], mask=active[:, None] & inside[None, :], other=0.0)
        dz += w * tl.load(e_BD + row * d_model + d, mask=inside, other=0.0)[None, :]
    dz = tl.where(active, tl.sum(dz, axis=1), 0.0)  # 0 times an error that is not finite is not 0
    tl.store(dz_BK + row * k + place, dz, mask=place < k)


@triton.jit
def sum_parts(parts_PD, latents_P, starts_P, stops_P, rows_P, values_P, gradients_P, e_BD, u_BD, d_model,
              DECODER: tl.constexpr, ENCODER: tl.constexpr, D: tl.constexpr):
    """Σ z e (for a decoder) + dz u (for an encoder) over one part of a hot latent's pairs; empty parts write nothing.
    """
    part = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_P + part)
    stop = tl.load(stops_P + part)
    if start < stop:
        total = _sum_pairs(start, stop, rows_P, values_P, gradients_P, e_BD, u_BD, d_model, DECODER, ENCODER, D)
        d = tl.arange(0, D)
        tl.store(parts_PD + part * d_model + d, total, mask=d < d_model)


@triton.jit
def _sum_pairs(start, stop, rows_P, values_P, gradients_P, e_BD, u_BD, d_model, DECODER: tl.constexpr,
               ENCODER: tl.constexpr, D: tl.constexpr):
    d = tl.arange(0, D)
    inside = d < d_model
    total = tl.zeros((D,), dtype=values_P.dtype.element_ty)
    for pair in range(start, stop):
        row = tl.load(rows_P + pair).to(tl.int64)
        if DECODER:
            z = tl.load(values_P + pair)
            total += z * tl.load(e_BD + row * d_model + d, mask=inside, other=0.0)
        if ENCODER:
            dz = tl.load(gradients_P + pair)
            total += dz * tl.load(u_BD + row * d_model + d, mask=inside, other=0.0)
    return total


@triton.jit
def _to_bfloat16(value, bits16):
    """Stochastic rounding as in rounding.py."""
    pattern = value.to(tl.float32).to(tl.uint32, bitcast=True)
    return ((pattern + bits16) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["count", "seed"])
def update_rows(W_FD, first_FD, second_FD, updated_F, offsets, parts_PD, part_offsets, rows_P, values_P, gradients_P,
                e_BD, u_BD, bounds_S, db_latent_F, db_pull_SD, numbers, count, seed, d_model,
                DECODER: tl.constexpr, ENCODER: tl.constexpr, TOUCHED: tl.constexpr, HALF: tl.constexpr,
                MIX1: tl.constexpr, MIX2: tl.constexpr, D: tl.constexpr):
    """Gradient, Adam and, for a decoder, projection and unit norm, for one share of the latents, one row at a time in
    registers. Tied rows are both decoder and encoder.

    Args:
        part_offsets: `[F + 1]`: the parts of latent f (`sum_parts`) are part_offsets[f] to part_offsets[f + 1].
        bounds_S: `[shares + 1]`: the latents of each share.
        numbers: lr with bias correction, bias correction of the root, β₁, β₂, ε, ln β₁, ln β₂; in W's dtype.
    """
    share = tl.program_id(0)
    d = tl.arange(0, D)
    inside = d < d_model
    rate = tl.load(numbers)
    root_scale = tl.load(numbers + 1)
    beta1 = tl.load(numbers + 2)
    beta2 = tl.load(numbers + 3)
    eps = tl.load(numbers + 4)
    pull = tl.zeros((D,), dtype=rate.dtype)
    for latent32 in range(tl.load(bounds_S + share), tl.load(bounds_S + share + 1)):
        latent = tl.cast(latent32, tl.int64)
        start = tl.load(offsets + latent)
        stop = tl.load(offsets + latent + 1)
        db = rate * 0
        for pair in range(start, stop):
            db += tl.load(gradients_P + pair)
        tl.store(db_latent_F + latent, db)
        if stop > start - (0 if TOUCHED else 1):
            first_part = tl.load(part_offsets + latent)
            last_part = tl.load(part_offsets + latent + 1)
            if last_part > first_part:
                g = tl.zeros((D,), dtype=rate.dtype)
                for part in range(first_part, last_part):
                    g += tl.load(parts_PD + tl.cast(part, tl.int64) * d_model + d, mask=inside, other=0.0)
            else:
                g = _sum_pairs(start, stop, rows_P, values_P, gradients_P, e_BD, u_BD, d_model, DECODER, ENCODER, D)
            at = latent * d_model + d
            w = tl.load(W_FD + at, mask=inside, other=0.0)
            m = tl.load(first_FD + at, mask=inside, other=0.0).to(rate.dtype)
            v = tl.load(second_FD + at, mask=inside, other=0.0).to(rate.dtype)
            if ENCODER:
                pull += db * w
            if DECODER:
                g -= tl.sum(g * w) * w
            if TOUCHED:
                steps = (count - tl.load(updated_F + latent)).to(rate.dtype)
                m *= tl.exp(steps * tl.load(numbers + 5))
                v *= tl.exp(steps * tl.load(numbers + 6))
            else:
                m *= beta1
                v *= beta2
            m += (1 - beta1) * g
            v += (1 - beta2) * g * g
            new = w - rate * m / (tl.sqrt(v) * root_scale + eps)
            if DECODER:
                new = new / tl.sqrt(tl.sum(new * new))
            tl.store(W_FD + at, new, mask=inside)
            if HALF:
                r = at.to(tl.uint32) ^ seed.to(tl.uint32)
                r = (r ^ (r >> 16)) * MIX1
                r = (r ^ (r >> 13)) * MIX2
                r = r ^ (r >> 16)
                tl.store(first_FD + at, _to_bfloat16(m, r & 0xFFFF), mask=inside)
                tl.store(second_FD + at, _to_bfloat16(v, r >> 16), mask=inside)
            else:
                tl.store(first_FD + at, m, mask=inside)
                tl.store(second_FD + at, v, mask=inside)
    tl.store(db_pull_SD + tl.cast(share, tl.int64) * d_model + d, pull, mask=inside)
