"""Exact top-k of rows on a CPU, pruned by group maxima.

The k groups with the largest maxima hold k numbers that are not under τ, the k-th largest maximum; so the top k are
among the numbers >= τ, and those are all in groups whose maximum is. One pass of vector instructions finds the maxima;
of the row itself only the k groups or so are looked at again. Of equal numbers, the one with the lowest index wins.
"""

import numpy as np
from numba import prange

from olmoscope.kernels.compile import compiled

LANES = 64
"""Groups of one block: the elements l, l + LANES, l + 2 LANES, … of a block are a group, so that maxima are taken lane
by lane, without looking across a vector."""
DEPTH = 16
"""Elements of a group. What the last whole block leaves is in groups of one."""
ROWS_PER_PIECE = 8


@compiled(parallel=True)
def topk(pre_BF, bias_F, values_BK, indices_BK):  # type: ignore[no-untyped-def]
    """ReLU of the top k of pre + bias, row by row, descending. NaN is never chosen; a row left with fewer than k
    numbers gives NaN."""
    rows, width = pre_BF.shape
    k = values_BK.shape[1]
    blocks = width // (LANES * DEPTH)
    tail = blocks * LANES * DEPTH
    groups = blocks * LANES + width - tail
    for piece in prange((rows + ROWS_PER_PIECE - 1) // ROWS_PER_PIECE):
        maxima = np.empty(groups, pre_BF.dtype)
        heap_values = np.empty(k, pre_BF.dtype)
        heap_indices = np.empty(k, np.int64)
        for row in range(piece * ROWS_PER_PIECE, min(rows, (piece + 1) * ROWS_PER_PIECE)):
            pre = pre_BF[row]
            _group_maxima(pre, bias_F, blocks, maxima)
            threshold = _kth_largest(maxima, k, heap_values)
            found = 0
            for group in range(groups):
                if not maxima[group] >= threshold:
                    continue
                if group < blocks * LANES:
                    first = group // LANES * (LANES * DEPTH) + group % LANES
                    stop = first + LANES * DEPTH
                else:
                    first = tail + group - blocks * LANES
                    stop = first + 1
                for index in range(first, stop, LANES):
                    value = pre[index] + bias_F[index]
                    if value >= threshold:
                        found = _offer(heap_values, heap_indices, found, value, index)
            _unload(heap_values, heap_indices, found, values_BK[row], indices_BK[row])


@compiled()
def _group_maxima(pre, bias, blocks, maxima):  # type: ignore[no-untyped-def]
    for block in range(blocks):
        base = block * LANES * DEPTH
        into = maxima[block * LANES : (block + 1) * LANES]
        for lane in range(LANES):
            into[lane] = pre[base + lane] + bias[base + lane]
        for depth in range(1, DEPTH):
            start = base + depth * LANES
            for lane in range(LANES):
                value = pre[start + lane] + bias[start + lane]
                into[lane] = value if value > into[lane] else into[lane]
    tail = blocks * LANES * DEPTH
    for index in range(tail, len(pre)):
        maxima[blocks * LANES + index - tail] = pre[index] + bias[index]


@compiled()
def _kth_largest(numbers, k, heap):  # type: ignore[no-untyped-def]
    """The k-th largest of numbers, by a heap of k whose root is the least; -inf where there are fewer than k."""
    if k > len(numbers):
        return -np.inf
    heap[:] = numbers[:k]
    for place in range(k // 2 - 1, -1, -1):
        _sink_value(heap, place)
    for number in numbers[k:]:
        if number > heap[0]:
            heap[0] = number
            _sink_value(heap, 0)
    return heap[0]


@compiled()
def _sink_value(heap, place):  # type: ignore[no-untyped-def]
    size = len(heap)
    value = heap[place]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if not heap[child] < value:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = value


@compiled()
def _worse(value, index, than_value, than_index):  # type: ignore[no-untyped-def]
    return value < than_value or (value == than_value and index > than_index)


@compiled()
def _sink(values, indices, size, place):  # type: ignore[no-untyped-def]
    """Restore a heap whose root is the worst (least value; of equals, the highest index)."""
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


@compiled()
def _offer(values, indices, found, value, index):  # type: ignore[no-untyped-def]
    """Keep a candidate if it is among the best so far; returns how many are kept."""
    if found < len(values):
        values[found], indices[found] = value, index
        found += 1
        if found == len(values):
            for place in range(found // 2 - 1, -1, -1):
                _sink(values, indices, found, place)
    elif _worse(values[0], indices[0], value, index):
        values[0], indices[0] = value, index
        _sink(values, indices, found, 0)
    return found


@compiled()
def _unload(values, indices, found, values_K, indices_K):  # type: ignore[no-untyped-def]
    """Sort the heap into a row of codes, through the ReLU. Fewer than k were found only where there is NaN."""
    k = len(values)
    if found < k:
        for place in range(k):
            values_K[place], indices_K[place] = np.nan, place
        return
    for size in range(k, 0, -1):
        values_K[size - 1] = values[0] if values[0] > 0 else 0
        indices_K[size - 1] = indices[0]
        values[0], indices[0] = values[size - 1], indices[size - 1]
        _sink(values, indices, size - 1, 0)
