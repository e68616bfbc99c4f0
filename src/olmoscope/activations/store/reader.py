"""A finished store, opened for reading; its parts are read as one store. Everything that a reader relies on is checked.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.store.format import (
    NORM,
    Manifest,
    SegmentSums,
    has_segment,
    norm_name,
    read_activations,
    read_manifest,
    read_rows,
    read_sums,
)
from olmoscope.activations.store.growth import parts_of
from olmoscope.activations.store.statistics import read_mean
from olmoscope.errors import UserError
from olmoscope.files import read_json
from olmoscope.sae.normalize import Normalize, normalize_rows
from olmoscope.site import Site

SAMPLE_ROWS = 2**17
"""The most rows from which a mean or a median is estimated."""


@dataclass(frozen=True)
class Store:
    """A finished store on disk."""

    path: Path
    """The folder of its first part (activations/store/growth.py)."""
    manifest: Manifest
    """The manifest of the first part, with the sites of all parts."""
    segment_rows: list[int]
    """The number of rows of each segment."""
    parts: dict[Path, list[Site]]
    """The folder of each part, and its sites."""
    _sums: dict[tuple[Path, int], SegmentSums] = field(default_factory=dict, repr=False)
    """Checksums of the segments used so far, so that a file that changes later is noticed."""

    @property
    def rows(self) -> int:
        """The number of rows of all segments."""
        return self.manifest.rows

    def read(self, site: Site | str | int, segment: int, part: slice, out: Tensor | None = None) -> Tensor:
        """Rows of a segment, `[part, D]`, in the order in which they are stored; checked.

        Args:
            site: one of `manifest.sites`, or its text (`layers.7`), or the number of a layer.
            part: which of the `segment_rows[segment]` rows; without a step.
            out: memory to fill and return, `[part, D]` in the store's dtype (`read_dtype`).

        Raises:
            UserError: the store has no such site, segment or rows, or a file is damaged.
        """
        site = Site.parse(site)
        if site not in self.manifest.sites:
            raise UserError(f"{self.path} has no rows of {site}; it has {', '.join(map(str, self.manifest.sites))}")
        if not 0 <= segment < len(self.segment_rows):
            raise UserError(f"{self.path} has no segment {segment}; it has {len(self.segment_rows)}, from 0")
        start, stop, step = part.indices(self.segment_rows[segment])
        if step != 1:
            raise UserError(f"read: rows {part} have a step; read them all and drop those not wanted")
        part = slice(start, max(start, stop))
        folder = self.folder_of(site)
        return read_activations(folder, site.of(""), segment, part, self._sums_of(folder, segment), out)

    def read_rows(self, segment: int) -> dict[str, Tensor]:
        """The token, sequence, position, source and norms of each row of a segment, each `[rows]`; checked.

        Raises:
            UserError: a file is missing or damaged.
        """
        rows: dict[str, Tensor] = {}
        for folder, sites in self.parts.items():
            found = read_rows(folder, segment, self._sums_of(folder, segment))
            norms = {norm_name(site): found[norm_name(site.of(""))] for site in sites}
            rows |= {name: tensor for name, tensor in found.items() if not name.startswith(NORM)} | norms
        return rows

    def mean(self, site: Site) -> Tensor:
        """The mean of a site's rows, `[D]` float64.

        Raises:
            UserError: the store's statistics are missing or damaged.
        """
        return read_mean(self.folder_of(site), site.of(""))

    def folder_of(self, site: Site) -> Path:
        """The folder of the part that has a site."""
        return next(folder for folder, sites in self.parts.items() if site in sites)

    def sample_mean(self, site: Site, normalize: Normalize, masks: list[np.ndarray] | None = None) -> Tensor:
        """Mean `[D]` (float32) of the rows, normalised as the SAE sees them.

        The mean is over up to 2**17 rows, the same share of every segment. A segment's rows are permuted, so its first
        rows are a random sample. The standard error of the mean is then under 0.3% of each channel's standard
        deviation.

        Args:
            masks: for each segment, which of its rows count; None for all.

        Raises:
            UserError: a file is missing or damaged.
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

    def sample(self, site: Site, rows: int, masks: list[np.ndarray] | None = None) -> Tensor:
        """A random sample of about `rows` rows, `[N, D]` float32, the same share of every segment, as in `sample_mean`.

        Args:
            masks: as in `sample_mean`.

        Raises:
            UserError: a file is missing or damaged.
        """
        share = min(1.0, rows / self.rows)
        parts = []
        for segment, count in enumerate(self.segment_rows):
            x_ND = self.read(site, segment, slice(0, int(np.ceil(count * share)))).float()
            parts.append(x_ND if masks is None else x_ND[torch.from_numpy(masks[segment][: len(x_ND)])])
        return torch.cat(parts)

    def outliers(self, site: Site, over: float, rows: int) -> Tensor:
        """The first rows whose norm exceeds `over`, at most `rows` of them, `[N, D]` float32.

        Raises:
            UserError: a file is missing or damaged.
        """
        found: list[Tensor] = []
        for segment in range(len(self.segment_rows)):
            norm_R = self.read_rows(segment)[norm_name(site)]
            for row in torch.nonzero(norm_R > over)[: rows - len(found), 0].tolist():
                found.append(self.read(site, segment, slice(row, row + 1)).float())
            if len(found) == rows:
                break
        return torch.cat(found) if found else torch.empty(0, self.manifest.width(site))

    def median_norm(self, site: Site, masks: list[np.ndarray] | None = None) -> float:
        """Median ‖x‖ of up to 2**17 rows of a site, chosen as in `sample_mean`.

        Args:
            masks: as in `sample_mean`.

        Raises:
            UserError: a file is missing or damaged.
        """
        share = min(1.0, SAMPLE_ROWS / self.rows)
        norms = []
        for segment, rows in enumerate(self.segment_rows):
            norm_R = self.read_rows(segment)[norm_name(site)].numpy()[: int(np.ceil(rows * share))]
            norms.append(norm_R if masks is None else norm_R[masks[segment][: len(norm_R)]])
        return float(np.median(np.concatenate(norms)))

    def _sums_of(self, folder: Path, segment: int) -> SegmentSums:
        if (folder, segment) not in self._sums:
            self._sums[folder, segment] = read_sums(folder, segment)
        return self._sums[folder, segment]


