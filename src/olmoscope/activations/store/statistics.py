"""Statistics of the activations, gathered during collection.

Each segment leaves its sums in `statistics/segment-000042.safetensors`. When all segments exist, the sums are added up
in the order of the segments, in float64. So the result depends on neither workers nor interruptions, and making a
segment again changes nothing.

    statistics.json             figures for each site (`write_statistics` says which)
    statistics.safetensors      layer_07.mean [D] float64; layer_07.largest [D] float32, max |x| of channels

Quantiles of norms come from a histogram whose bins are the leading bits of a float32: 64 bins per octave, so a
quantile is off by at most 0.8%. Bin counts are integers, so the counts of different processes can simply be added.

Shapes: D width of a site, R rows.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.store.format import Manifest, segment_path
from olmoscope.activations.store.gather import SiteRows
from olmoscope.activations.store.tensors_file import write_tensors
from olmoscope.files import read_json, write_json
from olmoscope.site import Site
from olmoscope.tokens.segments import read_tensors

BIN_SHIFT = 17
"""How many low bits of a float32 a bin ignores: the sign (0), 8 bits of exponent and 6 bits of mantissa are left."""
BINS = 1 << (31 - BIN_SHIFT)
POSITIONS = [0, 1, 2, 3, 4, *(2**power for power in range(3, 32))]
"""The first position of each group of positions: the first four positions alone, then octaves."""
OUTLIER = 10.0
"""A row whose norm is over this many times the median is an outlier."""
QUANTILES = {"p1": 0.01, "p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}


def segment_sums(site: Site, rows: SiteRows, positions_R: Tensor, bound: float | None) -> dict[str, Tensor]:
    """A segment's sums for one site.

    Args:
        rows: the segment's rows at the site, on the CPU.
        positions_R: position of each row in its sequence.
        bound: a bound on max |x|, proven from the weights; None if none is known.
    """
    norm_R = rows.square_norm_R[: len(positions_R)].sqrt().numpy()
    group_R = np.searchsorted(POSITIONS, positions_R.numpy(), side="right") - 1
    cells, counts = np.unique(group_R * BINS + (norm_R.view(np.int32) >> BIN_SHIFT), return_counts=True)
    sums = {
        "sum": rows.sum_D.clone(),
        "largest": rows.largest_D.clone(),
        "sum_of_squares": torch.tensor([rows.square_norm_R[: len(positions_R)].double().sum()]),
        "error": rows.error_1.clone(),
        "bound": torch.tensor([math.nan if bound is None else bound], dtype=torch.float64),
        "norm_cells": torch.from_numpy(cells.astype(np.int64)),
        "norm_counts": torch.from_numpy(counts.astype(np.int64)),
    }
    return {f"{site.folder}.{name}": tensor for name, tensor in sums.items()}


@dataclass
class _Total:
    """Sums of one site over segments."""

    sum_D: np.ndarray
    largest_D: np.ndarray
    sum_of_squares: float
    error: float
    bound: float
    norm_counts: np.ndarray
    """`[groups of positions, BINS]`."""


def write_statistics(store: Path, manifest: Manifest) -> None:
    """Add up the segments' sums, and write the result.

    statistics.json has `rows`, and for each site:
        mean_norm, std_norm, mean_over_std: ‖μ‖; ‖σ‖, the root of the summed variances of the channels; their ratio.
        norm: quantiles of ‖x‖. norm_by_position: rows and quantiles, for groups of positions in the sequence.
        largest, largest_channel: max |x|, and its channel. non_finite: rows with NaN or inf (0, since such rows are
            refused).
        bound: a bound on max |x|, from the weights alone; null if none is known.
        float16: whether that bound or, without one, the largest value seen fits into float16.
        added_fvu: Σ‖stored − x‖² / Σ‖x − μ‖²: the error of the store's dtype.

    Raises:
        UserError: a segment's sums are missing or damaged.
    """
    figures, tensors = add_up(store, manifest)
    write_tensors(store / "statistics.safetensors", tensors)
    write_json(store / "statistics.json", figures)


def add_up(store: Path, manifest: Manifest) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The segments' sums, added up: the contents of statistics.json and of statistics.safetensors.

    Raises:
        UserError: a segment's sums are missing or damaged.
    """
    totals: dict[Site, _Total] = {}
    for segment in range(manifest.segments):
        parts, _ = read_tensors(segment_path(store, "statistics", segment), "np")
        for site in manifest.sites:
            _add(totals, site, {name.split(".")[1]: part for name, part in parts.items()
                                 if name.startswith(f"{site.folder}.")})
    tensors = {}
    for site, total in totals.items():
        tensors[f"{site.folder}.mean"] = torch.from_numpy(total.sum_D / manifest.rows)
        tensors[f"{site.folder}.largest"] = torch.from_numpy(total.largest_D)
    sites = {str(site): _figures(total, manifest.rows) for site, total in totals.items()}
    return {"rows": manifest.rows, "sites": sites}, tensors


