"""Indexes as circuit-tracer's feature pages: what its viewer shows for a feature in a graph.

    FOLDER/features/index.json.gz    {layer: {"filename", "offsets"}}; feature f of a layer is the bytes of its file
                                     from offsets[f] to offsets[f + 1]
    FOLDER/features/layer_L.bin      for each feature, 4 bytes with the length of the rest (little-endian), and its
                                     JSON, compressed by zlib

circuit-tracer finds the pages beside a set of transcoders on the hub by itself; for a local set, `features_dir` of its
server names the folder. Source: decoderesearch/circuit-tracer 0.4.1, `frontend/feature_models.py`, and in
`frontend/assets` `feature_examples/init-feature-examples.js` and `attribution_graph/render-act-histogram.js`.
"""

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoscope.errors import UserError
from olmoscope.features.outgoing import Group, bars, groups
from olmoscope.features.read import FeatureIndex
from olmoscope.features.records import Feature
from olmoscope.files import atomic_file, atomic_path
from olmoscope.progress import bar

FOLDER, INDEX = "features", "index.json.gz"


def write_pages(indexes: Sequence[FeatureIndex], folder: Path) -> int:
    """Write the pages of all features of some indexes, one index for each layer. Existing pages of other layers stay.

    Returns:
        How many features have a page.

    Raises:
        UserError: two indexes belong to one layer, or one belongs to none.
    """
    layers = [index.info.sae.layer for index in indexes]
    for index, layer in zip(indexes, layers, strict=True):
        if layer is None or layers.count(layer) > 1:
            raise UserError(f"{index.path} is of {index.info.sae.site}: circuit-tracer wants one SAE for each layer, "
                            "so give one index of each")
    into = folder / FOLDER
    table = _there(into)
    with bar("writing", sum(index.info.sae.d_sae for index in indexes), "features") as advance:
        for index, layer in zip(indexes, layers, strict=True):
            offsets, name = [0], f"layer_{layer}.bin"
            with atomic_file(into / name) as file:
                for feature in range(index.info.sae.d_sae):
                    content = zlib.compress(json.dumps(page(index, index.feature(feature)), allow_nan=False).encode())
                    file.write(len(content).to_bytes(4, "little") + content)
                    offsets.append(offsets[-1] + 4 + len(content))
                    advance(1)
            table[str(layer)] = {"filename": name, "offsets": offsets}
    with atomic_path(into / INDEX) as temporary:
        text = json.dumps(dict(sorted(table.items(), key=lambda item: int(item[0]))))
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    return sum(index.info.sae.d_sae for index in indexes)


def _there(folder: Path) -> dict[str, Any]:
    """The table of an earlier export.

    Raises:
        UserError: damaged.
    """
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        table = json.loads(gzip.decompress(path.read_bytes()))
        return {layer: entry for layer, entry in table.items() if (folder / entry["filename"]).is_file()}
    except (OSError, EOFError, zlib.error, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete {folder} and export all layers again") from error


def page(index: FeatureIndex, feature: Feature) -> dict[str, Any]:
    """What the viewer shows for a feature. Figures are over its firings; the histogram goes from 0 to the largest."""
    values_P = index.firing_values(feature.index)[1]
    shown: set[int] = set()
    return {
        "transcoder_id": index.info.sae.name, "index": feature.index,
        "examples_quantiles": [{"quantile_name": _title(group), "examples": [
            _example(index, group, number, shown) for number in range(len(group.examples))]}
            for group in groups(index, feature)],
        "top_logits": [one.token.text for one in feature.promoted or []],
        "bottom_logits": [one.token.text for one in feature.suppressed or []],
        "act_min": 0.0, "act_max": feature.max,
        "quantile_values": np.percentile(values_P, range(1, 101)).tolist() if len(values_P) else [],
        "histogram": [float(count) for count in bars(values_P, 0.0, feature.max)[0]],
        "activation_frequency": feature.density}


def _title(group: Group) -> str:
    return "Top activations" if group.low is None else f"Interval {group.low:.3g} to {group.high:.3g}"


def _example(index: FeatureIndex, group: Group, number: int, shown: set[int]) -> dict[str, Any]:
    """An example; it is repeated if an earlier group has it too."""
    example = group.examples[number]
    window = index.window(example)
    repeated = example.place in shown
    shown.add(example.place)
    return {"tokens": [token.text for token in window.tokens], "tokens_acts_list": window.activations,
            "train_token_ind": window.at, "is_repeated_datapoint": repeated}
