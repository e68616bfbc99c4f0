"""What training reads: batches of activations from a store, in an order that three integers can resume.

Shuffled: the rows of every segment were permuted when it was written. Round j reads slice j of every segment, permutes
these rows in memory and deals them out. An epoch thus covers each row once, mixes rows of all segments in every batch,
and reads the disk in long runs. Reading order: one segment a round, its rows as the model read them (the reference
recipe).
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.format import read_rows
from olmoscope.activations.store import Store
from olmoscope.seeds import generator

ROUND_ROWS = 2**17
"""Rows mixed in memory at a time (1 GB at d_model 4096 in bf16), as far as slices stay long enough."""
SLICE_ROWS = 256
"""Shortest slice read at a time: 2 MB at d_model 4096 in bf16, so that the disk reads sequentially."""


class Stream:
    """Batches `[batch, d_model]` of one layer of a store; the last one of an epoch may be smaller."""

    def __init__(self, store: Store, layer: int, batch: int, order: Literal["shuffled", "reading"], seed: int) -> None:
        self.store, self.layer, self.batch, self.order, self.seed = store, layer, batch, order, seed
        self.epoch = self.round = self.offset = 0
        if order == "reading":
            self.rounds = store.manifest.segments
        else:
            slices = max(store.segment_rows) // SLICE_ROWS  # a short last segment gives short slices
            self.rounds = max(1, min(slices, round(store.rows / ROUND_ROWS)))
        self._loaded: tuple[int, int, Tensor] | None = None

    @property
    def batches(self) -> int:
        """Batches of one epoch."""
        return -(-self.store.rows // self.batch)

    def state(self) -> dict[str, int]:
        """Where it is: rows before `offset` of this round of this epoch are dealt out."""
        return {"epoch": self.epoch, "round": self.round, "offset": self.offset}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a `state`."""
        self.epoch, self.round, self.offset = state["epoch"], state["round"], state["offset"]

    def __iter__(self) -> Iterator[Tensor]:
        """Endless: epoch after epoch, each in an order of its own (or always in reading order)."""
        while True:
            yield self.next_batch()

    def next_batch(self) -> Tensor:
        """The next batch, in the store's dtype, on the CPU."""
        parts: list[Tensor] = []
        missing = self.batch
        while missing:
            rows_RD = self._round()
            part_RD = rows_RD[self.offset : self.offset + missing]
            parts.append(part_RD)
            missing -= len(part_RD)
            self.offset += len(part_RD)
            if self.offset == len(rows_RD):
                self.round, self.offset = self.round + 1, 0
            if self.round == self.rounds:
                self.epoch, self.round = self.epoch + 1, 0
                break
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _round(self) -> Tensor:
        """The rows of the current round, `[rows, d_model]`, in the order in which they are dealt out."""
        if self._loaded is None or self._loaded[:2] != (self.epoch, self.round):
            self._loaded = None  # free the old round before the new one is read
            rows_RD = self._read_in_order() if self.order == "reading" else self._read_shuffled()
            self._loaded = (self.epoch, self.round, rows_RD)
        return self._loaded[2]

    def _read_in_order(self) -> Tensor:
        rows = read_rows(self.store.path, self.round)
        rows_RD = self.store.read(self.layer, self.round, slice(0, self.store.segment_rows[self.round]))
        return rows_RD[torch.from_numpy(np.lexsort((rows["position"].numpy(), rows["sequence"].numpy())))]

    def _read_shuffled(self) -> Tensor:
        slices = [self.store.read(self.layer, segment, slice(rows * self.round // self.rounds,
                                                             rows * (self.round + 1) // self.rounds))
                  for segment, rows in enumerate(self.store.segment_rows)]
        rows_RD = torch.cat(slices)
        order = generator(self.seed, "rows of a round", self.epoch, self.round).permutation(len(rows_RD))
        return rows_RD[torch.from_numpy(order)]
