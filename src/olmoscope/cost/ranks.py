"""The bytes that a rank sends in one training step of an SAE in shards: those of the step itself
(train/sharded_step.py), and those of the next batch, which travel during the step (train/shared_batches.py).

Symbols: P ranks, B rows of a batch, b rows that a rank owns, D d_model, K places of a shard's codes, S shards of a
rank, N groups of latents that a rank has (1 without Matryoshka prefixes; train/nested.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from olmoscope.distributed.nodes import NodeRanks, exchanges_on_two_levels
from olmoscope.distributed.ranks import Ranks, united
from olmoscope.train.nested import prefix_ends
from olmoscope.train.sharded_loss import groups_of_ranks


def first_of_ranks(count: int, node: int) -> Ranks:
    """The first of `count` ranks that train an SAE together, `node` of them on each machine, with the same levels of
    exchange as in `join_team`."""
    if exchanges_on_two_levels(count, node):
        return NodeRanks(Ranks(0, node), Ranks(0, count // node))
    return Ranks(0, count, node=math.gcd(count, node))


@dataclass(frozen=True)
class BatchTraffic:
    """Bytes that a rank sends to others so that each rank has the whole batch, if each has read the same number of
    rows: with P ranks `(P - 1) ceil(B / P)` rows, on one level."""

    total: int
    crossing: int
    """How many of these bytes go to other nodes."""


def batch_traffic(rows: int, row_bytes: int, ranks: Ranks) -> BatchTraffic:
    """The traffic of a batch. On two levels, rows first travel between nodes, then within a node.

    Args:
        rows: B.
        row_bytes: the bytes of a row at all sites that are read or written.
        ranks: as in `step_traffic`.
    """
    own = -(-rows // ranks.count) * row_bytes
    if isinstance(ranks, NodeRanks):
        inside, between = ranks.inside, ranks.between
        crossing = own * (between.count - 1)
        return BatchTraffic(crossing + own * between.count * (inside.count - 1), crossing)
    return BatchTraffic(own * (ranks.count - 1), own * (ranks.count - ranks.node))


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that a rank sends to others in one step, without those of the auxiliary loss and of `train.finish`. The
    formulas are those of one level."""

    selection: int
    """Candidates sent to the owners of rows, and counts sent back: `4 (B - b) S K + 4 (P - 1) b S`."""
    parts: int
    """Parts of the reconstruction, sent to the owners: `4 (B - b) N D`."""
    errors: int
    """Losses and e of all rows: `(P - 1) (8 + 4 D) ceil(B / P)`. With Matryoshka prefixes also e of each group but the
    last, sent to each rank that has the group: `4 b D` each."""
    bias: int
    """Parts of the gradient of b_pre: `4 (P - 1) D`, and twice that with Matryoshka prefixes."""
    crossing: int = 0
    """How many of all these bytes go to other nodes."""

    @property
    def total(self) -> int:
        """All bytes."""
        return self.selection + self.parts + self.errors + self.bias


def step_traffic(rows: int, d_model: int, d_sae: int, k: int, shards: int, ranks: Ranks,
                 matryoshka: Sequence[float] = (), selects: bool = True) -> StepTraffic:
    """The traffic of a TopK SAE. (For the threshold of a batch, BatchTopK sends 48 kB more to each other rank.)

    On two levels (distributed/nodes.py), a rank first sends what it would send if its node had all ranks. It then sends
    to other nodes what a rank with the lists and groups of the whole node would send, but only for the rows that belong
    to its local number. The bias takes `4 M (L - 1) D + 4 (M - 1) D` bytes, with L ranks on each of M nodes.

    Args:
        rows: B.
        k: the k of the whole SAE.
        shards: the number of shards of the whole SAE.
        ranks: which rank it is, and how many share the SAE.
        matryoshka: shares of the latents that are SAEs of their own.
        selects: whether the owner of a row selects among the candidates of all shards; not with group-max.
    """
    each, places = (shards // ranks.count if selects else 0), min(k, -(-d_sae // shards))
    groups = groups_of_ranks(prefix_ends(matryoshka, d_sae), shards, ranks.count)
    vectors, last = 2 if matryoshka else 1, len(matryoshka)
    if not isinstance(ranks, NodeRanks):
        return _level(ranks, rows, d_model, each, places, groups, last, vectors)
    inside, between, node = ranks.inside, ranks.between, ranks.node
    of_nodes = [groups[first : first + node] for first in range(0, ranks.count, node)]
    near = _level(inside, rows, d_model, each, places, of_nodes[between.index], last, vectors * between.count)
    far = _level(between, inside.sizes(rows)[inside.index], d_model, int(selects), min(k, node * each * places),
                 [united(numbers) for numbers in of_nodes], last, vectors)
    return StepTraffic(near.selection + far.selection, near.parts + far.parts, near.errors + far.errors,
                       near.bias + far.bias, far.total)


def _level(ranks: Ranks, rows: int, d_model: int, lists: int, places: int, groups: Sequence[Sequence[int]], last: int,
           vectors: int) -> StepTraffic:
    """The traffic among ranks that exchange rows on one level.

    Args:
        lists, places: how many lists of candidates this rank has, and how long they are.
        groups: the groups of each rank. The e of the group `last` is that of all latents.
        vectors: how many gradients of a bias this rank has.
    """
    sizes, first = ranks.sizes(rows), ranks.index - ranks.index % ranks.node

    def sent(to: Sequence[int]) -> StepTraffic:
        taken, own = sum(sizes[rank] for rank in to), sizes[ranks.index]
        coarse = sum(group < last for rank in to for group in groups[rank])
        return StepTraffic(selection=4 * lists * (taken * places + len(to) * own),
                           parts=4 * taken * len(groups[ranks.index]) * d_model,
                           errors=len(to) * (8 + 4 * d_model) * max(sizes) + 4 * own * coarse * d_model,
                           bias=4 * len(to) * d_model * vectors)

    others = [rank for rank in range(ranks.count) if rank != ranks.index]
    return replace(sent(others), crossing=sent([rank for rank in others
                                                if not first <= rank < first + ranks.node]).total)
