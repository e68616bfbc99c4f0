"""Ranks on several machines (nodes) that exchange rows on two levels: within a node, and between nodes.

A node adds up its ranks' parts before it sends them to another node, and receives every row once. Rank r has the local
number `r % L` on node `r // L`. Each exchange has two stages: one among the L ranks of a node, and one among the M
ranks that have the same local number:

    to the owners      within each node; then the node's sums or selections go to the other nodes
    from the owners    between nodes; then to the other ranks of the node

Rows are assigned first to local numbers, then to nodes, so that both levels send contiguous rows. The bits of sums do
not change, because the ranks of a node hold a whole branch of the tree (sums.py).

Shapes: as in ranks.py; c rows that belong to a local number, on all nodes together.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from olmoscope.distributed.ranks import Ranks, united
from olmoscope.distributed.sums import legal_counts


class NodeRanks(Ranks):
    """Ranks that exchange rows on two levels. Every method returns the same as that of `Ranks`.

    Args:
        inside: the ranks of this node, more than one.
        between: the ranks with the same local number, one on each node, more than one. `exchanges_on_two_levels` says
            which numbers of ranks and nodes are possible.
    """

    def __init__(self, inside: Ranks, between: Ranks) -> None:
        super().__init__(between.index * inside.count + inside.index, between.count * inside.count, node=inside.count)
        self.inside, self.between = inside, between
        between.node = 1
        for level in (inside, between):
            level.traffic, level.crossing = self.traffic, self.crossing

    def own(self, rows: int) -> slice:
        """The rows of a batch that this rank owns."""
        of_local = self.inside.own(rows)
        own = self.between.own(of_local.stop - of_local.start)
        return slice(of_local.start + own.start, of_local.start + own.stop)

    def begin_gather(self, own: Tensor) -> Callable[[], Tensor]:
        """Begin to gather each rank's tensor, as `Ranks.begin_gather`. Only the exchange between nodes, which is the
        slow one, begins at once."""
        of_local = self.between.begin_gather(own)
        return lambda: self.inside.gather(of_local()).transpose(0, 1).reshape(self.count, *own.shape)

    def gather_rows(self, own_bX: Tensor, rows: int) -> Tensor:
        """All rows of a batch, in order, on every rank, `[B, X]`, as `Ranks.gather_rows`."""
        return self.inside.gather_rows(self.between.gather_rows(own_bX, self._of_local(rows)), rows)

    def to_owners(self, rows_BX: Tensor) -> Tensor:
        """Each rank's values for the rows that this rank owns, `[P, b, X]`, as `Ranks.to_owners`. Nothing is added
        up."""
        of_node_cLX = self.inside.to_owners(rows_BX).transpose(0, 1)
        return self.between.to_owners(of_node_cLX).transpose(1, 2).flatten(0, 1)

    def from_owners(self, own_PbX: Tensor, rows: int) -> Tensor:
        """The values that the owners have for this rank, for all rows, `[B, X]`, as `Ranks.from_owners`."""
        own_MbLX = own_PbX.view(self.between.count, self.inside.count, *own_PbX.shape[1:]).transpose(1, 2)
        return self.inside.from_owners(self.between.from_owners(own_MbLX, self._of_local(rows)).transpose(0, 1), rows)

    def sums_to_owners(self, parts: Mapping[int, Tensor], has: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        """Sums over ranks for the rows that this rank owns, as `Ranks.sums_to_owners`. Each node sends only its own
        sums."""
        of_nodes = self._of_nodes(has)
        sums = self.inside.sums_to_owners(parts, of_nodes[self.between.index])
        return self.between.sums_to_owners(sums, [united(numbers) for numbers in of_nodes])

    def copies_from_owners(self, own: Mapping[int, Tensor], has: Sequence[Sequence[int]],
                           rows: int) -> dict[int, Tensor]:
        """The owners' values for all rows, as `Ranks.copies_from_owners`. Each node receives them once."""
        of_nodes = self._of_nodes(has)
        copies = self.between.copies_from_owners(own, [united(numbers) for numbers in of_nodes], self._of_local(rows))
        return self.inside.copies_from_owners(copies, of_nodes[self.between.index], rows)

    def _of_local(self, rows: int) -> int:
        """c, the number of rows that belong to this rank's local number."""
        return self.inside.sizes(rows)[self.inside.index]

    def _of_nodes(self, has: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
        return [has[first : first + self.node] for first in range(0, self.count, self.node)]


def exchanges_on_two_levels(count: int, node: int) -> bool:
    """Whether `count` ranks, `node` of them on each machine, are on several machines, and the ranks of each machine
    hold a whole branch of the tree of sums."""
    return 1 < node < count and count % node == 0 and count // node in legal_counts(count)


def ranks_of_a_node(local_indices: Sequence[int]) -> int:
    """How many consecutive ranks share a machine, from the local index of each rank; 1 if the machines have different
    numbers of ranks, or if the ranks of a machine are not consecutive."""
    node = max(local_indices) + 1
    whole = len(local_indices) % node == 0 and all(local == rank % node for rank, local in enumerate(local_indices))
    return node if whole else 1
