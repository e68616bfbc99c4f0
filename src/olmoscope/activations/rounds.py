"""Rounds: what is mixed in memory at a time. A stream deals them out (stream.py); here they come from a store.

Shuffled: the rows of every segment were permuted when it was written. Round j reads slice j of every segment and
deals out their rows in a random order. An epoch thus covers each row once, mixes rows of all segments in every batch,
and reads the disk in long runs. Reading order: one segment a round, its rows as the model read them (the reference
recipe). Every block of rows is compared with its checksum as it is read.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.blocks import BLOCK_ROWS
from olmoscope.activations.filters import Kept
from olmoscope.activations.format import Manifest, read_dtype
from olmoscope.activations.store import Store
from olmoscope.sae.rows import Normalize
from olmoscope.seeds import generator

ROUND_ROWS = 2**17
"""Rows mixed in memory at a time, about (1 GB at d_model 4096 in bf16)."""
READERS = 4
"""Threads that read slices of a round."""


@dataclass(frozen=True)
class Round:
    """Rows in memory, and the order in which they are dealt out."""

    rows: dict[int, Tensor]
    """For each layer `[R, d_model]`; row i is the same token in each."""
    order: Tensor
    """int64: rows that are dealt out, each once; those not named are left out by a filter, or are no rows at all."""


class Rounds(Protocol):
    """A source of rounds; the same every time it is asked."""

    manifest: Manifest
    layers: list[int]
    kept: Kept
    sizes: list[int]
    """Rows dealt out in each round of an epoch."""
    ahead: bool
    """Whether a thread should read the next round while one is dealt out."""

    def read(self, epoch: int, number: int, spare: Round | None) -> Round:
        """Round `number` of an epoch.

        Args:
            spare: a round that nobody uses any more; its memory may be taken.
        """

    def sample_mean(self, layer: int, normalize: Normalize) -> Tensor:
        """Mean `[d_model]` (float32, CPU) of the rows dealt out, or of a random sample, as the SAE sees them."""


class StoreRounds:
    """Rounds of some layers of a store. Memory: the rows of a round, twice (one dealt out, one being read)."""

    ahead = True

    def __init__(self, store: Store, layers: list[int], order: Literal["shuffled", "reading"], seed: int,
                 kept: Kept) -> None:
        self.store, self.layers, self.order, self.seed, self.kept = store, layers, order, seed, kept
        self.manifest = store.manifest
        if order == "reading":
            self._slices = [[(segment, slice(0, rows))] for segment, rows in enumerate(store.segment_rows)]
        else:
            self._slices = _slices(store.segment_rows)
        self.sizes = [sum(self._kept(segment, part) for segment, part in slices) for slices in self._slices]
        self._capacity = max(sum(part.stop - part.start for _, part in slices) for slices in self._slices)

    def read(self, epoch: int, number: int, spare: Round | None) -> Round:
        """Read, check and order a round; see `Rounds`.

        Raises:
            UserError: a file is missing or damaged.
        """
        shape, dtype = (self._capacity, self.manifest.model.d_model), read_dtype(self.manifest.dtype)
        rows = spare.rows if spare else {layer: torch.empty(shape, dtype=dtype) for layer in self.layers}
        slices = self._slices[number]
        ends = np.cumsum([part.stop - part.start for _, part in slices]).tolist()

        def fill(job: tuple[int, int, slice, tuple[int, int]]) -> None:
            layer, segment, part, place = job
            self.store.read(layer, segment, part, out=rows[layer][slice(*place)])

        jobs = [(layer, segment, part, place) for layer in self.layers
                for (segment, part), place in zip(slices, pairwise([0, *ends]), strict=True)]
        with ThreadPoolExecutor(min(READERS, len(jobs)), "read-store") as readers:
            for _ in readers.map(fill, jobs):
                pass
        return Round(rows, torch.from_numpy(self._order(epoch, number)))

    def sample_mean(self, layer: int, normalize: Normalize) -> Tensor:
        """See `Rounds`."""
        return self.store.sample_mean(layer, normalize, self.kept.masks)

    def _order(self, epoch: int, number: int) -> np.ndarray:
        slices, masks = self._slices[number], self.kept.masks
        if self.order == "reading":
            rows = self.store.read_rows(number)
            order = np.lexsort((rows["position"].numpy(), rows["sequence"].numpy()))
            return order if masks is None else order[masks[number][order]]
        if masks is None:
            kept = np.arange(self.sizes[number])
        else:
            kept = np.flatnonzero(np.concatenate([masks[segment][part] for segment, part in slices]))
        return generator(self.seed, "rows of a round", epoch, number).permutation(kept)

    def _kept(self, segment: int, part: slice) -> int:
        if self.kept.masks is None:
            return int(part.stop - part.start)
        return int(self.kept.masks[segment][part].sum())


def _slices(segment_rows: list[int]) -> list[list[tuple[int, slice]]]:
    """For each round, which rows of each segment it reads: whole blocks, as even as they come.

    Where a segment's blocks do not divide by the rounds, the larger slices fall in other rounds for other segments.
    """
    blocks = [-(-rows // BLOCK_ROWS) for rows in segment_rows]
    rounds = max(1, min(max(blocks), round(sum(segment_rows) / ROUND_ROWS)))
    slices: list[list[tuple[int, slice]]] = [[] for _ in range(rounds)]
    for segment, rows in enumerate(segment_rows):
        bounds = [min(rows, (blocks[segment] * number + segment % rounds) // rounds * BLOCK_ROWS)
                  for number in range(rounds + 1)]
        for number, (start, stop) in enumerate(pairwise(bounds)):
            if stop > start:
                slices[number].append((segment, slice(start, stop)))
    return [part for part in slices if part]
