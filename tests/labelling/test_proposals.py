"""Proposed labels: which one counts, people's verdicts, export and import."""

import json
from pathlib import Path

import pytest

from olmoscope.errors import UserError
from olmoscope.features.labels import Labels
from olmoscope.labelling.labeller import Labelled
from olmoscope.labelling.proposals import Proposals
from olmoscope.labelling.scores import Figure, Scores


def labelled(label: str, value: float | None) -> Labelled:
    figure = None if value is None else Figure(value, value - 0.1, value + 0.05)
    scores = Scores(figure, {}, positives=4, negatives=6, failed={"cut": 1})
    return Labelled(label, scores, {"shape": "token", "ids": [3]})


def test_the_best_proposal_counts_until_somebody_rejects_it(tmp_path: Path) -> None:
    proposals = Proposals(tmp_path / "proposals.sqlite", 10)
    proposals.add(3, labelled("rule", 0.7), "rules 1", "split")
    proposals.add(3, labelled("model", 0.9), "model", "split")
    proposals.add(3, labelled("unscored", None), "another", "split")
    assert [one.label for one in proposals.of(3)] == ["model", "rule", "unscored"]
    assert proposals.best()[3].label == "model"
    proposals.judge(proposals.of(3)[0].id, "rejected")
    assert proposals.best()[3].label == "rule" and proposals.of(3)[-1].label == "model"
    proposals.judge(proposals.of(3)[1].id, "accepted")
    assert proposals.best()[3].label == "unscored", "what somebody accepted counts first"
    proposals.add(3, labelled("newer rule", 0.8), "rules 1", "split")
    assert "rule" not in [one.label for one in proposals.of(3)], "the newest of a labeller"
    assert proposals.search("newe") == [3] and proposals.search("") == []
    with pytest.raises(UserError, match="no proposal 99"):
        proposals.judge(99, "accepted")


def test_what_is_done_is_known(tmp_path: Path) -> None:
    proposals = Proposals(tmp_path / "proposals.sqlite", 10)
    proposals.add(3, labelled("rule", 0.7), "rules 1", "split")
    proposals.add_reason(4, "no rule", "rules 1", "split")
    assert proposals.done("rules 1", "split") == {3, 4} and proposals.done("rules 1", "other") == set()
    assert proposals.reasons("rules 1", "split") == {4: "no rule"}


def test_an_export_brings_everything_back(tmp_path: Path) -> None:
    proposals = Proposals(tmp_path / "proposals.sqlite", 10)
    for number, text in enumerate(("<script>", "a\u202eb", "x" * 500)):
        proposals.add(number, labelled(text, 0.8), "rules 1", "split")
    proposals.judge(1, "rejected")
    lines = list(proposals.export())
    other = Proposals(tmp_path / "other.sqlite", 10)
    assert other.import_lines(lines) == 3 and other.import_lines(lines) == 0
    assert list(other.export()) == lines


@pytest.mark.parametrize("change", [{"feature": 10}, {"feature": "x"}, {"scores": {"detection": 2}},
                                    {"verdict": "maybe"}, {"label": 3}])
def test_a_bad_line_is_named_and_adds_nothing(tmp_path: Path, change: dict[str, object]) -> None:
    proposals = Proposals(tmp_path / "proposals.sqlite", 10)
    proposals.add(3, labelled("rule", 0.7), "rules 1", "split")
    good = json.loads(next(proposals.export()))
    other = Proposals(tmp_path / "other.sqlite", 10)
    with pytest.raises(UserError, match="line 2"):
        other.import_lines([json.dumps(good), json.dumps(good | change)])
    assert not list(other.export())


def test_people_and_programs_never_share_a_file(tmp_path: Path) -> None:
    Labels(tmp_path / "labels.sqlite", 10).write(3, "mine", "")
    with pytest.raises(UserError, match="not a proposals file"):
        Proposals(tmp_path / "labels.sqlite", 10)
