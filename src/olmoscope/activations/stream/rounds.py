"""Rounds: what is mixed in memory at a time. A stream deals them out (batches.py); here they come from a store.

Shuffled: the rows of every segment were permuted when it was written. Round j reads slice j of every segment and
deals out their rows in a random order. An epoch thus covers each row once, mixes rows of all segments in every batch,
and reads the disk in long runs. Reading order: one segment a round, its rows as the model read them (the reference
recipe).

A few blocks are read at a time into memory that stays in the processor's cache, compared with their checksums there,
and each row is copied to its place in the round: one pass over the round's memory, and batches are then parts of it.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.store.blocks import BLOCK_ROWS
from olmoscope.activations.store.format import Manifest, read_dtype
from olmoscope.activations.store.reader import Store
from olmoscope.activations.stream.filters import Kept
from olmoscope.sae.normalize import Normalize
from olmoscope.seeds import generator
from olmoscope.site import Site

ROUND_ROWS = 2**17
"""Rows mixed in memory at a time, about (1 GB at d_model 4096 in bf16)."""
READERS = 4
"""Threads that read slices of a round."""
ROWS_AT_ONCE = BLOCK_ROWS
"""Rows that a thread reads before it puts them in their places (2 MB at d_model 4096 in bf16)."""


Round = dict[Site, Tensor]
"""For each site `[rows, D]`, in the order in which they are dealt out; row i is the same token in each."""


class Rounds(Protocol):
    """A source of rounds; the same every time it is asked."""

    manifest: Manifest
    sites: list[Site]
    kept: Kept
    sizes: list[int]
    """Rows dealt out in each round of an epoch."""
    ahead: bool
    """Whether a thread should read the next round while one is dealt out."""
    share: tuple[int, int]
    """(I, P): this process has the rows of segments I, I + P, I + 2P and so on."""

    @property
    def tokens(self) -> Path:
        """The store whose `tokens/` has the sequences that the rows are of."""

    def read(self, epoch: int, number: int, spare: Round | None) -> Round:
        """This process's rows of round `number` of an epoch.

        Args:
            spare: a round that nobody uses any more; its memory may be taken.

        Returns:
            The round; memory behind its last row is no part of it.
        """

    def owners(self, epoch: int, number: int) -> np.ndarray:
        """Which process has each row of a round, in the order in which they are dealt out."""

    def sample_mean(self, site: Site, normalize: Normalize) -> Tensor:
        """Mean `[D]` (float32, CPU) of the rows dealt out, or of a random sample, as the SAE sees them."""

    def median_norm(self, site: Site) -> float:
        """Median ‖x‖ of the rows dealt out, or of a random sample."""

    def sample(self, site: Site, rows: int) -> Tensor:
        """About so many rows of those dealt out, at random, `[N, D]` (float32, CPU)."""

    def outliers(self, site: Site, over: float, rows: int) -> Tensor:
        """Rows whose norm is over `over`, up to so many, `[N, D]` (float32, CPU); also of those that are not dealt
        out, where they are known."""


class StoreRounds:
    """Rounds of some sites of a store. Memory: this process's rows of a round, twice (one dealt out, one being read).
    """

    ahead = True

    def __init__(self, store: Store, sites: list[Site], order: Literal["shuffled", "reading"], seed: int,
                 kept: Kept, share: tuple[int, int] = (0, 1)) -> None:
        """
        Args:
            share: see `Rounds`; nothing else is read of the sites.
        """
        self.share = share
        self.store, self.sites, self.order, self.seed, self.kept = store, sites, order, seed, kept
        self.manifest = store.manifest
        if order == "reading":
            self._slices = [[(segment, slice(0, rows))] for segment, rows in enumerate(store.segment_rows)]
        else:
            self._slices = _slices(store.segment_rows)
        self._scratch: SimpleQueue[Tensor] = SimpleQueue()
        """Memory for each reader, used again and again: fresh memory costs more than reading into it."""
        for _ in range(READERS):
            self._scratch.put(torch.empty(ROWS_AT_ONCE * max(map(self.manifest.width, sites)),
                                          dtype=read_dtype(self.manifest.dtype)))
        self.sizes = [sum(self._kept(segment, part) for segment, part in slices) for slices in self._slices]
        self._most = max(sum(self._kept(segment, part) for segment, part in slices if self._is_own(segment))
                         for slices in self._slices)
        """Rows that this process has of a round, at most."""

    @property
    def tokens(self) -> Path:
        """See `Rounds`."""
        return self.store.path

    def read(self, epoch: int, number: int, spare: Round | None) -> Round:
        """Read, check and mix a round; see `Rounds`.

        Raises:
            UserError: a file is missing or damaged.
        """
        dtype = read_dtype(self.manifest.dtype)
        rows = spare or {site: torch.empty(self._most, self.manifest.width(site), dtype=dtype)
                         for site in self.sites}
        slices = self._slices[number]
        ends = np.cumsum([part.stop - part.start for _, part in slices]).tolist()
        places = np.full(ends[-1], -1)
        order = self._order(epoch, number)
        order = order[self._owners(number, order) == self.share[0]]
        places[order] = np.arange(len(order))

        def fill(job: tuple[Site, int, slice, tuple[int, int]]) -> None:
            site, segment, part, (first, end) = job
            self._place(site, segment, part, places[first:end], rows[site])

        jobs = [(site, segment, part, place) for site in self.sites
                for (segment, part), place in zip(slices, pairwise([0, *ends]), strict=True) if self._is_own(segment)]
        with ThreadPoolExecutor(READERS, "read-store") as readers:
            for _ in readers.map(fill, jobs):
                pass
        return rows

    def _place(self, site: Site, segment: int, part: slice, places: np.ndarray, rows_RD: Tensor) -> None:
        """Read a slice of a segment and copy each of its rows to its place, or nowhere (−1)."""
        memory = self._scratch.get()
        try:
            scratch = memory[: ROWS_AT_ONCE * rows_RD.shape[1]].view(ROWS_AT_ONCE, rows_RD.shape[1])
            target, source = _whole_rows(rows_RD), _whole_rows(scratch)
            for start in range(part.start, part.stop, ROWS_AT_ONCE):
                count = min(ROWS_AT_ONCE, part.stop - start)
                self.store.read(site, segment, slice(start, start + count), out=scratch[:count])
                to = places[start - part.start : start - part.start + count]
                if self.kept.masks is None:
                    target[to] = source[:count]
                else:
                    target[to[to >= 0]] = source[:count][to >= 0]
        finally:
            self._scratch.put(memory)

    def owners(self, epoch: int, number: int) -> np.ndarray:
        """See `Rounds`."""
        return self._owners(number, self._order(epoch, number))

    def _owners(self, number: int, order: np.ndarray) -> np.ndarray:
        """Which process reads each of some rows of a round; `order` counts the rows of all its slices."""
        owners = [segment % self.share[1] for segment, _ in self._slices[number]]
        owners_R = np.repeat(owners, [part.stop - part.start for _, part in self._slices[number]])
        return np.asarray(owners_R[order])

    def _is_own(self, segment: int) -> bool:
        return segment % self.share[1] == self.share[0]

    def sample_mean(self, site: Site, normalize: Normalize) -> Tensor:
        """See `Rounds`."""
        return self.store.sample_mean(site, normalize, self.kept.masks)

    def median_norm(self, site: Site) -> float:
        """See `Rounds`."""
        return self.store.median_norm(site, self.kept.masks)

    def sample(self, site: Site, rows: int) -> Tensor:
        """See `Rounds`."""
        return self.store.sample(site, rows, self.kept.masks)

    def outliers(self, site: Site, over: float, rows: int) -> Tensor:
        """See `Rounds`."""
        return self.store.outliers(site, over, rows)

    def _order(self, epoch: int, number: int) -> np.ndarray:
        """Which of the rows read is dealt out first, second and so on."""
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


def _whole_rows(rows_RD: Tensor) -> np.ndarray:
    """The same memory with one item a row, of no type: numpy then copies whole rows, at the speed of memory."""
    row_bytes = rows_RD.shape[1] * rows_RD.itemsize
    items: np.ndarray = rows_RD.view(torch.uint8).numpy().view(np.dtype((np.void, row_bytes)))[:, 0]
    return items


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
