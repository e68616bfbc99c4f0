"""An index as a matrix of documents by features, for tools that look for features that distinguish texts.

    FOLDER/max.npz            [documents, features]: the largest activation of each feature in each document
    FOLDER/mean.npz           the mean activation over all of the document's rows, including those where it is 0
    FOLDER/documents.parquet  for each row of the matrices: `document` (its number), `source`, `rows`, `text`

The matrices are SciPy's compressed sparse rows (`scipy.sparse.load_npz`, which needs no pickle): `data`, `indices`,
`indptr`, `shape` and `format`. A document is only the part of it that the index has.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from olmoscope.features.read import FeatureIndex
from olmoscope.files import atomic_file, atomic_path
from olmoscope.progress import bar

TABLE = "documents.parquet"


@dataclass(frozen=True)
class Matrix:
    """What was written: the folder, and the size of the matrices.

    Attributes:
        entries: the number of entries that are not 0.
    """

    folder: Path
    documents: int
    features: int
    entries: int


def write_documents(index: FeatureIndex, folder: Path) -> Matrix:
    """Write the matrices and a description of their rows; only entries that are not 0 are in memory.

    Raises:
        UserError: the disk is full.
    """
    ids_N, which_N = np.unique(index.corpus.document_ids_N, return_inverse=True)
    lengths = np.diff(index.corpus.documents_N, append=index.info.tokens)
    document_T = np.repeat(which_N, lengths).astype(np.int32)
    rows_M = np.bincount(document_T[index.corpus.kept_T > 0], minlength=len(ids_N))
    features, (row, column, largest, total) = index.info.sae.d_sae, _entries(index, document_T, len(ids_N))
    order = np.lexsort((column, row))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(ids_N)))])
    for name, values in (("max", largest), ("mean", total / np.maximum(rows_M, 1)[row])):
        with atomic_file(folder / f"{name}.npz") as file:
            np.savez_compressed(file, data=values[order].astype(np.float32), indices=column[order], indptr=indptr,
                                shape=np.array([len(ids_N), features]), format=np.array(b"csr"))
    first_M = np.unique(index.corpus.document_ids_N, return_index=True)[1]
    sources = list(index.info.sources)
    with atomic_path(folder / TABLE) as path:
        pq.write_table(pa.table({
            "document": ids_N, "source": [sources[number] for number in index.corpus.document_sources_N[first_M]],
            "rows": rows_M, "text": _texts(index, document_T, len(ids_N))}), path)
    return Matrix(folder, len(ids_N), features, len(row))


def _entries(index: FeatureIndex, document_T: np.ndarray, documents: int
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The entries that are not 0, feature by feature: document, feature, largest activation and sum."""
    found: list[tuple[np.ndarray, ...]] = [(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0), np.empty(0))]
    with bar("counting", index.info.sae.d_sae, "features") as advance:
        for feature in range(index.info.sae.d_sae):
            places, values = index.firing_values(feature)
            at = document_T[places]
            largest, total = np.zeros(documents, np.float32), np.bincount(at, values, documents)
            np.maximum.at(largest, at, values)
            there = np.flatnonzero(largest).astype(np.int32)
            found.append((there, np.full(len(there), feature, np.int32), largest[there], total[there]))
            advance(1)
    row, column, largest, total = (np.concatenate(column) for column in zip(*found, strict=True))
    return row, column, largest, total


def _texts(index: FeatureIndex, document_T: np.ndarray, documents: int) -> list[str]:
    """The text of each document, by its tokens."""
    order = np.argsort(document_T, kind="stable")
    tokens = np.asarray(index.corpus.tokens_T)[order]
    starts = np.searchsorted(document_T[order], np.arange(documents + 1))
    return ["".join(index.tokens.texts(tokens[start:end].tolist())) for start, end in itertools.pairwise(starts)]
