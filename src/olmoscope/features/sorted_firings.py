"""The pass over the rows: each row is encoded once, and each segment's firings are sorted by latent and written to
disk.

Shapes: R rows of a segment, B rows of a batch, K places, P firings, F latents.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from olmoscope.activations.store.reader import Store
from olmoscope.distributed.ranks import Ranks
from olmoscope.errors import UserError
from olmoscope.features.format import map_tensors
from olmoscope.features.sorting import sort_firings
from olmoscope.files import atomic_path
from olmoscope.progress import bar
from olmoscope.sae.coder import SparseCoder
from olmoscope.site import Site

ROWS_AT_ONCE = 4096
LEAST_SAMPLE, MOST_SAMPLE, SAMPLE_SHARE = 2**17, 2**20, 1 / 32
"""Companions are counted on this share of the rows, within these limits: on the first rows of each segment, which are a
random sample of it."""


@dataclass(frozen=True)
class Rows:
    """The rows that are indexed."""

    store: Store
    sites: tuple[Site, ...]
    """The sites that the coder reads."""
    masks: list[np.ndarray] | None
    """For each segment, which of its rows the filter keeps; None: all rows."""
    rows_at: list[np.ndarray]
    """For each segment, the row at each of its places."""

    @property
    def count(self) -> int:
        return self.store.rows if self.masks is None else sum(int(mask.sum()) for mask in self.masks)

    def kept(self, segment: int) -> np.ndarray:
        """The rows of a segment to encode, ascending."""
        if self.masks is None:
            return np.arange(self.store.segment_rows[segment])
        return np.flatnonzero(self.masks[segment])


@dataclass(frozen=True)
class Firings:
    """The codes of a segment, row by row."""

    starts_R1: np.ndarray
    """int64: the firings of row r are `starts_R1[r]` to `starts_R1[r + 1]`."""
    latents_P: np.ndarray
    """int32."""
    values_P: np.ndarray
    """float32."""


def sorted_path(work: Path, segment: int) -> Path:
    """The path of the sorted firings of a segment."""
    return work / "firings" / f"segment-{segment:06d}.safetensors"


def write_sorted_firings(sae: SparseCoder, rows: Rows, work: Path, ranks: Ranks) -> None:
    """Write the sorted firings of each segment of this rank's share that has none yet. A segment is sorted and written
    while the next is encoded.

    Memory: the firings of two segments, twice (8 bytes each).

    Raises:
        UserError: files are damaged, activations are not finite, or the disk is full.
    """
    segments = range(ranks.index, rows.store.manifest.segments, ranks.count)
    missing = [segment for segment in segments if not sorted_path(work, segment).exists()]
    done = sum(len(rows.kept(segment)) for segment in segments if segment not in missing)
    first_places = np.cumsum([0, *rows.store.segment_rows])
    sampled = min(max(LEAST_SAMPLE, rows.count * SAMPLE_SHARE), MOST_SAMPLE)
    share = min(1.0, sampled / rows.count)
    waiting: Future[None] | None = None
    own = done + sum(len(rows.kept(segment)) for segment in missing)
    with bar("encoding", own, "rows", done=done) as advance, ThreadPoolExecutor(1) as writer:
        for segment in missing:
            firings = encode_segment(sae, rows, segment)
            if waiting is not None:
                waiting.result()
            waiting = writer.submit(_write_sorted, sorted_path(work, segment), firings, _encoded_at(rows, segment),
                                    int(first_places[segment]), sae.d_sae, share)
            advance(len(firings.starts_R1) - 1)
        if waiting is not None:
            waiting.result()


@torch.no_grad()
def encode_segment(sae: SparseCoder, rows: Rows, segment: int) -> Firings:
    """The codes of a segment's rows that the filter keeps, in the order of the store.

    Raises:
        UserError: files are damaged, or an activation is not finite.
    """
    device = sae.W_dec.device
    counts, latents, values = ([torch.empty(0, dtype=dtype)] for dtype in (torch.int64, torch.int32, torch.float32))
    for start in range(0, rows.store.segment_rows[segment], ROWS_AT_ONCE):
        part = slice(start, min(start + ROWS_AT_ONCE, rows.store.segment_rows[segment]))
        read = [rows.store.read(site, segment, part) for site in rows.sites]
        x_BD = read[0] if len(read) == 1 else torch.cat(read, dim=1)
        if rows.masks is not None:
            x_BD = x_BD[torch.from_numpy(rows.masks[segment][part])]
            if not len(x_BD):
                continue
        codes = sae.encode(x_BD.to(device))
        if not bool(torch.isfinite(codes.values).all()):
            raise UserError(f"the SAE's activations are not finite at {rows.sites[0]} in segment {segment} of "
                            f"{rows.store.path}: its weights are damaged, or it was trained on other rows; check it "
                            "with `olmoscope audit`")
        active_BK = codes.values > 0
        counts.append(active_BK.sum(1).cpu())
        latents.append(codes.indices[active_BK].int().cpu())
        values.append(codes.values[active_BK].float().cpu())
    counts_R = torch.cat(counts).numpy()
    return Firings(np.concatenate([[0], np.cumsum(counts_R)]), torch.cat(latents).numpy(), torch.cat(values).numpy())


def _encoded_at(rows: Rows, segment: int) -> np.ndarray:
    """The index of the encoded row at each place of a segment; -1 if there is none."""
    if rows.masks is None:
        return rows.rows_at[segment]
    mask_R = rows.masks[segment]
    numbers_R: np.ndarray = np.where(mask_R, np.cumsum(mask_R) - 1, -1)
    return np.asarray(numbers_R[rows.rows_at[segment]])


def _write_sorted(path: Path, firings: Firings, row_at_T: np.ndarray, first_place: int, d_sae: int,
                  share: float) -> None:
    offsets_F1 = np.zeros(d_sae + 1, np.int64)
    places_P, values_P = np.empty(len(firings.latents_P), np.int32), np.empty(len(firings.latents_P), np.float32)
    sort_firings(firings.starts_R1, firings.latents_P, firings.values_P, row_at_T, first_place, offsets_F1, places_P,
                 values_P)
    sampled = int(np.ceil(share * (len(firings.starts_R1) - 1)))
    starts = firings.starts_R1[: sampled + 1]
    with atomic_path(path) as temporary:
        save_file({"offsets": offsets_F1.astype(np.int32), "places": places_P, "values": values_P,
                   "sample.counts": np.diff(starts).astype(np.int32),
                   "sample.latents": _packed(firings.latents_P[: starts[-1]])}, temporary)


def _packed(latents_P: np.ndarray) -> np.ndarray:
    """int32 as three bytes each, `[P, 3]`: if all rows are sampled, the sample is a quarter of the data on disk."""
    assert latents_P.max(initial=0) < 2**24
    return np.ascontiguousarray(latents_P.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3])


def _unpacked(bytes_P3: np.ndarray) -> np.ndarray:
    return np.pad(bytes_P3, [(0, 0), (0, 1)]).view("<i4").reshape(-1)


@dataclass(frozen=True)
class Sample:
    """The codes of the rows on which companions are counted, by row."""

    starts_R1: np.ndarray
    latents_P: np.ndarray


class SortedFirings:
    """The sorted firings of all segments, for merging. It holds their offsets: 4 bytes per latent and segment."""

    def __init__(self, work: Path, segments: int) -> None:
        """
        Raises:
            UserError: a file is missing or damaged.
        """
        self._segments = [map_tensors(sorted_path(work, segment)) for segment in range(segments)]
        self.offsets_GF1 = np.stack([one["offsets"] for one in self._segments])

    def counts(self) -> np.ndarray:
        """Number of firings of each latent, `[F]` int64."""
        return np.asarray(np.diff(self.offsets_GF1, axis=1).sum(axis=0, dtype=np.int64))

    def sample(self) -> Sample:
        """All sampled rows, segment by segment."""
        counts = np.concatenate([one["sample.counts"] for one in self._segments])
        latents = np.concatenate([_unpacked(one["sample.latents"]) for one in self._segments])
        return Sample(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]), latents)

    def read(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The firings of latents `first` to `stop`, segment after segment.

        Returns:
            The input of `merge_firings`: where each segment's firings begin, its offsets from there, places and values.
        """
        offsets_GC1 = self.offsets_GF1[:, first : stop + 1].astype(np.int64)
        begins_G = np.concatenate([[0], np.cumsum(offsets_GC1[:, -1] - offsets_GC1[:, 0])])
        places, values = np.empty(begins_G[-1], np.int32), np.empty(begins_G[-1], np.float32)
        for number, one in enumerate(self._segments):
            part = slice(int(offsets_GC1[number, 0]), int(offsets_GC1[number, -1]))
            places[begins_G[number] : begins_G[number + 1]] = one["places"][part]
            values[begins_G[number] : begins_G[number + 1]] = one["values"][part]
        return begins_G[:-1], offsets_GC1 - offsets_GC1[:, :1], places, values
