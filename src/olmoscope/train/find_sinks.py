"""Find the directions of attention sinks (sae/sinks.py) in a sample of a site's rows.

Shapes: N rows, D width of the site, S directions.
"""

import torch
from torch import Tensor

from olmoscope.activations.store.outliers import ALIKE, FEWEST
from olmoscope.activations.store.statistics import OUTLIER
from olmoscope.activations.stream.rounds import Rounds
from olmoscope.recipe.schema import CoderConfig
from olmoscope.sae.sinks import Sinks

SINKS = 512
"""The largest number of rows of huge norm that are examined."""
SAMPLE = 2**14
"""The number of rows that represent ordinary rows."""
MOST = 4
"""The largest number of directions."""
APART = 3.0
"""The least coordinate of sinks along their direction, as a multiple of the largest coordinate of ordinary rows."""
BETWEEN = 1e-3
"""The share of ordinary rows that `APART` ignores: a few rows may lie between ordinary rows and sinks. (In layer 24 of
SmolLM2, two of 16,384 rows have 5 and 6 times the median norm, along the sinks' direction.)"""


def can_have_sinks(spec: CoderConfig) -> bool:
    """Whether an SAE can have latents for sinks: not if it has several sites, uses group-max, or normalises each row,
    which gives all rows the same size."""
    return len(spec.sites) == 1 and spec.normalize == "none" and spec.activation != "groupmax"


def sinks_at(rounds: Rounds, spec: CoderConfig) -> Sinks | None:
    """The sinks of a site, for an SAE that is about to be trained; None if there are none, or if the SAE cannot have
    latents for them.

    Raises:
        UserError: the rounds cannot be read.
    """
    if not can_have_sinks(spec):
        return None
    over = OUTLIER * rounds.median_norm(spec.site)
    outliers_ND = rounds.outliers(spec.site, over, SINKS)
    if not _many(outliers_ND):
        return None
    sample_ND = rounds.sample(spec.site, SAMPLE)
    return find_sinks(outliers_ND, sample_ND[sample_ND.norm(dim=1) <= over])


def has_outliers(rounds: Rounds, spec: CoderConfig) -> bool:
    """Whether a site has as many rows of huge norm as sinks would have."""
    return can_have_sinks(spec) and _many(rounds.outliers(spec.site, OUTLIER * rounds.median_norm(spec.site), FEWEST))


def _many(outliers_ND: Tensor) -> bool:
    return len(outliers_ND) >= FEWEST


def find_sinks(outliers_ND: Tensor, ordinary_ND: Tensor) -> Sinks | None:
    """The directions along which rows of huge norm lie, if such rows are far from nearly all others along them
    (`BETWEEN`); None if there are no such directions.

    Args:
        outliers_ND: rows of huge norm, float32.
        ordinary_ND: a sample of the others.
    """
    clusters = _clusters(outliers_ND)
    while clusters:
        directions_SD = torch.stack([direction_D for direction_D, _ in clusters])
        coordinates_SD = torch.linalg.solve(directions_SD @ directions_SD.T, directions_SD)
        usual_NS = ordinary_ND.double() @ coordinates_SD.T
        largest_S = usual_NS.abs().sort(dim=0).values[-1 - int(BETWEEN * len(usual_NS))]
        members = [rows_ND.double() @ coordinates_SD[number] for number, (_, rows_ND) in enumerate(clusters)]
        apart = [bool(c_N.min() > APART * largest) for c_N, largest in zip(members, largest_S, strict=True)]
        if all(apart):
            typical_S = torch.stack([c_N.mean() for c_N in members])
            onset_S = torch.stack([(c_N.min() * largest).sqrt() for c_N, largest in
                                   zip(members, largest_S, strict=True)])
            usual_S = usual_NS.mean(dim=0)
            gain_S = (typical_S - usual_S) / (typical_S - onset_S)
            found = directions_SD, coordinates_SD, gain_S, onset_S, usual_S
            return Sinks(*(tensor.float().contiguous() for tensor in found))
        clusters = [cluster for cluster, kept in zip(clusters, apart, strict=True) if kept]
    return None


def _clusters(outliers_ND: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Directions, float64 unit vectors, each with its rows. Each search starts from the longest row that is left."""
    found: list[tuple[Tensor, Tensor]] = []
    left_ND = outliers_ND
    while len(left_ND) >= FEWEST and len(found) < MOST:
        unit_ND = left_ND.double() / left_ND.double().norm(dim=1, keepdim=True)
        alike_N = unit_ND @ unit_ND[left_ND.norm(dim=1).argmax()] > ALIKE
        direction_D = unit_ND[alike_N].mean(dim=0)
        direction_D /= direction_D.norm()
        if alike_N.sum() >= FEWEST and all(abs(float(direction_D @ other_D)) < ALIKE for other_D, _ in found):
            found.append((direction_D, left_ND[alike_N]))
        left_ND = left_ND[~alike_N]
    return found