def open_store(path: str | Path) -> Store:
    """Open a finished activation store, to read its rows.

    Args:
        path: the folder of one store, `OUT/store/train` or `OUT/store/held_out` of an output folder.

    Returns:
        The store. `read(site, segment, part)` gives activations; `read_rows(segment)` gives the token, position and
        source of each row. `segment_rows` says how many rows each segment has, and `manifest` which model and text
        they come from.

    Raises:
        UserError: there is no store, it is unfinished or in a newer format, or a segment is missing.

    Example:
        >>> import olmoscope
        >>> store = olmoscope.open_store("olmoscope-demo/store/held_out")
        >>> store.read("layers.7", segment=0, part=slice(0, 8)).shape
        torch.Size([8, 256])
        >>> store.read_rows(0)["token_id"].shape == (store.segment_rows[0],)
        True
    """
    path = Path(path)
    if (path / "store").is_dir():
        raise UserError(f"{path} is an output folder: open one of its stores, {path}/store/train or "
                        f"{path}/store/held_out")
    first, segment_rows = _open_part(path)
    later = [part for part in parts_of(path)[1:] if is_finished(part)]  # one still being made does not count yet
    manifests = {path: first}
    for part in later:
        found, rows = _open_part(part)
        _refuse_other_part(path, first, segment_rows, part, found, rows)
        manifests[part] = found.model_copy(update={"sites": [site.of(found.of or "") for site in found.sites]})
    return Store(path, _manifest_of_all(list(manifests.values())), segment_rows,
                 {part: list(found.sites) for part, found in manifests.items()})


def is_finished(store: Path) -> bool:
    """Whether a folder holds a finished store.

    Raises:
        UserError: its manifest is damaged.
    """
    return (store / "manifest.json").exists() and read_manifest(store).finished


def _open_part(path: Path) -> tuple[Manifest, list[int]]:
    manifest = read_manifest(path)
    if not manifest.finished:
        raise UserError(f"{path} is not finished; run `olmoscope collect` again to finish it")
    index = read_json(path / "tokens" / "index.json")
    for segment in range(manifest.segments):
        if not has_segment(path, segment):
            raise UserError(f"{path} lacks segment {segment}; run `olmoscope collect` again, which replaces what is "
                            "missing")
    return manifest, list(index["rows"])


def _refuse_other_part(path: Path, first: Manifest, first_rows: list[int], part: Path, found: Manifest,
                       rows: list[int]) -> None:
    """Refuse a part that does not have the same rows of the same model in the same dtype: they would not correspond."""
    for what, one, other in (("model", first.model, first.model if found.of else found.model),
                             ("dtype", first.dtype, found.dtype),
                             ("tokenizer", first.tokenizer_hash, found.tokenizer_hash),
                             ("rows", first_rows, rows), ("sources", first.sources, found.sources)):
        if one != other:
            raise UserError(f"{part} is not a part of {path}: its {what} differs; run `olmoscope collect` again to "
                            "make them equal, or move the folder away")


def _manifest_of_all(parts: list[Manifest]) -> Manifest:
    if len(parts) == 1:
        return parts[0]
    widths = {site: width for one in parts for site, width in zip(one.sites, one.widths, strict=True)}
    modules = {site: module for one in parts for site, module in zip(one.sites, one.modules or (), strict=False)}
    sites = sorted(widths)
    return parts[0].model_copy(update={
        "sites": sites, "widths": [widths[site] for site in sites],
        "modules": [modules[site] for site in sites] if len(modules) == len(sites) else None})
