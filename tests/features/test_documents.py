"""SciPy and pandas read the matrix of documents by features, and it equals a count place by place."""

import numpy as np
import pandas
import pytest
import scipy.sparse

from feature_index import small_index
from olmoscope.features.documents import write_documents
from olmoscope.features.read import FeatureIndex


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return FeatureIndex(small_index(tmp_path_factory.mktemp("index")))


def test_scipy_and_pandas_read_it_with_every_firing_in_it(index, tmp_path):
    made = write_documents(index, tmp_path)
    largest, mean = (scipy.sparse.load_npz(tmp_path / f"{name}.npz") for name in ("max", "mean"))
    documents = pandas.read_parquet(tmp_path / "documents.parquet")
    assert largest.shape == mean.shape == (made.documents, 512) == (index.info.documents, 512)
    assert (largest.format, largest.dtype, largest.nnz, mean.nnz) == ("csr", np.float32, made.entries, made.entries)
    assert largest.has_canonical_format and mean.has_canonical_format
    corpus = index.corpus
    document_T = np.repeat(corpus.document_ids_N, np.diff(corpus.documents_N, append=index.info.tokens))
    row_of = {document: row for row, document in enumerate(documents["document"])}
    wanted, sums = np.zeros(largest.shape, np.float32), np.zeros(largest.shape)
    for feature in range(512):
        for place, value in zip(*index.firing_values(feature), strict=True):
            row = row_of[document_T[place]]
            wanted[row, feature] = max(wanted[row, feature], value)
            sums[row, feature] += value
    assert np.array_equal(largest.toarray(), wanted)
    kept = [int(corpus.kept_T[document_T == document].sum()) for document in documents["document"]]
    assert documents["rows"].tolist() == kept and documents["rows"].sum() == index.info.rows
    assert np.allclose(mean.toarray(), sums / np.maximum(kept, 1)[:, None], rtol=1e-6)
    sources = list(index.info.sources)
    for row in range(0, made.documents, 3):
        document = documents.iloc[row]
        assert document["text"] == "".join(index.tokens.texts(corpus.tokens_T[document_T == document["document"]]))
        first = int(np.flatnonzero(corpus.document_ids_N == document["document"])[0])
        assert document["source"] == sources[corpus.document_sources_N[first]]


def test_again_it_is_the_same_byte_for_byte(index, tmp_path):
    for name in ("one", "two"):
        write_documents(index, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
