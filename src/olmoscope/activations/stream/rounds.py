"""Rounds of a store. A round is a set of rows that are mixed in memory; a stream (batches.py) deals them out.

In the shuffled order, round j reads slice j of every segment and deals out these rows in a random order. Each segment's
rows were permuted when it was written, so a slice is a random sample of it. An epoch thus covers each row once, mixes
rows of all segments in every batch, and reads the disk sequentially in long runs. In reading order (the reference
recipe), a round is one segment, with the rows in the order in which the model read them.

A thread reads a few blocks at a time into a buffer that stays in the processor's cache, verifies their checksums there,
and copies each row to its place in the round. So the round's memory is written only once, and batches are views of it.
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
"""The approximate number of rows mixed in memory at a time (1 GB at d_model 4096 in bf16)."""
READERS = 4
"""The number of threads that read slices of a round."""
ROWS_AT_ONCE = BLOCK_ROWS
"""The number of rows that a thread reads before it copies them to their places (2 MB at d_model 4096 in bf16)."""


Round = dict[Site, Tensor]
"""The rows of each site, `[rows, D]`, in the order in which they are dealt out. Row i is the same token at every site.
"""


class Rounds(Protocol):
    """A source of rounds. The same round has the same rows in the same order every time it is read."""

    manifest: Manifest
    sites: list[Site]
    kept: Kept
    sizes: list[int]
    """The number of rows dealt out in each round of an epoch."""
    ahead: bool
    """Whether a thread should read the next round while one is dealt out."""
    share: tuple[int, int]
    """(I, P): this process is number I of P, and has the rows of segments I, I + P, I + 2P and so on."""

    @property
    def tokens(self) -> Path:
        """The store whose `tokens/` has the sequences from which the rows come."""

    def read(self, epoch: int, number: int, spare: Round | None) -> Round:
        """This process's rows of round `number` of an epoch.

        Args:
            spare: a round that is no longer used; its memory may be reused.

        Returns:
            The round. Its tensors may be longer than the round: ignore what follows the last row.

        Raises:
            UserError: the rows cannot be read.
        """

    def owners(self, epoch: int, number: int) -> np.ndarray:
        """The process that has each row of a round, in the order in which the rows are dealt out, `[rows]`."""

    def sample_mean(self, site: Site, normalize: Normalize) -> Tensor:
        """The mean `[D]` (float32, CPU) of the rows dealt out or of a random sample of them, after normalization."""

    def median_norm(self, site: Site) -> float:
        """The median ‖x‖ of the rows dealt out, or of a random sample of them."""

    def sample(self, site: Site, rows: int) -> Tensor:
        """A random sample of about `rows` of the rows dealt out, `[N, D]` (float32, CPU)."""

    def outliers(self, site: Site, over: float, rows: int) -> Tensor:
        """At most `rows` rows whose norm exceeds `over`, `[N, D]` (float32, CPU). Rows that a filter leaves out are
        included if the source has them."""


class StoreRounds:
    """Rounds of some sites of a store. Memory: this process's rows of two rounds, one being dealt out and one being
    read."""

    ahead = True

    def __init__(self, store: Store, sites: list[Site], order: Literal["shuffled", "reading"], seed: int,
                 kept: Kept, share: tuple[int, int] = (0, 1)) -> None:
        """
        Args:
            order: `shuffled`, or `reading` for the order in which the model read the rows.
            kept: the rows that are dealt out.
            share: see `Rounds`; of the sites, only the segments of this share are read.
        """
        self.share = share
        self.store, self.sites, self.order, self.seed, self.kept = store, sites, order, seed, kept
        self.manifest = store.manifest
        if order == "reading":
            self._slices = [[(segment, slice(0, rows))] for segment, rows in enumerate(store.segment_rows)]
        else:
            self._slices = _slices(store.segment_rows)
        self._scratch: SimpleQueue[Tensor] = SimpleQueue()
        """A buffer for each reader, which is reused: allocating memory would cost more than reading into it."""
        for _ in range(READERS):
            self._scratch.put(torch.empty(ROWS_AT_ONCE * max(map(self.manifest.width, sites)),
                                          dtype=read_dtype(self.manifest.dtype)))
        self.sizes = [sum(self._kept(segment, part) for segment, part in slices) for slices in self._slices]
        self._most = max(sum(self._kept(segment, part) for segment, part in slices if self._is_own(segment))
                         for slices in self._slices)
        """The most rows that this process has in any round."""

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
        """Read a slice of a segment and copy each row to its place in `rows_RD`; −1 drops the row."""
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
        """The process that reads each of the rows `order` of a round, which number the rows of all its slices."""
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
        """The order in which the rows of a round are dealt out: their numbers among the rows of all its slices."""
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
    """The same memory as an array with one untyped item per row, so that numpy copies whole rows, at the speed of
    memory."""
    row_bytes = rows_RD.shape[1] * rows_RD.itemsize
    items: np.ndarray = rows_RD.view(torch.uint8).numpy().view(np.dtype((np.void, row_bytes)))[:, 0]
    return items


def _slices(segment_rows: list[int]) -> list[list[tuple[int, slice]]]:
    """For each round, the slice of each segment that it reads: whole blocks, divided as evenly as possible.

    If the number of a segment's blocks is not a multiple of the number of rounds, slices differ in size. Different
    segments have their larger slices in different rounds.
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
