"""Sums over the shards of an SAE, always taken in the same order, and the numbers of ranks that allow this order.

Floating-point sums depend on their order. So shards are added up as a tree of neighbours; ranks that each hold a whole
branch of it give the same bits as one rank that holds all:

    6 shards    ((0 + 1) + (2 + 3)) + (4 + 5)        on 3 ranks, each adds its pair; on 6, no rank has a pair
"""

from collections.abc import Sequence

from torch import Tensor


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape: neighbours in pairs while their number is even, then from left to right."""
    total = tree_sum_of_some(parts)
    assert total is not None
    return total


def tree_sum_of_some(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The sum where some parts are missing: as if they were zeros, without adding any. None if all are missing."""
    while len(parts) % 2 == 0:
        parts = [_added(one, other) for one, other in zip(parts[::2], parts[1::2], strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = _added(total, part)
    return total


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def legal_counts(shards: int) -> list[int]:
    """The numbers of ranks that can share `shards` shards, ascending: all that halving gives, and one."""
    counts = [shards]
    while counts[-1] % 2 == 0:
        counts.append(counts[-1] // 2)
    return sorted({1, *counts})


def team_size(ranks: int, shards: int) -> int:
    """How many of `ranks` ranks train one SAE together: as many as can share its shards, in teams of equal size."""
    return max(count for count in legal_counts(shards) if ranks % count == 0)
