"""How well a label predicts a feature, each figure with a 95% interval; definitions in docs/metrics.md.

Shapes: P samples on which the feature fires, N on which it does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np

Z = 1.959963984540054
"""Standard normal quantile of a 95% interval."""
THRESHOLD = 0.5
"""From this value on, a judge says that the feature fires."""


@dataclass(frozen=True)
class Figure:
    """A figure between 0 and 1, and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """The scores of a label on held-out text; None: not measured, or not defined for such a label.

    Attributes:
        detection: AUROC for distinguishing blocks in which the feature fires from those in which it does not.
        by_kind: the same against each kind of negative separately.
        accuracy: balanced accuracy of detection at `THRESHOLD`.
        fuzzing: AUROC for distinguishing marks on tokens on which it fires from marks on others of the same blocks.
        on_lines: `detection` and `fuzzing` on the lines that a language model is shown, whoever made the label, so that
            labels of a feature can be compared. A rule's other figures come from longer and more pieces of text.
        intruder: share of groups of lines in which the one without a firing is found.
        output: AUROC for distinguishing the output tokens that it promotes from those that it suppresses.
        clamped: AUROC for distinguishing the output tokens that become likelier when it is clamped from those that
            become less likely.
        clamped_tokens: how many tokens `clamped` was measured on; 0: it was not clamped.
        positives, negatives: number of blocks that detection was measured on.
        failed: answers that did not come or could not be used, by reason.
    """

    detection: Figure | None
    by_kind: Mapping[str, Figure] = field(default_factory=dict)
    accuracy: Figure | None = None
    fuzzing: Figure | None = None
    on_lines: Mapping[str, Figure] = field(default_factory=dict)
    intruder: Figure | None = None
    output: Figure | None = None
    clamped: Figure | None = None
    clamped_tokens: int = 0
    positives: int = 0
    negatives: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)


def auroc(positive_P: Sequence[float], negative_N: Sequence[float]) -> Figure | None:
    """The probability that a positive has a larger value than a negative, ties counting half; None unless there are
    both.

    The interval is Newcombe's fifth (Statistics in Medicine 25 (2006), 559-573): it stays between 0 and 1, and is not
    empty if the separation is perfect.
    """
    if not len(positive_P) or not len(negative_N):
        return None
    high_P, low_N = np.asarray(positive_P, float), np.sort(np.asarray(negative_N, float))
    below = np.searchsorted(low_N, high_P, side="left") + np.searchsorted(low_N, high_P, side="right")
    value = float(below.sum() / (2 * len(high_P) * len(low_N)))
    positives, negatives = len(high_P), len(low_N)
    return Figure(value, 1 - _upper(1 - value, positives, negatives), _upper(value, positives, negatives))


def on_lines(judged: Sequence[tuple[bool, float]], marked: Sequence[tuple[bool, float]]) -> dict[str, Figure]:
    """`Scores.on_lines`, without what is not known.

    Args:
        judged, marked: lines without marks and with marks: whether the feature fires there, and the judge's value.
    """
    found = {name: auroc([value for fires, value in lines if fires], [value for fires, value in lines if not fires])
             for name, lines in (("detection", judged), ("fuzzing", marked))}
    return {name: figure for name, figure in found.items() if figure is not None}


def _upper(value: float, positives: int, negatives: int) -> float:
    """The upper limit of an AUROC, at which (limit − value)² is Z² times the variance at the limit."""
    half = (positives + negatives) / 2 - 1

    def variance(theta: float) -> float:
        spread = 1 + half * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return theta * (1 - theta) * spread / (positives * negatives)

    low, high = value, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if (middle - value) ** 2 <= Z * Z * variance(middle):
            low = middle
        else:
            high = middle
    return low


def share(right: float, of: int) -> Figure | None:
    """A share with Wilson's interval; None if there are no cases.

    Args:
        right: how many are right; a tie may count as a fraction.
    """
    if not of:
        return None
    p, n = right / of, of
    centre, width = p + Z * Z / (2 * n), Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Figure(p, max(0.0, (centre - width) / (1 + Z * Z / n)), min(1.0, (centre + width) / (1 + Z * Z / n)))


def balanced_accuracy(positive_P: Sequence[float], negative_N: Sequence[float]) -> Figure | None:
    """The mean of two shares: positives at `THRESHOLD` or over, and negatives under it; None unless there are both. The
    interval joins those of the two by squares (Newcombe's MOVER)."""
    found = share(sum(value >= THRESHOLD for value in positive_P), len(positive_P))
    spared = share(sum(value < THRESHOLD for value in negative_N), len(negative_N))
    if found is None or spared is None:
        return None
    value = (found.value + spared.value) / 2
    return Figure(value, value - sqrt((found.value - found.low) ** 2 + (spared.value - spared.low) ** 2) / 2,
                  value + sqrt((found.high - found.value) ** 2 + (spared.high - spared.value) ** 2) / 2)


def credit(values: Sequence[float], intruder: int) -> float:
    """How likely a judge finds the intruder of a group, if it names the line with the smallest value, and draws among
    equal ones.

    Args:
        intruder: its place, from 0.
    """
    smallest = min(values)
    return (values[intruder] == smallest) / sum(value == smallest for value in values)


def intruders(credits: Sequence[float | None]) -> Figure | None:
    """The share of groups whose intruder was found.

    Args:
        credits: for each group 1 if it was found, 0 if another line was named; None if there is no usable answer: such
            a group does not count.
    """
    known = [one for one in credits if one is not None]
    return share(sum(known), len(known))
