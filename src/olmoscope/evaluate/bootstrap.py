"""Confidence intervals of figures by resampling whole documents, since the tokens of one document are similar.

A figure is a function of sums over rows. The sums over a resample add its documents' sums, each as often as the
document was drawn. The draws depend only on the seed and the number of documents, so figures of several SAEs on the
same text use the same resamples. Shapes: E resamples, G groups of documents, Q quantities.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from torch import Tensor

from olmoscope.seeds import generator

RESAMPLES = 1000
SHARE = 0.95
"""Share of the resamples that an interval holds: from the 2.5th to the 97.5th percentile."""


@cache
def draws(groups: int, seed: int) -> np.ndarray:
    """How often each group is in each resample, `[E, G]` float64."""
    random = generator(seed, "bootstrap over documents")
    return np.stack([np.bincount(random.integers(groups, size=groups), minlength=groups)
                     for _ in range(RESAMPLES)]).astype(np.float64)


def intervals(table_GQ: Tensor, quantities: tuple[str, ...],
              figures: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
              seed: int = 0) -> dict[str, tuple[float, float]]:
    """The interval of each figure; no intervals if fewer than two documents have rows.

    Args:
        figures: maps the sums (one value per resample) to the figures, vectorised. A resample that draws no row that
            counts gives NaN and is left out.
    """
    with_rows_G = table_GQ.abs().sum(1) > 0
    if int(with_rows_G.sum()) < 2:
        return {}
    sums = dict(zip(quantities, (draws(len(table_GQ), seed) @ table_GQ.numpy()).T, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = {name: value[np.isfinite(value)] for name, value in figures(sums).items()}
    ends = [100 * (1 - SHARE) / 2, 100 * (1 + SHARE) / 2]
    return {name: (float(low), float(high)) for name, value in values.items() if len(value)
            for low, high in [np.percentile(value, ends)]}
