"""Which label of a feature counts, and Delphi's explanations made of them."""

import json
from pathlib import Path

from feature_index import small_index
from olmoscope.features.delphi import write_explanations
from olmoscope.features.labels import LABELS_FILE, Labels
from olmoscope.features.read import FeatureIndex
from olmoscope.labelling.labeller import Labelled
from olmoscope.labelling.proposals import PROPOSALS_FILE, Proposals
from olmoscope.labelling.scores import Figure, Scores
from olmoscope.labelling.that_count import labels_that_count


def test_a_persons_label_counts_before_the_best_proposal_and_delphi_gets_what_counts(tmp_path: Path) -> None:
    path = small_index(tmp_path)
    index = FeatureIndex(path)
    assert labels_that_count(index) == {}
    assert not (path / LABELS_FILE).exists() and not (path / PROPOSALS_FILE).exists()
    assert write_explanations(index, tmp_path, {}) == (0, 0) and not (tmp_path / "explanations").exists()

    proposals, labels = Proposals(path / PROPOSALS_FILE, 512), Labels(path / LABELS_FILE, 512)
    for feature in (3, 4, 5):
        for label, value in (("worse", 0.6), ("better", 0.9)):
            proposals.add(feature, Labelled(label, Scores(Figure(value, value - 0.1, value + 0.1))), label, "split")
    labels.write(3, 'a "person\'s" \u202e', "")
    labels.write(4, "taken back", "")
    labels.write(4, "", "only a note")
    proposals.judge(proposals.of(5)[0].id, "rejected")
    counting = labels_that_count(index)
    assert counting == {3: 'a "person\'s" \u202e', 4: "better", 5: "worse"}

    assert write_explanations(index, tmp_path, counting) == (3, 0)
    for feature, label in counting.items():
        explanation = tmp_path / "explanations" / f"{index.info.sae.site}_latent{feature}.txt"
        assert json.loads(explanation.read_bytes()) == label
    explanation.write_bytes(b'"made by Delphi"')
    assert write_explanations(index, tmp_path, counting) == (2, 1)
    assert explanation.read_bytes() == b'"made by Delphi"'
