"""What exports of an index to other tools share: the index's SAE, a feature's examples in groups, and the label that
counts for a feature."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.features.format import sae_place
from olmoscope.features.read import FeatureIndex
from olmoscope.features.records import Example, Feature
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.io.opened import Opened

FIGURES = ("detection", "accuracy", "fuzzing", "detection_on_lines", "fuzzing_on_lines", "intruder", "output",
           "clamped")
"""Scores of labels, each with an interval, by the names of docs/metrics.md (`on_lines` has two)."""
HISTOGRAM_BARS = 50
"""Bins of the linear histograms that other tools draw."""


@dataclass(frozen=True)
class Group:
    """Examples that are shown together.

    Attributes:
        low, high: bounds of their activations; None for the top examples, which may come from any interval.
        share: the share of all rows that have such an activation; None for the top examples.
    """

    low: float | None
    high: float
    share: float | None
    examples: list[Example]


@dataclass(frozen=True)
class Counting:
    """The label that counts for a feature, who made it, and how far to trust it; None is unknown.

    Attributes:
        author: a person's name, which may be empty; for a program, its name with what decides its labels (for a model
            also where it runs, and the version of its prompts).
        written: ISO 8601, UTC.
        verdict: whether a person accepted what a program proposed.
        score: the score of a person's label, if somebody gave it one.
        figures: value, and low and high end of the 95% interval, by `FIGURES`, without unknown ones.
        positives, negatives: number of pieces of text that detection was measured on.
    """

    feature: int
    label: str
    note: str
    made_by: Literal["person", "rule", "model"]
    author: str
    written: str
    verdict: Literal["accepted"] | None = None
    score: float | None = None
    figures: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    positives: int | None = None
    negatives: int | None = None

    def as_json(self) -> dict[str, Any]:
        """All fields, each of `FIGURES` as a list of three numbers or null."""
        fields = asdict(self)
        del fields["figures"]
        return fields | {name: list(self.figures[name]) if name in self.figures else None for name in FIGURES}


def groups(index: FeatureIndex, feature: Feature) -> Iterator[Group]:
    """The top examples, then those of each interval that has any, the strongest interval first."""
    if feature.top:
        yield Group(None, feature.max, None, feature.top)
    for interval in reversed(feature.intervals):
        if interval.examples:
            yield Group(interval.low, interval.high, interval.rows / index.info.rows, interval.examples)


def bars(values_P: np.ndarray, low: float, high: float) -> tuple[list[int], list[float]]:
    """Values counted in `HISTOGRAM_BARS` bars of equal width from `low` to `high`: counts, and the bars' middles."""
    if not len(values_P):
        return [], []
    counts, edges = np.histogram(values_P.astype(np.float64), HISTOGRAM_BARS, (low, high))
    return counts.tolist(), ((edges[:-1] + edges[1:]) / 2).tolist()


def sae_of(index: FeatureIndex) -> Opened:
    """The SAE of an index.

    Raises:
        UserError: it cannot be opened, or is not the one that was indexed.
    """
    info, place = index.info, sae_place(index.path, index.info)
    opened = open_sae(place, info.sae.site)
    if opened.identity != info.sae.weights:
        raise UserError(f"the SAE {place} has changed since {index.path} was made; run `olmoscope index` again, with "
                        "another --out")
    return opened


def directions(index: FeatureIndex) -> Tensor:
    """What each feature of an index adds to the site that it writes, `[F, D]` float32.

    Raises:
        UserError: its SAE cannot be opened, is not the one that was indexed, or is a crosscoder.
    """
    opened = sae_of(index)
    if len(opened.writes) > 1:
        raise UserError(f"{index.path} belongs to a crosscoder, whose features belong to {len(opened.writes)} sites; "
                        "this format has features of one site")
    return opened.sae.W_dec.detach().float()
