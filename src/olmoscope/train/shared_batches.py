"""The batches of a group of SAEs, on every rank that trains them. With several ranks, each reads only the rows of its
own segments, and the ranks exchange the rows of the next batch while they compute the current one."""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.activations.stream.batches import Stream, deal
from olmoscope.distributed.ranks import Ranks
from olmoscope.errors import UserError
from olmoscope.site import Site


@dataclass(frozen=True)
class SharedBatch:
    """A batch, the same on all ranks."""

    rows: dict[Site, Tensor]
    """The rows of each site, `[B, D]`, on the device."""
    position: dict[str, int]
    """The stream's state after this batch."""


def shared_batches(stream: Stream, device: torch.device, count: int, ranks: Ranks) -> Generator[SharedBatch]:
    """The next `count` batches; use each before asking for the next. All ranks must ask for the same number. Close the
    generator, or use it with `contextlib.closing`, because an exchange may be under way.

    Raises:
        UserError: a rank cannot read a round. All ranks raise, after the last batch that all of them could read.
        LostRankError: another rank is gone.
    """
    dealt = deal(stream, device, count)

    def begin() -> Callable[[], SharedBatch] | UserError:
        """Read this rank's rows and send them. A failure is returned, not raised: the batch is not due yet."""
        opened, unread = stream.opened, None
        try:
            own, owners, position = next(dealt)
        except UserError as error:
            unread = error
        if (stream.opened > opened or unread) and (unread := ranks.failure_of_all(unread)):
            return unread
        parts = {site: ranks.begin_gather_dealt(rows_bD, owners) for site, rows_bD in own.items()}
        return lambda: SharedBatch({site: wait() for site, wait in parts.items()}, position)

    ahead = ranks.count > 1  # with one rank, a batch is a view of a round's memory, so only one can be in use
    coming = begin() if ahead and count else None
    try:
        for number in range(count):
            begun, coming = coming or begin(), None
            if isinstance(begun, UserError):
                raise begun
            batch = begun()
            coming = begin() if ahead and number + 1 < count else None
            yield batch
    finally:
        if coming is not None and not isinstance(coming, UserError):
            coming()
