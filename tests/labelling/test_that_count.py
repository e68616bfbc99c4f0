"""Which label of a feature counts; exports of it, with its maker and its scores, read back."""

import json
from pathlib import Path

import duckdb
import pytest

from feature_index import small_index
from neuronpedia_schema import read
from olmoscope.features.delphi import write_explanations
from olmoscope.features.labels import LABELS_FILE, Labels
from olmoscope.features.outgoing import FIGURES, Counting
from olmoscope.features.read import FeatureIndex
from olmoscope.labelling.labeller import Labelled
from olmoscope.labelling.proposals import PROPOSALS_FILE, Proposals
from olmoscope.labelling.scores import Figure, Scores
from olmoscope.labelling.that_count import labels_that_count
from olmoscope.release.convert import convert

MODEL = "a-model of http://localhost/v1, prompts 0123abcd"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FeatureIndex:
    """Features 3 (a person's label), 4 (a model's; a person withdrew theirs), 5 (a rule's, accepted), 6 (rejected)."""
    path = small_index(tmp_path_factory.mktemp("index"))
    index = FeatureIndex(path)
    assert labels_that_count(index) == {}
    assert not (path / LABELS_FILE).exists() and not (path / PROPOSALS_FILE).exists()
    proposals, labels = Proposals(path / PROPOSALS_FILE, 512), Labels(path / LABELS_FILE, 512)
    for feature in (3, 4, 5, 6):
        for label, figure, labeller, rule in (("worse", Figure(0.6, 0.5, 0.7), "rules 2", {"shape": "token"}),
                                              ("better", Figure(0.9, 0.8, 0.95), MODEL, None)):
            proposals.add(feature, Labelled(label, Scores(
                figure, on_lines={"detection": figure}, clamped=figure if rule is None else None, clamped_tokens=20,
                positives=8, negatives=7), rule), labeller, "split")
    labels.write(3, 'a "person\'s" \u202e', "a note", "me", 0.7)
    labels.write(4, "taken back", "")
    labels.write(4, "", "only a note")
    for feature, verdicts in ((5, ("rejected", "accepted")), (6, ("rejected", "rejected"))):
        for one, verdict in zip(proposals.of(feature), verdicts, strict=True):
            proposals.judge(one.id, verdict)  # type: ignore[arg-type]
    return index


@pytest.fixture(scope="module")
def counting(index: FeatureIndex) -> dict[int, Counting]:
    return labels_that_count(index)


def test_a_persons_label_counts_before_the_best_proposal(counting: dict[int, Counting]) -> None:
    assert {feature: (one.label, one.made_by, one.author, one.verdict) for feature, one in counting.items()} == {
        3: ('a "person\'s" \u202e', "person", "me", None), 4: ("better", "model", MODEL, None),
        5: ("worse", "rule", "rules 2", "accepted")}
    assert counting[3].figures == {} and (counting[3].score, counting[3].positives) == (0.7, None)
    assert counting[4].figures == dict.fromkeys(("detection", "detection_on_lines", "clamped"), (0.9, 0.8, 0.95))


def test_delphi_gets_the_text_and_a_file_beside_says_the_rest(index: FeatureIndex, counting: dict[int, Counting],
                                                              tmp_path: Path) -> None:
    assert write_explanations(index, tmp_path, {}) == (0, 0) and not list(tmp_path.iterdir())
    assert write_explanations(index, tmp_path, counting) == (3, 0)
    for feature, one in counting.items():
        explanation = tmp_path / "explanations" / f"{index.info.sae.site}_latent{feature}.txt"
        assert json.loads(explanation.read_bytes()) == one.label
    beside = tmp_path / "labels" / f"{index.info.sae.site}.jsonl"
    lines = [json.loads(line) for line in beside.read_text(encoding="utf-8").splitlines()]
    assert lines == [one.as_json() for one in counting.values()]
    assert lines[1]["detection"] == [0.9, 0.8, 0.95] and lines[1]["fuzzing"] is None
    explanation.write_bytes(b'"made by Delphi"')
    assert write_explanations(index, tmp_path, counting) == (2, 1)
    assert explanation.read_bytes() == b'"made by Delphi"'
    assert [json.loads(line)["feature"] for line in beside.read_text(encoding="utf-8").splitlines()] == [3, 4]
    write_explanations(index, tmp_path, {})
    assert not beside.exists()


def test_neuronpedia_gets_them_in_the_notes(index: FeatureIndex, counting: dict[int, Counting], tmp_path: Path) -> None:
    rows = read(convert(index.path, "neuronpedia", tmp_path).folder)["Explanation"]
    assert [(row["index"], row["description"]) for row in rows] == [
        (str(feature), one.label) for feature, one in counting.items()]
    assert rows[0]["notes"] == "a note"
    for row, one in zip(rows[1:], [*counting.values()][1:], strict=True):
        notes = json.loads(row["notes"])
        assert notes == {name: value for name, value in one.as_json().items() if name in notes}
        assert {"made_by", "author", "written", "verdict", "positives", *FIGURES} <= set(notes)


def test_a_table_beside_the_features_has_a_line_for_each_label(index: FeatureIndex, counting: dict[int, Counting],
                                                               tmp_path: Path) -> None:
    made = convert(index.path, "labels", tmp_path / "new")
    assert made.note == "3 labels"
    rows = duckdb.sql(f"SELECT * FROM '{index.path}/features.parquet' LEFT JOIN '{made.folder}/labels.parquet' "
                      "USING (feature) ORDER BY feature").fetchall()
    assert len(rows) == 512
    table = duckdb.sql(f"SELECT * FROM '{made.folder}/labels.parquet'")
    found = [dict(zip(table.columns, row, strict=True)) for row in table.fetchall()]
    assert [row["feature"] for row in found] == [3, 4, 5]
    for row, one in zip(found, counting.values(), strict=True):
        assert {name: row[name] for name in ("label", "note", "made_by", "author", "written", "verdict", "score",
                                             "positives", "negatives")}.items() <= one.as_json().items()
        for name in FIGURES:
            assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == one.figures.get(name, (None, None, None))


def test_an_index_without_labels_has_an_empty_table(tmp_path: Path) -> None:
    made = convert(small_index(tmp_path), "labels", tmp_path / "new")
    table = duckdb.sql(f"SELECT count(*), count(detection_low) FROM '{made.folder}/labels.parquet'")
    assert table.fetchall() == [(0, 0)]
