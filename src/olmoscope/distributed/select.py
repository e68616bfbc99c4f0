"""The k largest values of each row, where the candidates lie on several ranks.

Each shard of latents gives its own largest of each row, in descending order. The owner of a row sorts all of them and
sends back how many of each shard's values stay; the lists descend, so a count is enough. Of equal values those of the
lower shard stay, then those that come first in its list. The result is exact, and does not depend on the number of
ranks.

Shapes: B rows, b rows that a rank owns, P ranks, S shards of a rank, V all shards, K places of a list.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from olmoscope.distributed.ranks import Ranks


def keep_largest(values: Sequence[Tensor], k: int, width: int, ranks: Ranks) -> list[Tensor]:
    """The same lists, with 0 where a value is not among the k largest of its row in all shards of all ranks.

    Args:
        values: of each shard of this rank `[B, K]`, not negative, descending in each row; K may differ.
        k: how many stay in each row.
        width: K of the longest list of any rank.
    """
    if ranks.count == len(values) == 1:
        return list(values)
    rows = len(values[0])
    lists_BSK = torch.stack([torch.nn.functional.pad(shard_BK, (0, width - shard_BK.shape[1])) for shard_BK in values],
                            dim=1)
    lists_bN = ranks.to_owners(lists_BSK).transpose(0, 1).flatten(1)
    kept_bk = lists_bN.sort(dim=1, descending=True, stable=True).indices[:, :k]
    shards = ranks.count * len(values)
    counts_bV = torch.zeros(len(lists_bN), shards, dtype=torch.int32, device=lists_bN.device)
    counts_bV.scatter_add_(1, kept_bk // width, torch.ones_like(kept_bk, dtype=torch.int32))
    counts_bPS = counts_bV.view(len(lists_bN), ranks.count, len(values))
    counts_BS = ranks.from_owners(counts_bPS.transpose(0, 1), rows)
    places_K = torch.arange(width, device=counts_BS.device)
    return [torch.where(places_K[: shard_BK.shape[1]] < counts_BS[:, number : number + 1], shard_BK, 0)
            for number, shard_BK in enumerate(values)]