def read_statistics(store: Path) -> dict[str, Any]:
    """statistics.json of a finished store.

    Raises:
        UserError: the file is missing or damaged.
    """
    return dict(in_terms_of_now(read_json(store / "statistics.json")))


def in_terms_of_now(figures: Any) -> Any:
    """The contents of statistics.json by site; in format version 1 they are by layer."""
    if not isinstance(figures, dict) or not isinstance(figures.get("layers"), dict):
        return figures
    tree = {key: value for key, value in figures.items() if key != "layers"}
    return tree | {"sites": {f"layers.{layer}": values for layer, values in figures["layers"].items()}}


def read_mean(store: Path, site: Site) -> Tensor:
    """The mean of a site's rows in a finished store, `[D]` float64.

    Raises:
        UserError: the file is missing or damaged.
    """
    mean: Tensor = read_tensors(store / "statistics.safetensors", "pt")[0][f"{site.folder}.mean"]
    return mean


def _add(totals: dict[Site, _Total], site: Site, part: dict[str, np.ndarray]) -> None:
    if site not in totals:
        totals[site] = _Total(np.zeros_like(part["sum"]), np.zeros_like(part["largest"]), 0.0, 0.0,
                               float(part["bound"][0]), np.zeros((len(POSITIONS), BINS), dtype=np.int64))
    total = totals[site]
    total.sum_D += part["sum"]
    np.maximum(total.largest_D, part["largest"], out=total.largest_D)
    total.sum_of_squares += float(part["sum_of_squares"][0])
    total.error += float(part["error"][0])
    total.norm_counts.reshape(-1)[part["norm_cells"]] += part["norm_counts"]


def _figures(total: _Total, rows: int) -> dict[str, Any]:
    mean2 = float(np.square(total.sum_D / rows).sum())
    variance = max(total.sum_of_squares / rows - mean2, 0.0)
    largest, bound = float(total.largest_D.max()), None if math.isnan(total.bound) else total.bound
    by_position = [
        {"from": start, "to": end - 1, "rows": int(counts.sum()), **_quantiles(counts)}
        for start, end, counts in zip(POSITIONS, [*POSITIONS[1:], 2**32], total.norm_counts, strict=True)
        if counts.any()]
    return {
        "mean_norm": math.sqrt(mean2),
        "std_norm": math.sqrt(variance),
        "mean_over_std": math.sqrt(mean2 / variance) if variance else None,
        "norm": _quantiles(total.norm_counts.sum(axis=0)),
        "norm_by_position": by_position,
        "largest": largest,
        "largest_channel": int(total.largest_D.argmax()),
        "non_finite": 0,
        "bound": bound,
        "float16": (largest if bound is None else bound) <= torch.finfo(torch.float16).max,
        "added_fvu": total.error / (rows * variance) if variance else 0.0,
    }


def _quantiles(counts: np.ndarray) -> dict[str, float]:
    """Quantiles from a histogram: each is the middle of the bin that holds the row of that rank."""
    reached = np.cumsum(counts)
    edges = np.arange(BINS + 1, dtype=np.int64) << BIN_SHIFT
    figures = {}
    for name, share in QUANTILES.items():
        bin_ = int(np.searchsorted(reached, max(1, math.ceil(share * reached[-1]))))
        low, high = edges[bin_ : bin_ + 2].astype(np.int32).view(np.float32)
        figures[name] = float((low + high) / 2) if bin_ else 0.0
    return figures
