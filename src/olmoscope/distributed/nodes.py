"""Ranks on several machines (nodes), which exchange rows on two levels: within a node, and between nodes.

A node adds up its ranks' parts before they are sent to another one, and receives every row once. Rank r has the local
number `r % L` on node `r // L`. Each exchange is one among the L ranks of a node, and one among the M ranks that have
the same local number:

    to the owners      within the node, whose sums or selections then go to the other nodes
    from the owners    between nodes, then to the other ranks of the node

So that both levels send neighbouring rows, a row belongs first to a local number, then to a node. Sums keep their bits:
the ranks of a node hold a whole branch of the tree (sums.py).

Shapes: as in ranks.py; c rows that belong to a local number, on all nodes together.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from olmoscope.distributed.ranks import Ranks, united
from olmoscope.distributed.sums import legal_counts


class NodeRanks(Ranks):
    """Ranks that exchange rows on two levels, with the results of `Ranks`.

    Args:
        inside: the ranks of this node; several.
        between: those of the same local number, one on each node; several. `exchanges_on_two_levels` says for which
            numbers.
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
        """Begin to gather each rank's tensor, as `Ranks.begin_gather`. Only the exchange between nodes, the
        slow one, begins at once."""
        of_local = self.between.begin_gather(own)
        return lambda: self.inside.gather(of_local()).transpose(0, 1).reshape(self.count, *own.shape)

    def gather_rows(self, own_bX: Tensor, rows: int) -> Tensor:
        """All rows of a batch `[B, X]`, in their order, on every rank, as `Ranks.gather_rows`."""
        return self.inside.gather_rows(self.between.gather_rows(own_bX, self._of_local(rows)), rows)

    def to_owners(self, rows_BX: Tensor) -> Tensor:
        """What every rank has for the rows that this rank owns, `[P, b, X]`, as `Ranks.to_owners`; nothing is added
        up."""
        of_node_cLX = self.inside.to_owners(rows_BX).transpose(0, 1)
        return self.between.to_owners(of_node_cLX).transpose(1, 2).flatten(0, 1)

    def from_owners(self, own_PbX: Tensor, rows: int) -> Tensor:
        """What the owners have for this rank, for all rows, `[B, X]`, as `Ranks.from_owners`."""
        own_MbLX = own_PbX.view(self.between.count, self.inside.count, *own_PbX.shape[1:]).transpose(1, 2)
        return self.inside.from_owners(self.between.from_owners(own_MbLX, self._of_local(rows)).transpose(0, 1), rows)

    def sums_to_owners(self, parts: Mapping[int, Tensor], has: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        """Sums over ranks for the rows that this rank owns, as `Ranks.sums_to_owners`: each node sends its sums."""
        of_nodes = self._of_nodes(has)
        sums = self.inside.sums_to_owners(parts, of_nodes[self.between.index])
        return self.between.sums_to_owners(sums, [united(numbers) for numbers in of_nodes])

    def copies_from_owners(self, own: Mapping[int, Tensor], has: Sequence[Sequence[int]],
                           rows: int) -> dict[int, Tensor]:
        """What the owners of rows have for all rows, as `Ranks.copies_from_owners`: each node gets it once."""
        of_nodes = self._of_nodes(has)
        copies = self.between.copies_from_owners(own, [united(numbers) for numbers in of_nodes], self._of_local(rows))
        return self.inside.copies_from_owners(copies, of_nodes[self.between.index], rows)

    def _of_local(self, rows: int) -> int:
        """c: how many rows belong to this rank's local number."""
        return self.inside.sizes(rows)[self.inside.index]

    def _of_nodes(self, has: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
        return [has[first : first + self.node] for first in range(0, self.count, self.node)]


def exchanges_on_two_levels(count: int, node: int) -> bool:
    """Whether `count` ranks, `node` on each machine, are on several machines, and each machine's ranks hold a whole
    branch of the tree of sums."""
    return 1 < node < count and count % node == 0 and count // node in legal_counts(count)


def ranks_of_a_node(local_indices: Sequence[int]) -> int:
    """How many neighbouring ranks share a machine, by the local index of each; 1 where machines differ in that, or
    have ranks that are no neighbours."""
    node = max(local_indices) + 1
    whole = len(local_indices) % node == 0 and all(local == rank % node for rank, local in enumerate(local_indices))
    return node if whole else 1
