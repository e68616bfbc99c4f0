"""Rows of Neuronpedia's tables for an index's features: every column that its database does not fill in by itself.

Columns of what an index does not have are empty: correlated neurons, a share of the decoder for each head, UMAP, direct
feature attribution, attention patterns, losses. `createdAt` and `updatedAt` are left out, since the database sets them.
Source: hijohnnylin/neuronpedia (August 2026), `apps/webapp/prisma/schema.prisma`; sae-dashboard 0.8.0,
`neuronpedia/neuronpedia_converter.py`, for what the figures mean.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olmoscope.features.outgoing import Counting, bars, groups
from olmoscope.features.read import FeatureIndex
from olmoscope.features.records import Feature

CREATOR = "clkht01d40000jv08hvalcvly"
"""The user that Neuronpedia's own set-up creates, and that its exports name."""
ALIGNED = 3
"""The largest coordinates of a direction that Neuronpedia shows."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Names:
    """What Neuronpedia calls a model, a set of SAEs, and the SAE of one layer (a source)."""

    model: str
    set: str
    source: str


def names_of(index: FeatureIndex, called: str | None) -> Names:
    """The names of an index's SAE.

    Args:
        called: `MODEL/SET`; None: they follow from the names of model and SAE.
    """
    info = index.info
    model, _, name = called.partition("/") if called else (_plain(info.model.name.rpartition("/")[2]), "",
                                                           _plain(info.sae.name.removeprefix(info.sae.site.folder)))
    return Names(model, name, f"{max(info.sae.site.layer, 0)}-{name}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def about(index: FeatureIndex, names: Names) -> dict[str, Row]:
    """The rows of the tables with one row each, by the names of their files; unknown columns that have a default are
    left out."""
    info = index.info
    owner, _, _ = info.model.name.rpartition("/")
    repo, _, path = info.sae.where.partition(":") if info.sae.kind == "hub" else ("", "", "")
    registered = repo == "saelens"
    common = {"creatorId": CREATOR, "visibility": "PUBLIC"}
    longest = int(np.diff(index.corpus.sequences_S1).max())
    return {
        "release": {"name": names.set, "description": f"SAEs of {info.model.name}", "creatorName": "", **common},
        "model": {"id": names.model, "displayName": info.model.name, "displayNameShort": names.model,
                  "layers": info.model.num_layers, "neuronsPerLayer": 0, "dimension": info.model.d_model,
                  "owner": owner, **common},
        "sourceset": {"modelId": names.model, "name": names.set, "description": info.sae.name, "creatorName": "",
                      "releaseName": names.set, "hasDashboards": True, "showCorrelated": True, **common},
        "source": {"id": names.source, "modelId": names.model, "setName": names.set, "hasDashboards": True,
                   "saelensRelease": path.rpartition("/")[0] if registered else None,
                   "saelensSaeId": path.rpartition("/")[2] if registered else None,
                   "hfRepoId": repo.partition("@")[0] if repo and not registered else None,
                   "hfFolderId": path if repo and not registered else None,
                   "num_prompts": info.sequences, "num_tokens_in_prompt": longest, "dataset": ", ".join(info.sources),
                   "notes": None, **common}}


def feature_row(index: FeatureIndex, names: Names, feature: Feature, direction_D: Tensor, logits_V: Tensor | None
                ) -> Row:
    """A row of table Neuron.

    Args:
        direction_D: the feature's decoder direction.
        logits_V: what the direction does to the logit of each token; None if unknown.
    """
    values_P = index.firing_values(feature.index)[1]
    aligned = torch.topk(direction_D, min(ALIGNED, len(direction_D)))
    length = direction_D.abs().sum().clamp_min(torch.finfo(torch.float32).tiny)
    correlated = correlations(index, feature)
    fired = bars(values_P, float(values_P.min()), feature.max) if len(values_P) else ([], [])
    logits = ([], []) if logits_V is None else bars(logits_V.numpy(), float(logits_V.min()), float(logits_V.max()))
    promoted, suppressed = feature.promoted or [], feature.suppressed or []
    return {
        "modelId": names.model, "layer": names.source, "index": str(feature.index), "sourceSetName": names.set,
        "creatorId": CREATOR, "maxActApprox": feature.max,
        "hasVector": False, "vector": [], "vectorLabel": None, "vectorDefaultSteerStrength": None,
        "hookName": index.info.sae.site.transformer_lens,
        "topkCosSimIndices": [one.feature for one in feature.neighbours],
        "topkCosSimValues": [one.cosine for one in feature.neighbours],
        "neuron_alignment_indices": aligned.indices.tolist(), "neuron_alignment_values": aligned.values.tolist(),
        "neuron_alignment_l1": (aligned.values.abs() / length).tolist(),
        "correlated_neurons_indices": [], "correlated_neurons_pearson": [], "correlated_neurons_l1": [],
        "correlated_features_indices": [one[0] for one in correlated],
        "correlated_features_pearson": [one[1] for one in correlated],
        "correlated_features_l1": [one[2] for one in correlated],
        "neg_str": [one.token.text for one in suppressed], "neg_values": [one.logit for one in suppressed],
        "pos_str": [one.token.text for one in promoted], "pos_values": [one.logit for one in promoted],
        "frac_nonzero": feature.density,
        "freq_hist_data_bar_heights": fired[0], "freq_hist_data_bar_values": fired[1],
        "logits_hist_data_bar_heights": logits[0], "logits_hist_data_bar_values": logits[1],
        "decoder_weights_dist": [],
        "umap_cluster": None, "umap_log_feature_sparsity": None, "umap_x": None, "umap_y": None}


def correlations(index: FeatureIndex, feature: Feature) -> list[tuple[int, float, float]]:
    """The companions of a feature, with Pearson's correlation and the cosine of the two activations over all rows of
    the index; the most correlated first."""
    rows, (places, values) = index.info.rows, index.firing_values(feature.index)
    mine, found = _Moments.of(values, rows), []
    for companion in feature.companions:
        others, other_values = index.firing_values(companion.feature)
        at = np.searchsorted(others, places)
        both = np.flatnonzero(others[np.minimum(at, len(others) - 1)] == places)
        product = float(values[both].astype(np.float64) @ other_values[at[both]].astype(np.float64))
        other = _Moments.of(other_values, rows)
        spread = mine.spread * other.spread
        if spread > 0:  # otherwise one of them has the same activation on every row
            found.append((companion.feature, (product / rows - mine.mean * other.mean) / spread,
                          product / (mine.length * other.length)))
    return sorted(found, key=lambda one: -one[1])


@dataclass(frozen=True)
class _Moments:
    mean: float
    spread: float
    """The standard deviation over all rows."""
    length: float

    @classmethod
    def of(cls, values_P: np.ndarray, rows: int) -> "_Moments":
        squares = float(values_P.astype(np.float64) @ values_P.astype(np.float64))
        mean = float(values_P.sum(dtype=np.float64)) / rows
        return cls(mean, max(squares / rows - mean**2, 0.0) ** 0.5, squares**0.5)


def activation_rows(index: FeatureIndex, names: Names, feature: Feature) -> list[Row]:
    """Rows of table Activation: the top examples, and those from each interval."""
    rows = []
    for group in groups(index, feature):
        for example in group.examples:
            window = index.window(example)
            values = window.activations
            largest = max(values)
            rows.append({
                "id": _id(index, "activation", feature.index, group.low, example.place), "modelId": names.model,
                "layer": names.source, "index": str(feature.index), "creatorId": CREATOR,
                "tokens": [token.text for token in window.tokens], "values": values,
                "maxValue": largest, "maxValueTokenIndex": values.index(largest), "minValue": min(values),
                "dataIndex": str(window.document), "dataSource": window.source,
                "binMin": -1.0 if group.low is None else group.low, "binMax": group.high,
                "binContains": -1.0 if group.share is None else group.share, "qualifyingTokenIndex": window.at,
                "dfaValues": [], "dfaTargetIndex": None, "dfaMaxValue": None, "zQIndices": [], "zKIndices": [],
                "zValues": [], "lossValues": [], "logitContributions": None})
    return rows


def explanation_row(index: FeatureIndex, names: Names, label: Counting) -> Row:
    """A row of table Explanation for a label. The notes of a person's label are that person's; those of a program's are
    JSON: who made it, and its scores. (`typeName` and `explanationModelName` must name rows that the database has.)
    """
    notes = label.note if label.made_by == "person" else json.dumps(
        {name: value for name, value in label.as_json().items() if name not in ("feature", "label", "note", "score")},
        ensure_ascii=False)
    return {"id": _id(index, "explanation", label.feature, label.label), "modelId": names.model,
            "layer": names.source, "index": str(label.feature), "description": label.label, "authorId": CREATOR,
            "triggeredByUserId": None, "typeName": None, "explanationModelName": None, "notes": notes or None,
            "embedding": None}


def _id(index: FeatureIndex, *what: object) -> str:
    """An id with the length and alphabet of Neuronpedia's, the same each time."""
    return "c" + hashlib.blake2b(repr((index.info.identity, *what)).encode(), digest_size=12).hexdigest()
