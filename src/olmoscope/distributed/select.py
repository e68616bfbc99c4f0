"""The k largest values of each row, and the n-th largest of all, when the values are on several ranks.

Each shard of latents sends its largest values of each row, in descending order. The owner of a row sees all of them and
sends back how many of each shard's values to keep. A count is enough, because the lists are in descending order. Among
equal values, those of a lower shard come first, then those earlier in a list. The result is exact, and does not depend
on the number of ranks.

Shapes: B rows, b rows that a rank owns, P ranks, S shards of a rank, V all shards, K places of a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from olmoscope.distributed.nodes import NodeRanks
from olmoscope.distributed.ranks import Ranks

DIGIT_BITS = 11
"""How many bits of a number `nth_largest` examines in one round."""


@dataclass(frozen=True)
class Kept:
    """What is kept of the lists of one rank's shards."""

    values: list[Tensor]
    """The lists, with 0 where a value is not kept."""
    last: list[Tensor]
    """For each list, `[B]`: the place of the row's k-th largest value if it is in this list and positive, else -1."""


def keep_largest(values: Sequence[Tensor], k: int, width: int, ranks: Ranks) -> Kept:
    """The values that are among the k largest of their row in all shards of all ranks.

    Args:
        values: `[B, K]` for each shard of this rank, nonnegative, descending in each row. K may differ between shards.
        k: how many to keep in each row.
        width: K of the longest list on any rank.
    """
    lists_BSK = torch.stack([pad(shard_BK, (0, width - shard_BK.shape[1])) for shard_BK in values], dim=1)
    said_BS = _how_many(lists_BSK.nan_to_num(nan=torch.inf, posinf=torch.inf), k, ranks)
    counts_BS, is_last_BS = said_BS // 2, said_BS % 2 == 1
    places_K = torch.arange(width, device=said_BS.device)
    return Kept([torch.where(places_K[: shard_BK.shape[1]] < counts_BS[:, number : number + 1], shard_BK, 0)
                 for number, shard_BK in enumerate(values)],
                list(torch.where(is_last_BS, counts_BS - 1, -1).long().unbind(dim=1)))


def _how_many(lists_BSK: Tensor, k: int, ranks: Ranks) -> Tensor:
    """How many values of each list of this rank are among the k largest of their row, `[B, S]`, encoded as twice that
    number, plus 1 if the list has the k-th largest and this is positive."""
    rows = len(lists_BSK)
    if isinstance(ranks, NodeRanks):
        return ranks.inside.from_owners(_in_merged(ranks.inside.to_owners(lists_BSK), k, ranks.between), rows)
    lists_PbSK = ranks.to_owners(lists_BSK)
    shape = lists_PbSK.shape[:3]
    said_bV = _chosen(lists_PbSK.transpose(0, 1).flatten(1, 2), k)
    return ranks.from_owners(said_bV.view(shape[1], shape[0], shape[2]).transpose(0, 1), rows)


def _chosen(lists_bVK: Tensor, k: int) -> Tensor:
    """The result of `_how_many` for all the lists that an owner has for its rows, `[b, V]`."""
    _, shards, width = lists_bVK.shape
    k = min(k, shards * width)
    least_b1 = lists_bVK.flatten(1).kthvalue(shards * width - k + 1, dim=1, keepdim=True).values
    over_bV = (lists_bVK > least_b1[:, :, None]).sum(dim=2)
    equal_bV = (lists_bVK == least_b1[:, :, None]).sum(dim=2)
    left_bV = k - over_bV.sum(dim=1, keepdim=True) - (equal_bV.cumsum(dim=1) - equal_bV)
    taken_bV = left_bV.clamp_min(0).minimum(equal_bV)
    is_last_bV = (taken_bV > 0) & (taken_bV == left_bV) & (least_b1 > 0)
    return (2 * (over_bV + taken_bV) + is_last_bV).int()


def _in_merged(lists_LcSK: Tensor, k: int, between: Ranks) -> Tensor:
    """The result of `_how_many` for the lists of a node's ranks, `[L, c, S]`. The node sends one list, of its k
    largest values, to the owners of the rows."""
    ranks, rows, shards, width = lists_LcSK.shape
    merged_cN, places_cN = lists_LcSK.transpose(0, 1).flatten(1).sort(dim=1, descending=True, stable=True)
    said_c1 = _how_many(merged_cN[:, None, :k], k, between)
    count_c1, is_last_c1 = said_c1 // 2, said_c1 % 2 == 1
    lists_ck = places_cN[:, :k] // width
    kept_ck = torch.arange(lists_ck.shape[1], device=said_c1.device) < count_c1
    counts_cV = torch.zeros(rows, ranks * shards, dtype=torch.int32, device=said_c1.device)
    counts_cV.scatter_add_(1, lists_ck, kept_ck.int())
    last_c1 = lists_ck.gather(1, (count_c1 - 1).clamp_min(0).long())
    said_cV = (2 * counts_cV).scatter_add_(1, last_c1, is_last_c1.int())
    return said_cV.view(rows, ranks, shards).transpose(0, 1)


def nth_largest(values: Sequence[Tensor], n: int, ranks: Ranks) -> Tensor:
    """The n-th largest of all values of all lists and ranks, as an exact scalar.

    The bit patterns of nonnegative numbers sort like the numbers. So their leading digits are counted, and the counts
    give the leading digit of the result; each further round examines only numbers that share the digits known so far.
    The counts are integers, so their sum does not depend on its order.

    Args:
        values: the values of each shard of this rank, nonnegative. NaN counts as larger than any number.
        n: from 1 to the total number of values.
    """
    own_N = torch.cat([shard.flatten() for shard in values])
    integers = torch.int64 if own_N.itemsize == 8 else torch.int32
    bits_N = own_N.view(integers) & torch.iinfo(integers).max
    found = torch.zeros((), dtype=integers, device=own_N.device)
    left = torch.full((), n, dtype=torch.int64, device=own_N.device)
    for shift in reversed(range(0, 8 * own_N.itemsize, DIGIT_BITS)):
        digits_N = (bits_N >> shift) - (found >> shift)  # a single digit, if the digits before it match
        looked_at_N = (digits_N >= 0) & (digits_N < 1 << DIGIT_BITS)
        counts_H = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64, device=own_N.device)
        counts_H.scatter_add_(0, torch.where(looked_at_N, digits_N, 0).long(), looked_at_N.long())
        counts_H = ranks.gather(counts_H).sum(dim=0)
        reached_H = counts_H.flip(0).cumsum(0).flip(0)
        digit = (reached_H >= left).sum() - 1  # the last digit that `left` values reach
        left -= torch.where(torch.arange(1 << DIGIT_BITS, device=digit.device) > digit, counts_H, 0).sum()
        found += (digit << shift).to(integers)
    return found.view(own_N.dtype)
