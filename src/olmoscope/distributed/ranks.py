"""The processes (ranks) that train one SAE together, or share other work, and how they exchange rows.

Each row of a batch belongs to one rank, its owner, and so does each latent. Collective operations only move bytes. The
ranks themselves add up, in a fixed order (sums.py), so that the algorithm of a library's all-reduce (a ring or a tree)
cannot change any bit.

Shapes: P ranks, B rows of a batch, b rows that a rank owns, X the remaining dimensions of what belongs to a row.
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
        "says why. Finished work and checkpoints are intact; run the same command again to continue")


_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name is `all_gather_single` since torch 2.13."""


class Ranks:
    """The ranks of a group, and which of them this process is.

    Args:
        index, count: this rank, and how many there are.
        group: their process group; None for the default group, which has all processes that were started.
        node: how many consecutive ranks, starting with the first, share a machine (a node); None if all do.
    """

    def __init__(self, index: int = 0, count: int = 1, group: dist.ProcessGroup | None = None,
                 node: int | None = None) -> None:
        self.index, self.count, self._group, self.node = index, count, group, node or count
        self.traffic: Counter[str] = Counter()
        """Bytes that this rank has sent to others, by purpose: `gather`, `to_owners`, `from_owners`."""
        self.crossing: Counter[str] = Counter()
        """How many of these bytes went to ranks on other nodes."""

    @classmethod
    def alone(cls) -> "Ranks":
        """One process without a process group."""
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this rank writes what the group writes only once."""
        return self.index == 0

    def bounds(self, rows: int) -> list[int]:
        """The first row of each rank's share, if the rows are divided in the order of the ranks, and the end: `P + 1`
        numbers."""
        return [rows * index // self.count for index in range(self.count + 1)]

    def own(self, rows: int) -> slice:
        """The rows of a batch that this rank owns."""
        bounds = self.bounds(rows)
        return slice(bounds[self.index], bounds[self.index + 1])

    def sizes(self, rows: int) -> list[int]:
        """How many rows each rank has according to `bounds`."""
        return [stop - start for start, stop in pairwise(self.bounds(rows))]

    def gather(self, own: Tensor) -> Tensor:
        """The tensors of all ranks, which have the same shape, stacked: `[P, *shape]`.

        Raises:
            LostRankError: another rank is gone. All methods that exchange something raise it.
        """
        return self.begin_gather(own)()

    def begin_gather(self, own: Tensor) -> Callable[[], Tensor]:
        """Begin what `gather` does, so that the bytes travel while this rank computes. The function that this returns
        waits for them and returns the result. Other exchanges may come in between. All ranks must begin their exchanges
        in the same order."""
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
        """All rows of a batch, in order, on every rank, `[B, X]`.

        Args:
            own_bX: the rows that this rank owns.
            rows: B.
        """
        return self.gather_some(own_bX, self.sizes(rows))

    def gather_some(self, own_bX: Tensor, sizes: Sequence[int]) -> Tensor:
        """Like `gather_rows`, for rows that are not divided by `bounds`: the rows of the first rank come first, then
        those of the next, and so on.

        Args:
            sizes: how many rows each rank has.
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
        """Begin to gather all rows of a batch, of which each rank has read some, on every rank; see `begin_gather`. The
        function that this returns gives them in the order of the batch, `[B, X]`.

        Args:
            own_bX: the rows that this rank has read, in the order of the batch; copied if there are several ranks.
            owners_B: which rank has read each row; None if there is only one rank.
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
        """Each rank's values for the rows that this rank owns, `[P, b, X]`.

        Args:
            rows_BX: this rank's values for all rows.
        """
        if self.count == 1:
            return rows_BX[None]
        sizes = self.sizes(len(rows_BX))
        own = sizes[self.index]
        found = self._exchange(rows_BX, sizes, [own] * self.count, "to_owners")
        return found.view(self.count, own, *rows_BX.shape[1:])

    def from_owners(self, own_PbX: Tensor, rows: int) -> Tensor:
        """The values that the owners have for this rank, for all rows, `[B, X]`.

        Args:
            own_PbX: the values that this rank has for each rank, for the rows that it owns.
            rows: B.
        """
        if self.count == 1:
            return own_PbX[0]
        return self._exchange(own_PbX.flatten(0, 1), [own_PbX.shape[1]] * self.count, self.sizes(rows), "from_owners")

    def sums_to_owners(self, parts: Mapping[int, Tensor], has: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        """The sums over ranks (sums.py) of numbered tensors, for the rows that this rank owns: `[b, X]` by number. A
        rank need not have all numbers.

        Args:
            parts: this rank's tensors, at least one: `[B, X]` by number.
            has: for each rank, the numbers of its tensors, ascending.
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
        """The numbered tensors that this rank needs, for all rows, from the owners of the rows: `[B, X]` by number.

        Args:
            own: the tensors for the rows that this rank owns: `[b, X]` by number.
            has: for each rank, the numbers that it needs, ascending; the same on all ranks.
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
        # Contiguous, because the rounding of a sum over rows depends on their layout in memory.
        return {number: copy_BX.contiguous() for number, copy_BX in zip(
            mine, found.view(rows, len(mine), *shape).unbind(dim=1), strict=True)}

    def ask(self, value: int) -> list[int]:
        """Each rank's value; exchanged by the CPU, without waiting for a device."""
        if self.count == 1:
            return [int(value)]
        return [int(answer) for answer in self.gather(torch.tensor([int(value)]))[:, 0]]

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Run a block on all ranks. If it raises a `UserError` on any rank, all ranks raise.

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
        """What this rank must raise if any rank has failed: the first rank with a failure of its own raises that
        failure, all others an `AnotherRankFailedError`. None if no rank has failed."""
        none, elsewhere, here = 0, 1, 2
        said = self.ask(none if own is None else elsewhere if isinstance(own, AnotherRankFailedError) else here)
        if not any(said):
            return None
        if self.count == 1 or (here in said and said.index(here) == self.index):
            return own
        return AnotherRankFailedError("another process failed")

    def _exchange(self, rows_RX: Tensor, given: list[int], taken: list[int], doing: str) -> Tensor:
        """Send `given[r]` rows to each rank r, and receive `taken[r]` rows from it."""
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
    """All numbers that are in at least one of several lists, ascending."""
    return sorted({number for numbers in has for number in numbers})


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    """Replace torch's error about a lost rank, which is a page about sockets, by a message for the user."""
    try:
        yield
    except RuntimeError as error:
        if is_lost(error):
            raise LostRankError(LOST) from error
        raise


def is_lost(error: RuntimeError) -> bool:
    """Whether an error that torch raised means that another process is gone. gloo has no exception class for this."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
