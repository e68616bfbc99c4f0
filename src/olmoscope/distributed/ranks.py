"""The processes (ranks) that train one SAE together, or share other work, and how rows travel between them.

Every row of a batch has an owner, every latent a rank. Collectives only move bytes: sums are taken by the ranks
themselves, in a fixed order (sums.py), so that no library's choice of a ring or a tree can change a bit.

Shapes: P ranks, B rows of a batch, b rows that a rank owns, X anything that belongs to a row.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from olmoscope.distributed.sums import tree_sum_of_some
from olmoscope.errors import AnotherRankFailedError, LostRankError, UserError

LOST = ("another process of this command has ended, or cannot be reached: its own message, or that of the launcher, "
        "says why. What is finished is whole, checkpoints too; run the same command again to continue")


_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name since torch 2.13."""


class Ranks:
    """The ranks of a group, and which of them this process is.

    Args:
        index, count: this rank, and how many there are.
        group: their process group; None with several ranks: all that were started.
        node: how many neighbours, starting with the first rank, share a machine (a node); None: all.
    """

    def __init__(self, index: int = 0, count: int = 1, group: dist.ProcessGroup | None = None,
                 node: int | None = None) -> None:
        self.index, self.count, self._group, self.node = index, count, group, node or count
        self.traffic: Counter[str] = Counter()
        """Bytes that this rank sent to others, by what they were sent for: `gather`, `to_owners`, `from_owners`."""
        self.crossing: Counter[str] = Counter()
        """Those of them that went to ranks on other nodes."""

    @classmethod
    def alone(cls) -> "Ranks":
        """One process without a process group."""
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this rank writes what a group writes once."""
        return self.index == 0

    def bounds(self, rows: int) -> list[int]:
        """Where each rank's share of rows begins if they are shared out in the order of ranks, and the end: `P + 1`
        numbers."""
        return [rows * index // self.count for index in range(self.count + 1)]

    def own(self, rows: int) -> slice:
        """The rows of a batch that this rank owns."""
        bounds = self.bounds(rows)
        return slice(bounds[self.index], bounds[self.index + 1])

    def sizes(self, rows: int) -> list[int]:
        """How many rows each rank has by `bounds`."""
        return [stop - start for start, stop in pairwise(self.bounds(rows))]

    def gather(self, own: Tensor) -> Tensor:
        """Each rank's tensor, all of one shape, `[P, *shape]`.

        Raises:
            LostRankError: another rank is gone; so do all methods that exchange something.
        """
        return self.begin_gather(own)()

    def begin_gather(self, own: Tensor) -> Callable[[], Tensor]:
        """Begin what `gather` does, so that the bytes travel while this rank computes; the function waits for them.
        Other exchanges may come in between. All ranks must begin them in the same order."""
        if self.count == 1:
            return lambda: own[None]
        given = _bytes(own)
        found = given.new_empty(self.count * given.numel())
        with _alive():
            work = _ALL_GATHER(found, given, group=self._group, async_op=True)
        self.traffic["gather"] += given.numel() * (self.count - 1)
        self.crossing["gather"] += given.numel() * (self.count - self.node)

        def wait() -> Tensor:
            with _alive():
                work.wait()
            return found.view(own.dtype).view(self.count, *own.shape)

        return wait

    def gather_rows(self, own_bX: Tensor, rows: int) -> Tensor:
        """All rows of a batch `[B, X]`, in their order, on every rank.

        Args:
            own_bX: those that this rank owns.
            rows: B.
        """
        return self.gather_some(own_bX, self.sizes(rows))

    def gather_some(self, own_bX: Tensor, sizes: Sequence[int]) -> Tensor:
        """As `gather_rows`, of rows that are shared out otherwise: those of the first rank, then those of the next.

        Args:
            sizes: how many each rank has.
        """
        if self.count == 1:
            return own_bX
        most = max(sizes)
        padded_bX = own_bX if len(own_bX) == most else torch.cat(
            [own_bX, own_bX.new_zeros(most - len(own_bX), *own_bX.shape[1:])])
        parts_PbX = self.gather(padded_bX)
        if min(sizes) == most:
            return parts_PbX.flatten(0, 1)
        return torch.cat([part[:size] for part, size in zip(parts_PbX, sizes, strict=True)])

    def begin_gather_dealt(self, own_bX: Tensor, owners_B: np.ndarray | None) -> Callable[[], Tensor]:
        """Begin to gather all rows of a batch, in their order, on every rank, where each rank has read some of them;
        see `begin_gather`. The function returns them, `[B, X]`.

        Args:
            own_bX: those that this rank has, in the order of the batch; with several ranks they are copied.
            owners_B: which rank has each row; None with one rank.
        """
        if owners_B is None:
            return lambda: own_bX
        counts = np.bincount(owners_B, minlength=self.count)
        most = int(counts.max())
        padded_bX = torch.cat([own_bX, own_bX.new_zeros(most - len(own_bX), *own_bX.shape[1:])])
        places_B = np.empty(len(owners_B), np.int64)
        places_B[np.argsort(owners_B, kind="stable")] = np.concatenate(
            [rank * most + np.arange(count) for rank, count in enumerate(counts)])
        order_B, parts = torch.from_numpy(places_B).to(own_bX.device), self.begin_gather(padded_bX)
        return lambda: parts().flatten(0, 1)[order_B]

    def to_owners(self, rows_BX: Tensor) -> Tensor:
        """What every rank has for the rows that this rank owns, `[P, b, X]`; each gives what it has for all rows."""
        if self.count == 1:
            return rows_BX[None]
        sizes = self.sizes(len(rows_BX))
        own = sizes[self.index]
        found = self._exchange(rows_BX, sizes, [own] * self.count, "to_owners")
        return found.view(self.count, own, *rows_BX.shape[1:])

    def from_owners(self, own_PbX: Tensor, rows: int) -> Tensor:
        """What the owners have for this rank, for all rows, `[B, X]`.

        Args:
            own_PbX: what this rank, for the rows that it owns, has for each.
            rows: B.
        """
        if self.count == 1:
            return own_PbX[0]
        return self._exchange(own_PbX.flatten(0, 1), [own_PbX.shape[1]] * self.count, self.sizes(rows), "from_owners")

    def sums_to_owners(self, parts: Mapping[int, Tensor], has: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        """The sums over ranks (sums.py) of things that each may have for every row, for the rows that this rank owns:
        `[b, X]` by number.

        Args:
            parts: what this rank has, at least one thing: `[B, X]` by number.
            has: the numbers of what each rank has, ascending.
        """
        if self.count == 1:
            return dict(parts)
        mine = has[self.index]
        parts_BNX = torch.stack([parts[number] for number in mine], dim=1)
        sizes, shape = self.sizes(len(parts_BNX)), parts_BNX.shape[2:]
        own = sizes[self.index]
        taken = [own * len(numbers) for numbers in has]
        found = self._exchange(parts_BNX.flatten(0, 1), [size * len(mine) for size in sizes], taken, "to_owners")
        of_ranks = [dict(zip(numbers, part.view(own, len(numbers), *shape).unbind(dim=1), strict=True))
                    for numbers, part in zip(has, torch.split(found, taken), strict=True)]
        sums = {number: tree_sum_of_some([of.get(number) for of in of_ranks]) for number in united(has)}
        return {number: total for number, total in sums.items() if total is not None}

    def copies_from_owners(self, own: Mapping[int, Tensor], has: Sequence[Sequence[int]],
                           rows: int) -> dict[int, Tensor]:
        """What the owners of rows have for the ranks that need it, for all rows: `[B, X]` by number.

        Args:
            own: what this rank has for the rows that it owns: `[b, X]` by number.
            has: the numbers that each rank needs, ascending; alike on all ranks.
            rows: B.
        """
        mine = has[self.index]
        if self.count == 1 or not any(has):
            return {number: own[number] for number in mine}
        given = [torch.stack([own[number] for number in numbers], dim=1) for numbers in has if numbers]
        length, shape = len(given[0]), given[0].shape[2:]
        found = self._exchange(torch.cat([part.flatten(0, 1) for part in given]),
                               [length * len(numbers) for numbers in has],
                               [size * len(mine) for size in self.sizes(rows)], "from_owners")
        # How a sum over rows rounds depends on where they lie in memory.
        return {number: copy_BX.contiguous() for number, copy_BX in zip(
            mine, found.view(rows, len(mine), *shape).unbind(dim=1), strict=True)}

    def ask(self, value: int) -> list[int]:
        """What each rank answers; over the CPU, without a wait for any device."""
        if self.count == 1:
            return [int(value)]
        return [int(answer) for answer in self.gather(torch.tensor([int(value)]))[:, 0]]

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Run a block on all ranks; if it fails on some with a `UserError`, it fails on all.

        Raises:
            UserError: see `failure_of_all`.
        """
        failure: UserError | None = None
        try:
            yield
        except UserError as error:
            failure = error
        if (failure := self.failure_of_all(failure)) is not None:
            raise failure

    def failure_of_all(self, own: UserError | None) -> UserError | None:
        """What a rank is to raise, if any of them has a failure: the first to have one its own, all others an
        `AnotherRankFailedError`."""
        none, elsewhere, here = 0, 1, 2
        said = self.ask(none if own is None else elsewhere if isinstance(own, AnotherRankFailedError) else here)
        if not any(said):
            return None
        if self.count == 1 or (here in said and said.index(here) == self.index):
            return own
        return AnotherRankFailedError("another process failed")

    def _exchange(self, rows_RX: Tensor, given: list[int], taken: list[int], doing: str) -> Tensor:
        """Rows to each rank, `given` says how many, for rows of each, `taken` says how many."""
        width = rows_RX.shape[1:].numel() * rows_RX.itemsize
        found = torch.empty(sum(taken) * width, dtype=torch.uint8, device=rows_RX.device)
        with _alive():
            dist.all_to_all_single(found, _bytes(rows_RX), [count * width for count in taken],
                                   [count * width for count in given], group=self._group)
        first = self.index - self.index % self.node
        self.traffic[doing] += (sum(given) - given[self.index]) * width
        self.crossing[doing] += (sum(given) - sum(given[first : first + self.node])) * width
        return found.view(rows_RX.dtype).view(sum(taken), *rows_RX.shape[1:])


def united(has: Sequence[Sequence[int]]) -> list[int]:
    """All numbers that are in some of several lists, ascending."""
    return sorted({number for numbers in has for number in numbers})


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    """What torch says of a rank that is gone is a page about sockets."""
    try:
        yield
    except RuntimeError as error:
        if is_lost(error):
            raise LostRankError(LOST) from error
        raise


def is_lost(error: RuntimeError) -> bool:
    """Whether what torch raised means that another process is gone; gloo has no class of its own for it."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
