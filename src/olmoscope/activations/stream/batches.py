"""What training reads: batches of activations, in an order that can be resumed from three integers.

    source of rounds (a store: rounds.py, or the model itself: live.py) -> Stream -> batches on the device

While the rows of a round are dealt out in batches, a thread reads the next round, and never more than that one. If
several processes share the rounds, each gets the rows of a batch that come from its own segments, and knows which
process has each of the other rows.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.stream.rounds import Round, Rounds
from olmoscope.site import Site

START = {"epoch": 0, "round": 0, "offset": 0}


class Stream:
    """Batches of rows; the last batch of an epoch may be smaller. The stream must be closed: call `close`, or use
    `contextlib.closing`."""

    def __init__(self, rounds: Rounds, batch: int, epochs: int = 1) -> None:
        """
        Args:
            batch: rows per batch, in all processes together.
            epochs: how many epochs will be used; nothing is read ahead beyond them.
        """
        self.rounds, self.batch, self.epochs = rounds, batch, epochs
        self.owners: np.ndarray | None = None
        """The process that has each row of the last batch, `[batch]`; None if this process has all of them."""
        self._epoch = self._number = self._offset = 0
        self._before = [0, *accumulate(rounds.sizes)]
        """For each round, the number of rows of an epoch that are dealt out before it."""
        self._current: tuple[tuple[int, int], Round] | None = None
        self._owners: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None
        """For the round `_current`: the process that has each row, and how many of the rows before it this process
        has."""
        self._coming: tuple[tuple[int, int], Future[Round]] | None = None
        self.opened = 0
        """How many rounds this stream has begun to use, including those that could not be read."""
        self._thread = ThreadPoolExecutor(1, "read-ahead")

    @property
    def rows(self) -> int:
        """Rows per epoch, in all processes together."""
        return self._before[-1]

    @property
    def batches(self) -> int:
        """Batches per epoch."""
        return -(-self.rows // self.batch)

    def length(self, number: int) -> int:
        """Rows of batch `number`, counted from 0 over all epochs, in all processes together."""
        return min(self.batch, self.rows - number % self.batches * self.batch)

    def state(self) -> dict[str, int]:
        """The position of the stream: in round `round` of epoch `epoch`, the rows before `offset` are dealt out."""
        return {"epoch": self._epoch, "round": self._number, "offset": self._offset}

    def restore(self, state: dict[str, int]) -> None:
        """Continue from a `state`."""
        self._epoch, self._number, self._offset = state["epoch"], state["round"], state["offset"]

    def next_batch(self) -> dict[Site, Tensor]:
        """The next batch: for each site the rows that this process has, `[batch, D]`, in the store's dtype and on the
        device of the rounds.

        The tensors are views of a round's memory, which the round after next overwrites: use or copy them before
        asking for the next batch. If this raises, the position of the stream does not change.

        Raises:
            UserError: the rounds cannot be read.
        """
        epoch, number, offset = self._epoch, self._number, self._offset
        length = min(self.batch, self.rows - self._before[number] - offset)
        parts: list[dict[Site, Tensor]] = []
        owners: list[np.ndarray] = []
        dealt = 0
        while dealt < length:
            piece = min(length - dealt, self.rounds.sizes[number] - offset)
            if piece:
                current = self._round(epoch, number)
                own = slice(offset, offset + piece)
                if self.rounds.share[1] > 1:
                    owners_R, before_R1 = self._shared(epoch, number)
                    owners.append(owners_R[own])
                    own = slice(int(before_R1[own.start]), int(before_R1[own.stop]))
                part = {site: rows_RD[own] for site, rows_RD in current.items()}
                whole = piece == length
                parts.append(part if whole else {site: rows_BD.clone() for site, rows_BD in part.items()})
            dealt += piece
            offset += piece
            while number < len(self.rounds.sizes) and offset == self.rounds.sizes[number]:  # a filter may empty some
                number, offset = number + 1, 0
        if number == len(self.rounds.sizes):
            epoch, number = epoch + 1, 0
        self._epoch, self._number, self._offset = epoch, number, offset
        self.owners = np.concatenate(owners) if owners else None
        if len(parts) == 1:
            return parts[0]
        return {site: torch.cat([part[site] for part in parts]) for site in self.rounds.sites}

    def close(self) -> None:
        """Stop reading ahead; waits for a round that is being read."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _shared(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The process that has each row of a round, `[R]`, and how many of the rows before it this process has,
        `[R + 1]`."""
        if self._owners is None or self._owners[0] != (epoch, number):
            owners_R = self.rounds.owners(epoch, number)
            before_R1 = np.concatenate([[0], np.cumsum(owners_R == self.rounds.share[0])])
            self._owners = (epoch, number), owners_R, before_R1
        return self._owners[1:]

    def _round(self, epoch: int, number: int) -> Round:
        """A round, which the thread may have read ahead; starts reading the next one."""
        if self._current is None or self._current[0] != (epoch, number):
            self.opened += 1
            spare = self._current[1] if self._current else None
            self._current = None
            if self._coming:
                coming, future = self._coming
                self._coming = None
                if coming == (epoch, number):
                    self._current = (coming, future.result())
                else:
                    future.cancel()
            self._current = self._current or ((epoch, number), self.rounds.read(epoch, number, None))
            after = (epoch, number + 1) if number + 1 < len(self.rounds.sizes) else (epoch + 1, 0)
            if self.rounds.ahead and after[0] < self.epochs:
                self._coming = (after, self._thread.submit(self.rounds.read, *after, spare))
        return self._current[1]


Dealt = tuple[dict[Site, Tensor], np.ndarray | None, dict[str, int]]
"""A batch, the process that has each of its rows (`Stream.owners`), and the stream's state after it."""


def deal(stream: Stream, device: torch.device, count: int) -> Iterator[Dealt]:
    """The next `count` batches on a device; use each before asking for the next.

    To a GPU, a batch is copied through page-locked memory on a separate CUDA stream, one batch ahead of the one in use.

    Raises:
        UserError: as `Stream.next_batch`.
    """
    if device.type != "cuda":
        for _ in range(count):
            yield stream.next_batch(), stream.owners, stream.state()
        return
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start() -> tuple[Dealt, torch.cuda.Event]:
        batch = stream.next_batch()
        copies.wait_stream(torch.cuda.current_stream(device))  # a batch made on the device must be there first
        with torch.cuda.stream(copies):
            moved = {site: (rows_BD.clone() if rows_BD.is_cuda else rows_BD.pin_memory().to(device, non_blocking=True))
                     for site, rows_BD in batch.items()}
        return (moved, stream.owners, stream.state()), copies.record_event()

    coming = start() if count else None
    for number in range(count):
        assert coming is not None
        dealt, copied = coming
        coming = start() if number + 1 < count else None
        torch.cuda.current_stream(device).wait_event(copied)
        for rows_BD in dealt[0].values():
            rows_BD.record_stream(torch.cuda.current_stream(device))
        yield dealt
