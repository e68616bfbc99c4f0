"""Rows of outlier norm at a site, in figures and in a sentence: how many there are, how large, at which positions, and
whether they share a direction (docs/metrics.md). Shapes: N rows, D width of the site.

In most language models some rows, above all those at the first position of a sequence, have a norm tens or hundreds of
times the median, along nearly one direction: attention sinks, or massive activations (Sun et al. 2024,
arXiv:2402.17762).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.store.format import norm_name
from olmoscope.activations.store.reader import Store
from olmoscope.activations.store.statistics import OUTLIER
from olmoscope.site import Site

ALIKE = 0.9
"""The mean cosine at or above which rows count as lying along one direction."""
FEWEST = 8
"""The fewest rows that can count as one direction."""
DIRECTIONS_OF = 512
"""The most rows whose directions are read."""


@dataclass(frozen=True)
class Outliers:
    """The rows of outlier norm among the rows of a site.

    Attributes:
        rows: how many rows were examined.
        count: how many have a norm over `OUTLIER` times the median.
        median: the median of ‖x‖ over all rows.
        first: how many of the outliers are at the first position of their sequence; None if unknown.
        norm: their mean ‖x‖; None if unknown or if there are no outliers.
        alike: mean cosine of the outliers with their mean direction, 0 to 1; None if unknown or there are no outliers.
    """

    rows: int
    count: int
    median: float
    first: int | None = None
    norm: float | None = None
    alike: float | None = None

    @property
    def one_direction(self) -> bool:
        """Whether training would find them along one direction; False if that is unknown."""
        return self.count >= FEWEST and self.alike is not None and self.alike >= ALIKE

    def said(self) -> str:
        """A sentence about them, without its full stop."""
        median = f"{self.median:,.0f}" if self.median >= 100 else f"{self.median:.3g}"
        if not self.count:
            return f"none of {self.rows:,} rows has a norm over {OUTLIER:g} times the median ({median})"
        parts = [f"{self.count:,} of {self.rows:,} rows ({self.count / self.rows:.2%}) have a norm over {OUTLIER:g} "
                 f"times the median ({median})"]
        if self.norm is not None:
            parts.append(f"{self.norm / self.median:,.0f} times on average")
        if self.first is not None:
            parts.append(f"{self.first / self.count:.0%} of them at the first position of a sequence")
        if self.alike is not None:
            lie = "along one direction" if self.alike >= ALIKE else "along no single direction"
            parts.append(f"{lie} (mean cosine {self.alike:.2f})")
        return ", ".join(parts)

    def said_for_training(self) -> str:
        """The same, and what training does about it."""
        if not self.count:
            return self.said()
        which = "them a latent" if self.one_direction else "those of them that share a direction latents"
        return f"{self.said()}; training gives {which} of their own (train.sinks: auto)"


def mean_cosine(unit_sum_D: Tensor, rows: int) -> float:
    """Mean cosine of rows with their mean direction: ‖Σ x / ‖x‖‖ / N.

    Args:
        unit_sum_D: Σ x / ‖x‖, float64.
        rows: how many rows were summed.
    """
    return float(unit_sum_D.norm()) / rows


def outliers_among(norm_N: np.ndarray, position_N: np.ndarray, take: Callable[[np.ndarray], Tensor]) -> Outliers:
    """The outliers of some rows.

    Args:
        norm_N: ‖x‖ of each row.
        position_N: position of each row in its sequence.
        take: returns the rows with the given indices, `[N, D]`.
    """
    median = float(np.median(norm_N))
    over = np.flatnonzero(norm_N > OUTLIER * median)
    if not len(over):
        return Outliers(len(norm_N), 0, median, first=0)
    x_ND = take(over[np.linspace(0, len(over) - 1, min(DIRECTIONS_OF, len(over))).astype(int)]).double()
    units_ND = x_ND / x_ND.norm(dim=1, keepdim=True)
    return Outliers(len(norm_N), len(over), median, int((position_N[over] == 0).sum()),
                    float(norm_N[over].astype(np.float64).mean()), mean_cosine(units_ND.sum(0), len(units_ND)))


def outliers_of(store: Store, site: Site) -> Outliers:
    """The outliers among a store's rows; at most `DIRECTIONS_OF` are read for their directions.

    Raises:
        UserError: a file is damaged.
    """
    rows = [store.read_rows(segment) for segment in range(len(store.segment_rows))]
    starts = np.cumsum([0, *store.segment_rows])

    def take(numbers: np.ndarray) -> Tensor:
        segments = np.searchsorted(starts, numbers, side="right") - 1
        return torch.cat([store.read(site, int(segment), slice(int(row), int(row) + 1)).float()
                          for segment, row in zip(segments, numbers - starts[segments], strict=True)])

    return outliers_among(np.concatenate([one[norm_name(site)].numpy() for one in rows]),
                          np.concatenate([one["position"].numpy() for one in rows]), take)
