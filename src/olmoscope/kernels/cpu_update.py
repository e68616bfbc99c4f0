"""Rows' gradient, projection, Adam and renormalisation on a CPU, one latent after another, all in cache.

Latents are divided into shares of equal cost: `ROW_COST` for reading and writing a row with its moments, plus 1 per
pair. A latent with more than `PART` pairs is handled separately: its pairs are cut into parts, which are summed in
parallel beforehand, so that a latent that is active in every row does not hold up one thread.
"""

import numpy as np
from numba import prange

from olmoscope.kernels.compile import compiled
from olmoscope.kernels.cpu_rows import add_rows
from olmoscope.kernels.rounding import MIX1, MIX2

SHARES = 64
PART = 1024
ROW_COST = 4


@compiled(parallel=True)
def update_rows(W_FD, first_FD, second_FD, first_bits_FD, second_bits_FD, updated_F,
                offsets, rows_P, values_P, gradients_P, e_BD, u_BD, numbers, count, seed, db_latent_F, b_pull_SD):
    """See Kernels.update_tied; if e has no rows, Kernels.update_encoder; if u has none, Kernels.update_decoder. Moments
    are either full or bits (bfloat16); the other pair of arrays has no rows.

    Args:
        numbers: lr with bias correction, bias correction of the root, β₁, β₂, ε; in W's dtype.
        seed: the step's random bits, for stochastic rounding.
        b_pull_SD: zeros, one row per share.
    """
    bounds, part_starts, part_stops, first_part = _plan(offsets)
    parts_D = np.zeros((len(part_starts), W_FD.shape[1]), W_FD.dtype)
    for part in prange(len(part_starts)):
        _add_pairs(parts_D[part], part_starts[part], part_stops[part], rows_P, values_P, gradients_P, e_BD, u_BD)
    for share in prange(SHARES):
        _update_share(bounds[share], bounds[share + 1], first_part[share], parts_D, W_FD, first_FD, second_FD,
                      first_bits_FD, second_bits_FD, updated_F, offsets, rows_P, values_P, gradients_P, e_BD, u_BD,
                      numbers, count, seed, db_latent_F, b_pull_SD[share])


@compiled()
def _add_pairs(total, start, stop, rows_P, values_P, gradients_P, e_BD, u_BD):
    """total += Σ z e + dz u over some pairs; a term whose rows are empty is left out."""
    if len(e_BD) > 0:
        add_rows(total, e_BD, rows_P[start:stop], values_P[start:stop], stop - start)
    if len(u_BD) > 0:
        add_rows(total, u_BD, rows_P[start:stop], gradients_P[start:stop], stop - start)


@compiled()
def _update_share(first_latent, last_latent, part, parts_D, W_FD, first_FD, second_FD, first_bits_FD, second_bits_FD,
                  updated_F, offsets, rows_P, values_P, gradients_P, e_BD, u_BD, numbers, count, seed, db_latent_F,
                  b_pull_D):
    d_model = W_FD.shape[1]
    touched_only = len(updated_F) > 0
    half = len(first_bits_FD) > 0
    unit, encoder = len(e_BD) > 0, len(u_BD) > 0
    gradient = np.empty(d_model, W_FD.dtype)
    scratch = np.empty((2, d_model), W_FD.dtype)
    pattern = np.empty(d_model, np.uint32)
    for latent in range(first_latent, last_latent):
        start, stop = offsets[latent], offsets[latent + 1]
        gradient[:] = 0
        if stop - start > PART:
            for _ in range(start, stop, PART):
                gradient += parts_D[part]
                part += 1
        else:
            _add_pairs(gradient, start, stop, rows_P, values_P, gradients_P, e_BD, u_BD)
        db = W_FD.dtype.type(0)
        for pair in range(start, stop):
            db += gradients_P[pair]
        db_latent_F[latent] = db
        if encoder and stop > start:
            _add_scaled(b_pull_D, db, W_FD[latent])
        steps = 1
        if touched_only:
            if stop == start:
                continue
            steps = count - updated_F[latent]
            updated_F[latent] = count
        if half:
            _from_bits(first_bits_FD[latent], pattern, scratch[0])
            _from_bits(second_bits_FD[latent], pattern, scratch[1])
            _adam_row(W_FD[latent], gradient, scratch[0], scratch[1], numbers, steps, unit)
            _to_bits(scratch[0], pattern, first_bits_FD[latent], latent, seed, 0)
            _to_bits(scratch[1], pattern, second_bits_FD[latent], latent, seed, 16)
        else:
            _adam_row(W_FD[latent], gradient, first_FD[latent], second_FD[latent], numbers, steps, unit)


