"""Scores follow their definitions, and intervals have the coverage that they claim."""

import numpy as np
import pytest

from olmoscope.labelling.scores import auroc, balanced_accuracy, credit, intruders, share


def test_auroc_counts_pairs() -> None:
    random = np.random.default_rng(0)
    positive, negative = random.integers(0, 5, 30).astype(float), random.integers(0, 4, 20).astype(float)
    pairs = [(one > two) + 0.5 * (one == two) for one in positive for two in negative]
    found = auroc(positive.tolist(), negative.tolist())
    assert found is not None and found.value == pytest.approx(np.mean(pairs))
    assert 0 <= found.low < found.value < found.high <= 1
    perfect = auroc([1.0] * 20, [0.0] * 20)
    assert perfect is not None and perfect.value == perfect.high == 1 and 0.8 < perfect.low < 1
    assert auroc([], [1.0]) is auroc([1.0], []) is None


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_the_interval_of_an_auroc_holds_the_truth(shift: float) -> None:
    random, held = np.random.default_rng(1), 0
    large = auroc(random.normal(shift, 1, 4000).tolist(), random.normal(0, 1, 4000).tolist())
    assert large is not None
    for _ in range(400):
        found = auroc(random.normal(shift, 1, 40).tolist(), random.normal(0, 1, 60).tolist())
        assert found is not None
        held += found.low <= large.value <= found.high
    assert 0.92 <= held / 400 <= 0.99


def test_shares_accuracy_and_intruders() -> None:
    half = share(5, 10)
    assert half is not None and (round(half.low, 4), round(half.high, 4)) == (0.2366, 0.7634), "Wilson's interval"
    assert share(0, 0) is None
    found = balanced_accuracy([0.9, 0.5, 0.2, 0.8], [0.1, 0.6])
    assert found is not None and found.value == (3 / 4 + 1 / 2) / 2
    assert balanced_accuracy([], [1.0]) is None
    assert credit([1, 1, 0, 1, 1], 2) == 1 and credit([1, 1, 1, 1, 1], 2) == 1 / 5 and credit([0, 1, 1, 1, 1], 2) == 0
    found = intruders([1.0, None, 1 / 5, 0.0])
    assert found is not None and found.value == pytest.approx(0.4) and found == share(1.2, 3)
    assert intruders([None, None]) is intruders([]) is None
