"""A finished store, opened for reading, with everything checked that a reader relies on."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.store.format import (
    Manifest,
    SegmentSums,
    has_segment,
    norm_name,
    read_activations,
    read_manifest,
    read_rows,
    read_sums,
)
from olmoscope.errors import UserError
from olmoscope.files import read_json
from olmoscope.sae.rows import Normalize, normalize_rows
from olmoscope.site import Site

SAMPLE_ROWS = 2**17


@dataclass(frozen=True)
class Store:
    """A store on disk."""

    path: Path
    manifest: Manifest
    segment_rows: list[int]
    _sums: dict[int, SegmentSums] = field(default_factory=dict, repr=False)
    """Checksums of the segments used so far: a file that changes later is noticed."""

    @property
    def rows(self) -> int:
        return self.manifest.rows

    def read(self, site: Site, segment: int, part: slice, out: Tensor | None = None) -> Tensor:
        """Rows of a segment, `[part, D]`, in the order in which they are stored; checked.

        Args:
            out: memory to fill, in the store's dtype.
        """
        return read_activations(self.path, site, segment, part, self._sums_of(segment), out)

    def read_rows(self, segment: int) -> dict[str, Tensor]:
        """What is known of each row of a segment; checked."""
        return read_rows(self.path, segment, self._sums_of(segment))

    def sample_mean(self, site: Site, normalize: Normalize, masks: list[np.ndarray] | None = None) -> Tensor:
        """Mean `[D]` (float32) of the rows, normalised as the SAE sees them.

        Taken over up to 2**17 rows, the same share of every segment; a segment's rows are permuted, so its first
        ones are a random sample. The mean's own error is then under 0.3% of each channel's standard deviation.

        Args:
            masks: for each segment, which of its rows count; None: all.
        """
        share = min(1.0, SAMPLE_ROWS / self.rows)
        sum_D = torch.zeros(self.manifest.width(site), dtype=torch.float64)
        count = 0
        for segment, rows in enumerate(self.segment_rows):
            x_BD = self.read(site, segment, slice(0, int(np.ceil(rows * share)))).float()
            if masks is not None:
                x_BD = x_BD[torch.from_numpy(masks[segment][: len(x_BD)])]
            sum_D += normalize_rows(x_BD, normalize)[0].sum(dim=0, dtype=torch.float64)
            count += len(x_BD)
        return (sum_D / count).float()

    def median_norm(self, site: Site, masks: list[np.ndarray] | None = None) -> float:
        """Median ‖x‖ of the rows of a site; of up to 2**17, as in `sample_mean`.

        Args:
            masks: as in `sample_mean`.
        """
        share = min(1.0, SAMPLE_ROWS / self.rows)
        norms = []
        for segment, rows in enumerate(self.segment_rows):
            norm_R = self.read_rows(segment)[norm_name(site)].numpy()[: int(np.ceil(rows * share))]
            norms.append(norm_R if masks is None else norm_R[masks[segment][: len(norm_R)]])
        return float(np.median(np.concatenate(norms)))

    def _sums_of(self, segment: int) -> SegmentSums:
        if segment not in self._sums:
            self._sums[segment] = read_sums(self.path, segment)
        return self._sums[segment]


def open_store(path: Path) -> Store:
    """Open a finished store.

    Raises:
        UserError: no store, unfinished, of a newer format, or with a segment missing.
    """
    manifest = read_manifest(path)
    if not manifest.finished:
        raise UserError(f"{path} is not finished; run `olmoscope collect` again to finish it")
    index = read_json(path / "tokens" / "index.json")
    for segment in range(manifest.segments):
        if not has_segment(path, segment):
            raise UserError(f"{path} lacks segment {segment}; run `olmoscope collect` again: it makes anew what is "
                            "missing")
    return Store(path, manifest, index["rows"])