@compiled()
def _plan(offsets):
    """Bounds of the shares, the parts of the hot latents in order, and each share's first part."""
    latents = len(offsets) - 1
    total = 0
    parts = 0
    for latent in range(latents):
        pairs = offsets[latent + 1] - offsets[latent]
        if pairs > PART:
            parts += (pairs + PART - 1) // PART
            pairs = 0
        total += pairs + ROW_COST
    bounds = np.empty(SHARES + 1, np.int64)
    first_part = np.zeros(SHARES, np.int64)
    part_starts, part_stops = np.empty(parts, np.int64), np.empty(parts, np.int64)
    bounds[0] = 0
    bounds[SHARES] = latents
    share = 1
    spent = part = 0
    for latent in range(latents):
        while share < SHARES and spent * SHARES >= total * share:
            bounds[share], first_part[share] = latent, part
            share += 1
        start, stop = offsets[latent], offsets[latent + 1]
        if stop - start > PART:
            for first in range(start, stop, PART):
                part_starts[part], part_stops[part] = first, min(first + PART, stop)
                part += 1
            spent += ROW_COST
        else:
            spent += stop - start + ROW_COST
    while share < SHARES:
        bounds[share], first_part[share] = latents, part
        share += 1
    return bounds, part_starts, part_stops, first_part


@compiled(reorder=True)
def _add_scaled(total, scale, row):
    for d in range(len(total)):
        total[d] += scale * row[d]


@compiled(reorder=True)
def _adam_row(w, gradient, first, second, numbers, steps, unit):
    rate, root_scale, beta1, beta2, eps = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    keep1, keep2 = w.dtype.type(beta1**steps), w.dtype.type(beta2**steps)
    one = w.dtype.type(1)  # a plain 1 would make everything float64
    new1, new2 = one - beta1, one - beta2
    along = w.dtype.type(0)
    if unit:
        for d in range(len(w)):
            along += gradient[d] * w[d]
    for d in range(len(w)):
        g = gradient[d] - along * w[d]
        m = keep1 * first[d] + new1 * g
        v = keep2 * second[d] + new2 * g * g
        first[d] = m
        second[d] = v
        w[d] -= rate * m / (np.sqrt(v) * root_scale + eps)
    if unit:
        norm2 = w.dtype.type(0)
        for d in range(len(w)):  # a separate loop: see cpu_rows.py on sums
            norm2 += w[d] * w[d]
        scale = one / np.sqrt(norm2)
        for d in range(len(w)):
            w[d] *= scale


@compiled()
def _from_bits(bits, pattern, values):
    for d in range(len(bits)):
        pattern[d] = np.uint32(bits[d]) << np.uint32(16)
    as_float = pattern.view(np.float32)
    for d in range(len(bits)):
        values[d] = as_float[d]


@compiled()
def _to_bits(values, pattern, bits, row, seed, shift):
    """Stochastic rounding as in rounding.py."""
    as_float = pattern.view(np.float32)
    for d in range(len(bits)):
        as_float[d] = values[d]
    for d in range(len(bits)):
        r = np.uint32(np.uint32(row * len(bits) + d) ^ seed)  # without the casts, everything would become 64 bits
        r = np.uint32((r ^ (r >> 16)) * np.uint32(MIX1))
        r = np.uint32((r ^ (r >> 13)) * np.uint32(MIX2))
        r = np.uint32((r ^ (r >> 16)) >> shift) & np.uint32(0xFFFF)
        bits[d] = np.uint16((pattern[d] + r) >> 16)
