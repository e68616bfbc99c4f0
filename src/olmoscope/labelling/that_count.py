"""The label that counts of each feature of an index: what a person wrote, else the best proposal."""

from olmoscope.features.labels import LABELS_FILE, Labels
from olmoscope.features.read import FeatureIndex
from olmoscope.labelling.proposals import PROPOSALS_FILE, Proposals


def labels_that_count(index: FeatureIndex) -> dict[int, str]:
    """Labels by feature, without those that have none. Makes no file.

    Raises:
        UserError: a file of labels or proposals is damaged, or of an SAE of another width.
    """
    d_sae, counting = index.info.sae.d_sae, {}
    if (path := index.path / PROPOSALS_FILE).exists():
        counting = {feature: one.label for feature, one in Proposals(path, d_sae).best().items()}
    if (path := index.path / LABELS_FILE).exists():
        newest = {entry.feature: entry.label for entry in Labels(path, d_sae).since(0)}
        counting |= {feature: label for feature, label in newest.items() if label}
    return counting
