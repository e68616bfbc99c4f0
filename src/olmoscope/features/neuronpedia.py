"""An index in the layout that Neuronpedia's importer reads.

    ROOT/v1/MODEL/LAYER-SET/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl    one row each
                            features/batch-N.jsonl.gz        rows of table Neuron, `BATCH` features per file
                            activations/batch-N.jsonl.gz     their examples, rows of table Activation
                            explanations/batch-N.jsonl.gz    their labels, rows of table Explanation, if there are any

The importer takes the names of columns from a file's first line, so all lines have the same columns. It cannot read a
file without lines, so none is written. Source: hijohnnylin/neuronpedia (August 2026), `apps/webapp/lib/db/import.ts`
and `apps/webapp/app/api/admin/import/route.ts`.
"""

import gzip
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.features.neuronpedia_rows import (
    Row,
    about,
    activation_rows,
    explanation_row,
    feature_row,
    names_of,
)
from olmoscope.features.outgoing import Counting, directions
from olmoscope.features.read import FeatureIndex
from olmoscope.files import atomic_path, write_text
from olmoscope.model.unembed import Unembedding, load_unembedding
from olmoscope.model_source import at_revision
from olmoscope.progress import bar
from olmoscope.recipe.schema import Model

BATCH = 1024
"""Features per file, as in Neuronpedia's own exports."""
_AT_ONCE = 64
"""The number of features whose logits for all tokens are in memory at a time."""
_CALLED = re.compile(r"[a-z0-9_-]+/[a-z0-9_-]+")


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        folder: the folder of the source, `ROOT/v1/MODEL/LAYER-SET`.
        features, activations, explanations: numbers of rows.
    """

    folder: Path
    features: int
    activations: int
    explanations: int


def write_neuronpedia(index: FeatureIndex, root: Path, labels: Mapping[int, Counting], called: str | None = None
                      ) -> Written:
    """Write an index in the form of Neuronpedia's exports. One batch of features is in memory at a time.

    Args:
        root: corresponds to the root of Neuronpedia's bucket of exports.
        labels: the labels that count, by feature.
        called: `MODEL/SET`, the names on Neuronpedia; None: they follow from those of model and SAE.

    Raises:
        UserError: Neuronpedia does not accept the names; the index's SAE cannot be opened, or is a crosscoder; the
            model's unembedding cannot be loaded, though the index has promoted tokens.
    """
    if called is not None and not _CALLED.fullmatch(called):
        raise UserError(f"--called {called}: Neuronpedia wants MODEL/SET, each of small letters, digits, - and _, for "
                        "example olmo-3-7b/res-65k")
    names, features = names_of(index, called), index.info.sae.d_sae
    W_FD, unembedding = directions(index), _unembedding(index)
    folder = root / "v1" / names.model / names.source
    for part in ("features", "activations", "explanations"):
        shutil.rmtree(folder / part, ignore_errors=True)  # the importer reads all that are there
    for name, row in about(index, names).items():
        write_text(folder / f"{name}.jsonl", _line(row))
    activations = 0
    with bar("writing", features, "features") as advance:
        for number, first in enumerate(range(0, features, BATCH)):
            batch = range(first, min(first + BATCH, features))
            rows: dict[str, list[Row]] = {"features": [], "activations": [], "explanations": [
                explanation_row(index, names, labels[feature]) for feature in batch if feature in labels]}
            for feature, logits_V in zip(batch, _logits(W_FD[first : batch.stop], unembedding), strict=True):
                found = index.feature(feature)
                rows["features"].append(feature_row(index, names, found, W_FD[feature], logits_V))
                rows["activations"] += activation_rows(index, names, found)
                advance(1)
            activations += len(rows["activations"])
            for part, some in rows.items():
                if some:
                    _write_lines(folder / part / f"batch-{number}.jsonl.gz", some)
    return Written(folder, features, activations, len(labels))


def _unembedding(index: FeatureIndex) -> Unembedding | None:
    """The unembedding of the index's model; None if the index has no promoted tokens."""
    of = index.info.model
    if index.info.unembedding is None:
        return None
    found = load_unembedding(at_revision(Model(name=of.name, dtype="float32"), of.revision), torch.device("cpu"))
    if found.revision != of.revision:
        raise UserError(f"the weights of {of.name} have changed since {index.path} was made (revision "
                        f"{found.revision}, not {of.revision})")
    return found.of_first(len(index.tokens))


def _logits(W_CD: Tensor, unembedding: Unembedding | None) -> Iterator[Tensor | None]:
    """What each direction does to the logits of all tokens, `[V]`."""
    for some_BD in torch.split(W_CD, _AT_ONCE):
        if unembedding is None:
            yield from [None] * len(some_BD)
        else:
            yield from unembedding.through_norm(some_BD) @ unembedding.U_VD.T


def _write_lines(path: Path, rows: Iterable[Row]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file, gzip.GzipFile("", "wb", 5, file, mtime=0) as to:
        for row in rows:
            to.write(_line(row).encode())


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
