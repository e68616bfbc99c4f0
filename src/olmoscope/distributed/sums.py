"""Sums over the shards of an SAE, always taken in the same order, and the numbers of ranks that allow this order.

Floating-point sums depend on their order. So shards are added up in a fixed tree of neighbours. Ranks that each hold a
whole branch of the tree give the same bits as one rank that holds all shards:

    6 shards    ((0 + 1) + (2 + 3)) + (4 + 5)        3 ranks: each adds its pair; 6 ranks: no rank has a pair
"""

from collections.abc import Sequence

from torch import Tensor


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of the same shape: neighbours are added in pairs as long as their number is even, then the
    rest from left to right."""
    total = tree_sum_of_some(parts)
    assert total is not None
    return total


def tree_sum_of_some(parts: Sequence[Tensor | None]) -> Tensor | None:
    """`tree_sum` if some parts are missing (None): the same as with zeros in their place. None if all are missing."""
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
    """The numbers of ranks that can share `shards` shards, ascending: `shards`, halved as long as it is even, and 1."""
    counts = [shards]
    while counts[-1] % 2 == 0:
        counts.append(counts[-1] // 2)
    return sorted({1, *counts})


def team_size(ranks: int, shards: int) -> int:
    """How many of `ranks` ranks train one SAE together: the most that can share its shards in teams of equal size."""
    return max(count for count in legal_counts(shards) if ranks % count == 0)
