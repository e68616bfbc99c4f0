"""The text to which an index refers: each token once, in the order of the text, and the starts of sequences and
documents.

A *place* is a token's index in it. Shapes: T tokens, S sequences, N documents, R rows of a segment, V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from olmoscope.activations.store.reader import Store
from olmoscope.errors import UserError
from olmoscope.features.format import damaged
from olmoscope.files import atomic_file, atomic_path
from olmoscope.tokens.segments import TokenSegment, read_token_segment

PASSAGE = 256
"""Most tokens of a passage; the examples of a feature come from different passages."""


@dataclass(frozen=True)
class Corpus:
    """The tokens of a store in the order of the text."""

    tokens_T: np.ndarray
    """int32."""
    sequences_S1: np.ndarray
    """int64: sequence s is places `sequences_S1[s]` to `sequences_S1[s + 1]`."""
    kept_T: np.ndarray
    """uint8: 1 for the rows of the index, 0 for tokens that its filter left out."""
    documents_N: np.ndarray
    """int64, the place at which each document, or the part of it in the store, begins."""
    document_ids_N: np.ndarray
    """int64, the number of each document in the store."""
    document_sources_N: np.ndarray
    """uint8, the source of each document, as an index into the sources."""

    @cached_property
    def sources_T(self) -> np.ndarray:
        """uint8, the source of each token."""
        lengths = np.diff(self.documents_N, append=len(self.tokens_T))
        return np.asarray(np.repeat(self.document_sources_N, lengths))

    @cached_property
    def positions_T(self) -> np.ndarray:
        """int32, the position of each token in its sequence."""
        lengths = np.diff(self.sequences_S1)
        starts_T = np.repeat(self.sequences_S1[:-1], lengths)
        return np.asarray(np.arange(len(self.tokens_T)) - starts_T, dtype=np.int32)

    def passages_T(self) -> np.ndarray:
        """int32, the passage of each token: up to `PASSAGE` tokens of one document in one sequence."""
        starts = np.union1d(self.documents_N, self.sequences_S1[:-1])
        lengths = np.diff(starts, append=len(self.tokens_T))
        within = np.arange(len(self.tokens_T)) - np.repeat(starts, lengths)
        return np.asarray(np.cumsum(within % PASSAGE == 0) - 1, dtype=np.int32)


def corpus_of(store: Store, masks: list[np.ndarray] | None) -> tuple[Corpus, list[np.ndarray]]:
    """The corpus of a store, and for each segment the row at each place, `[R]` int64.

    Args:
        masks: for each segment, which rows the filter keeps; None: all rows.

    Raises:
        UserError: files are damaged.
    """
    tokens, lengths, kept, document_ids, sources, rows_at = [], [], [], [], [], []
    for segment in range(store.manifest.segments):
        packed = read_token_segment(store.path, segment)
        text_R, starts_S = _in_order(packed)
        facts = store.read_rows(segment)
        sequence_R = np.searchsorted(np.sort(packed.sequence_numbers), facts["sequence"].numpy())
        place_R = starts_S[sequence_R] + facts["position"].numpy()
        row_at_R = np.full(packed.rows, -1)
        row_at_R[place_R] = np.arange(packed.rows)
        tokens.append(packed.token_ids[text_R])
        if (row_at_R < 0).any() or not np.array_equal(facts["token_id"].numpy()[row_at_R], tokens[-1]):
            raise UserError(f"{store.path}: the rows of segment {segment} do not match its tokens; run `olmoscope "
                            f"store verify {store.path}`")
        lengths.append(np.diff(starts_S))
        document_ids.append(packed.document_ids[text_R])
        sources.append(packed.sources[text_R])
        kept.append(np.ones(packed.rows, bool) if masks is None else masks[segment][row_at_R])
        rows_at.append(row_at_R)
    ids_T, sources_T = np.concatenate(document_ids), np.concatenate(sources)
    starts_N = np.flatnonzero(np.diff(ids_T, prepend=ids_T[0] - 1))
    corpus = Corpus(np.concatenate(tokens), np.cumsum([0, *np.concatenate(lengths)]),
                    np.concatenate(kept).astype(np.uint8), starts_N, ids_T[starts_N], sources_T[starts_N])
    return corpus, rows_at


def _in_order(packed: TokenSegment) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a segment in the order of the text (batches have another order), `[R]`; and where each sequence
    starts in that order, `[S + 1]`."""
    order_S = np.argsort(packed.sequence_numbers)
    lengths_S = np.diff(packed.sequence_starts)[order_S]
    starts_S = np.cumsum([0, *lengths_S])
    shift_S = packed.sequence_starts[:-1][order_S] - starts_S[:-1]
    return np.arange(packed.rows) + np.repeat(shift_S, lengths_S), starts_S


def write_corpus(folder: Path, corpus: Corpus, texts: list[str]) -> None:
    """Write corpus/ of an index.

    Args:
        texts: the text of each token id, `[V]`.
    """
    for name, array in (("tokens", corpus.tokens_T), ("sequences", corpus.sequences_S1), ("kept", corpus.kept_T)):
        with atomic_file(folder / f"{name}.npy") as file:
            np.save(file, array, allow_pickle=False)
    rows_V = np.bincount(corpus.tokens_T[corpus.kept_T > 0], minlength=len(texts))
    tables = {
        "documents": {"start": corpus.documents_N, "document": corpus.document_ids_N,
                      "source": corpus.document_sources_N},
        "vocabulary": {"token": np.arange(len(texts), dtype=np.int32), "text": texts, "rows": rows_V},
    }
    for name, columns in tables.items():
        with atomic_path(folder / f"{name}.parquet") as path:
            pq.write_table(pa.table(columns), path)


def read_corpus(folder: Path) -> Corpus:
    """Read corpus/; the large arrays are mapped.

    Raises:
        UserError: missing or damaged.
    """
    arrays = {}
    for name in ("tokens", "sequences", "kept"):
        path = folder / f"{name}.npy"
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise damaged(path, str(error)) from error
    documents = read_table(folder / "documents.parquet")
    return Corpus(arrays["tokens"], arrays["sequences"], arrays["kept"], documents["start"].to_numpy(),
                  documents["document"].to_numpy(), documents["source"].to_numpy())


def read_table(path: Path) -> pa.Table:
    """A parquet file of an index.

    Raises:
        UserError: missing or damaged.
    """
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, str(error).split("\n")[0]) from error
