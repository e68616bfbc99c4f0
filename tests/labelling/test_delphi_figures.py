"""Detection and fuzzing figures are those of Delphi 0.1.3 for the same answers (benchmarks/delphi_agreement.py)."""

import json
from pathlib import Path

import pytest

from olmoscope.labelling.scores import auroc, balanced_accuracy

CASES = json.loads(Path(__file__).with_name("delphi_figures.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_delphi(case):
    answers = [(chance, active) for chance, active in zip(case["chances"], case["active"], strict=True)
               if chance is not None]
    positive, negative = ([chance for chance, active in answers if active is wanted] for wanted in (True, False))
    assert len(answers) == case["delphi"]["answers"]
    assert auroc(positive, negative).value == pytest.approx(case["delphi"]["auroc"], abs=1e-12)
    assert balanced_accuracy(positive, negative).value == pytest.approx(case["delphi"]["balanced_accuracy"], abs=1e-12)


def test_some_answers_were_missing():
    assert any(None in case["chances"] for case in CASES)
    assert {case["scorer"] for case in CASES} == {"detection", "fuzz"}
