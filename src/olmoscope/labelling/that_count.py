"""The label that counts for each feature of an index: what a person wrote, else the best proposal."""

from olmoscope.features.labels import LABELS_FILE, Labels
from olmoscope.features.outgoing import Counting
from olmoscope.features.read import FeatureIndex
from olmoscope.labelling.proposals import PROPOSALS_FILE, Proposal, Proposals


def labels_that_count(index: FeatureIndex) -> dict[int, Counting]:
    """Labels by feature, without those that have none. Makes no file.

    Raises:
        UserError: a file of labels or proposals is damaged, or belongs to an SAE of another width.
    """
    d_sae, counting = index.info.sae.d_sae, {}
    if (path := index.path / PROPOSALS_FILE).exists():
        counting = {feature: _proposed(one) for feature, one in Proposals(path, d_sae).best().items()}
    if (path := index.path / LABELS_FILE).exists():
        newest = {entry.feature: entry for entry in Labels(path, d_sae).since(0)}
        counting |= {feature: Counting(feature, entry.label, entry.note, "person", entry.author, entry.written,
                                       score=entry.score)
                     for feature, entry in newest.items() if entry.label}
    return counting


def _proposed(one: Proposal) -> Counting:
    scores = one.scores
    figures = {"detection": scores.detection, "accuracy": scores.accuracy, "fuzzing": scores.fuzzing,
               "detection_on_lines": scores.on_lines.get("detection"),
               "fuzzing_on_lines": scores.on_lines.get("fuzzing"), "intruder": scores.intruder,
               "output": scores.output, "clamped": scores.clamped}
    return Counting(one.feature, one.label, "", "model" if one.rule is None else "rule", one.labeller, one.written,
                    "accepted" if one.verdict == "accepted" else None,
                    figures={name: (found.value, found.low, found.high) for name, found in figures.items()
                             if found is not None},
                    positives=scores.positives, negatives=scores.negatives)
