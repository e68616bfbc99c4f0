"""Exact top-k of rows on a CPU, pruned by group maxima.

If k groups have maxima >= τ, the top k are among the numbers >= τ, and all of those are in groups whose maximum is
>= τ. One pass of vector instructions finds the maxima; a few more passes, over the maxima only, find a τ that leaves
hardly more than k groups; only these groups of the row are read again. Of equal numbers, the one with the lowest index
wins.

Branches that depend on the data cost more than arithmetic here (a heap for τ took half of the time), so τ is found by
bisection, and candidates are ranked by counting how many are better than each.
"""

import numpy as np
from numba import prange

from olmoscope.kernels.compile import compiled

LANES = 64
"""Groups of one block: the elements l, l + LANES, l + 2 LANES, … of a block are a group, so that maxima are taken lane
by lane, without operations across a vector."""
DEPTH = 16
"""Elements of a group. The elements after the last whole block are in groups of one."""
ROWS_PER_PIECE = 8
MOST_RANKED = 512
"""The most candidates that are ranked by counting; more go through a heap."""
BISECTIONS = 12


@compiled(parallel=True)
def topk(pre_BF, values_BK, indices_BK):
    """ReLU of the top k of `pre_BF`, row by row, descending. NaN is never chosen; a row with fewer than k numbers gives
    NaN."""
    rows = len(pre_BF)
    for piece in prange((rows + ROWS_PER_PIECE - 1) // ROWS_PER_PIECE):
        first = piece * ROWS_PER_PIECE
        _topk_rows(first, min(rows, first + ROWS_PER_PIECE), pre_BF, values_BK, indices_BK)


@compiled()
def _topk_rows(first, stop, pre_BF, values_BK, indices_BK):
    width, k = pre_BF.shape[1], values_BK.shape[1]
    blocks = width // (LANES * DEPTH)
    groups = blocks * LANES + width - blocks * LANES * DEPTH
    maxima = np.empty(groups, pre_BF.dtype)
    values = np.empty(max(k, MOST_RANKED), pre_BF.dtype)
    indices = np.empty(max(k, MOST_RANKED), np.int64)
    threshold = -np.inf
    for row in range(first, stop):
        pre = pre_BF[row]
        found = -1
        if k <= groups:
            _group_maxima(pre, blocks, maxima)
            threshold = _threshold(maxima, k, threshold)
            found = _collect(pre, blocks, maxima, threshold, values, indices)
        if k <= found:
            rank(values[:found], indices[:found], values_BK[row], indices_BK[row])
        else:
            _by_heap(pre, threshold, values[:k], indices[:k], values_BK[row], indices_BK[row])


@compiled()
def _group_maxima(pre, blocks, maxima):
    for block in range(blocks):
        base = block * LANES * DEPTH
        into = maxima[block * LANES : (block + 1) * LANES]
        for lane in range(LANES):
            into[lane] = pre[base + lane]
        for depth in range(1, DEPTH):
            start = base + depth * LANES
            for lane in range(LANES):
                value = pre[start + lane]
                into[lane] = value if value > into[lane] else into[lane]
    tail = blocks * LANES * DEPTH
    for index in range(tail, len(pre)):
        maxima[blocks * LANES + index - tail] = pre[index]


@compiled()
def _threshold(maxima, k, guess):
    """A number that at least k maxima reach, and if possible not many more.

    Args:
        guess: the previous row's threshold.
    """
    low = high = maxima[0]
    for maximum in maxima:
        low = maximum if maximum < low else low
        high = maximum if maximum > high else high
    attempt = maxima.dtype.type(guess)
    for _ in range(BISECTIONS):
        if not low < attempt < high:
            attempt = (low + high) * maxima.dtype.type(0.5)
        reached = np.int32(0)
        for maximum in maxima:
            reached += np.int32(maximum >= attempt)
        if reached >= k:
            low = attempt
            if reached <= k + k // 4:
                break
        else:
            high = attempt
    return low


@compiled()
def _collect(pre, blocks, maxima, threshold, values, indices):
    """Collect the numbers >= threshold; return how many, or -1 if there is no room for them."""
    found = 0
    tail = blocks * LANES * DEPTH
    for group in range(len(maxima)):
        if not maxima[group] >= threshold:
            continue
        if found + DEPTH > len(values):
            return -1
        if group < blocks * LANES:
            first = group // LANES * (LANES * DEPTH) + group % LANES
            stop = first + LANES * DEPTH
        else:
            first = tail + group - blocks * LANES
            stop = first + 1
        for index in range(first, stop, LANES):
            values[found], indices[found] = pre[index], index
            found += int(pre[index] >= threshold)
    return found


@compiled()
def rank(values, indices, values_K, indices_K):
    """Put candidates in their places: a candidate's place is the number of better ones."""
    for one in range(len(values)):
        value, index = values[one], indices[one]
        better = 0
        for other in range(len(values)):
            better += int((values[other] > value) | ((values[other] == value) & (indices[other] < index)))
        if better < len(values_K):
            values_K[better] = value if value > 0 else 0
            indices_K[better] = index


@compiled()
def _by_heap(pre, threshold, values, indices, values_K, indices_K):
    """The same with a heap whose root is the worst of the best k so far, for any number of candidates."""
    k = len(values)
    found = 0
    for index in range(len(pre)):
        value = pre[index]
        if not value >= threshold:
            continue
        if found < k:
            values[found], indices[found] = value, index
            found += 1
            if found == k:
                for place in range(k // 2 - 1, -1, -1):
                    _sink(values, indices, k, place)
        elif _worse(values[0], indices[0], value, index):
            values[0], indices[0] = value, index
            _sink(values, indices, k, 0)
    if found < k:
        for place in range(k):
            values_K[place], indices_K[place] = np.nan, place
        return
    for size in range(k, 0, -1):
        values_K[size - 1] = values[0] if values[0] > 0 else 0
        indices_K[size - 1] = indices[0]
        values[0], indices[0] = values[size - 1], indices[size - 1]
        _sink(values, indices, size - 1, 0)


@compiled()
def _worse(value, index, than_value, than_index):
    return value < than_value or (value == than_value and index > than_index)


@compiled()
def _sink(values, indices, size, place):
    value, index = values[place], indices[place]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and _worse(values[child + 1], indices[child + 1], values[child], indices[child]):
            child += 1
        if not _worse(values[child], indices[child], value, index):
            break
        values[place], indices[place] = values[child], indices[child]
        place = child
    values[place], indices[place] = value, index
