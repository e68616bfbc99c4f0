"""Reading an index: a feature's data in well under 5 ms, from memory-mapped files; any number of threads may read.

    index = FeatureIndex(path)
    feature = index.feature(1234)
    window = index.window(feature.top[0])
    page = index.table(sort="max", search="python")
"""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from olmoscope.errors import UserError
from olmoscope.features.corpus import Corpus, read_corpus, read_table
from olmoscope.features.format import FORMAT, INTERVALS, Info, bin_edges, damaged, map_tensors, part_path, read_info
from olmoscope.features.records import (
    Companion,
    Example,
    Feature,
    Histogram,
    Interval,
    Neighbour,
    Page,
    PositionShare,
    PreferredToken,
    SourceShare,
    Token,
    TokenLogit,
    Window,
)
from olmoscope.features.table import NO_SCORES, Filters, Sort, Table
from olmoscope.files import read_json, sha256

BEFORE, AFTER = 40, 23
"""Tokens of a window before and after the example, if the sequence has them."""

_TOP, _RANDOM = 0, INTERVALS + 1
"""Groups of examples; the numbers between are the intervals, from 1."""


def find_indexes(path: Path) -> list[Path]:
    """The index at a path, or all below it, in the order of their paths.

    Raises:
        UserError: there is none.
    """
    found = [manifest.parent for manifest in sorted([path / "manifest.json", *path.glob("*/**/manifest.json")])
             if manifest.is_file() and _is_index(manifest)]
    if not found:
        raise UserError(f"{path} holds no feature index; `olmoscope index SAE` makes one")
    return found


def _is_index(manifest: Path) -> bool:
    value = read_json(manifest)
    return isinstance(value, dict) and value.get("format") == FORMAT


class Vocabulary:
    """The texts of the tokens."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, token: int) -> str:
        """The text of a token id; empty if no token has it."""
        return self._texts[token] if 0 <= token < len(self._texts) else ""

    def texts(self, tokens: Iterable[int]) -> list[str]:
        return [self.text(token) for token in tokens]

    def token(self, token: int) -> Token:
        return Token(int(token), self.text(int(token)))


class FeatureIndex:
    """An index on disk, open for reading.

    Attributes:
        info: the manifest.
        corpus: the text; its arrays are memory-mapped.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: there is no index, it is unfinished or of a newer format, or a file is missing or has the wrong
                size.
        """
        self.path = path
        self.info: Info = read_info(path)
        for name, file in self.info.files.items():
            if not (path / name).is_file():
                raise damaged(path / name, "it is missing")
            if (path / name).stat().st_size != file.bytes:
                raise damaged(path / name, f"it has {(path / name).stat().st_size} bytes, not {file.bytes}")
        self.corpus: Corpus = read_corpus(path / "corpus")
        self._parts: dict[int, dict[str, np.ndarray]] = {}
        self._sources = list(self.info.sources)
        self._edges = bin_edges().tolist()

    @cached_property
    def tokens(self) -> Vocabulary:
        return Vocabulary(read_table(self.path / "corpus" / "vocabulary.parquet")["text"].to_pylist())

    @cached_property
    def _table(self) -> Table:
        return Table(self.path / "features.parquet")

    def table(self, sort: Sort = "telling", descending: bool = True, filters: Filters = Filters(),  # noqa: B008 (frozen)
              search: str = "", also: Sequence[int] | np.ndarray = (), offset: int = 0, limit: int = 50,
              scores: Mapping[int, float] = NO_SCORES) -> Page:
        """Some lines of the list of features; see `Table.page`."""
        return self._table.page(sort, descending, filters, search, also, offset, limit, scores)

    def order(self, sort: Sort = "telling", descending: bool = True, filters: Filters = Filters(),  # noqa: B008
              search: str = "", also: Sequence[int] | np.ndarray = (),
              scores: Mapping[int, float] = NO_SCORES) -> np.ndarray:
        """All features of the list, in its order; see `Table.order`."""
        return self._table.order(sort, descending, filters, search, also, scores)

    def firing_values(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Every place where a feature fires (int32, ascending), and its activation there (float32); memory-mapped.

        Raises:
            IndexError: no such feature.
        """
        part, row = self._find(feature)
        mine = _mine(part, "firings", row)
        return part["firings.places"][mine], part["firings.values"][mine]

    def feature(self, feature: int) -> Feature:
        """Everything that the index has on a feature.

        Raises:
            IndexError: no such feature.
        """
        part, row = self._find(feature)
        places, values = self.firing_values(feature)
        fired, largest = len(places), float(part["max"][row])
        mine = _mine(part, "examples", row)
        groups: list[list[Example]] = [[] for _ in range(INTERVALS + 2)]
        for group, firing in zip(part["examples.group"][mine].tolist(), part["examples.firing"][mine].tolist(),
                                 strict=True):
            groups[group].append(Example(feature, int(places[firing]), float(values[firing])))
        interval_rows = part["interval_rows"][row].tolist()
        return Feature(
            index=feature, rows=fired, density=fired / self.info.rows, max=largest,
            mean=float(part["sum"][row]) / fired if fired else 0.0,
            histogram=self._histogram(part, row), top=groups[_TOP], random=groups[_RANDOM],
            intervals=[Interval(largest * number / INTERVALS, largest * (number + 1) / INTERVALS, rows, examples)
                       for number, (rows, examples) in enumerate(zip(interval_rows, groups[1:_RANDOM], strict=True))],
            promoted=self._logits(part, "promoted", row), suppressed=self._logits(part, "suppressed", row),
            neighbours=[Neighbour(*pair) for pair in _columns(part, "neighbours", row, "id", "value")],
            companions=[Companion(*one) for one in _columns(part, "companions", row, "id", "rows", "lift")],
            tokens=[PreferredToken(self.tokens.token(token), *rest)
                    for token, *rest in _columns(part, "tokens", row, "id", "rows", "lift", "mean")],
            sources=[SourceShare(source, rows, self._lift(rows, fired, of)) for (source, of), rows in
                     zip(self.info.sources.items(), part["source_rows"][row].tolist(), strict=True)],
            positions=[PositionShare(2 ** (number - 1) if number else 0, 2**number - 1, rows,
                                     self._lift(rows, fired, of))
                       for number, (rows, of) in enumerate(zip(part["position_rows"][row].tolist(),
                                                               self.info.position_rows, strict=True))])

    def example(self, feature: int, place: int) -> Example:
        """A feature at any place; its value is 0 if it does not fire there.

        Raises:
            IndexError: no such feature or place.
        """
        if not 0 <= place < self.info.tokens:
            raise IndexError(f"place {place} is out of range: the corpus has {self.info.tokens} tokens")
        places, values = self.firing_values(feature)
        at = int(np.searchsorted(places, place))
        return Example(feature, place, float(values[at]) if at < len(places) and places[at] == place else 0.0)

    def window(self, example: Example) -> Window:
        """An example in its context: 40 tokens before it, 23 after."""
        return self.context(example, BEFORE, AFTER)

    def context(self, example: Example, before: int, after: int) -> Window:
        """An example with `before` and `after` tokens around it, within its sequence."""
        corpus, place = self.corpus, example.place
        sequence = int(np.searchsorted(corpus.sequences_S1, place, side="right")) - 1
        first, last = int(corpus.sequences_S1[sequence]), int(corpus.sequences_S1[sequence + 1])
        start, end = max(first, place - before), min(last, place + after + 1)
        places, values = self.firing_values(example.feature)
        low, high = np.searchsorted(places, [start, end])
        activations = np.zeros(end - start, np.float32)
        activations[places[low:high] - start] = values[low:high]
        document = int(np.searchsorted(corpus.documents_N, place, side="right")) - 1
        begins = corpus.documents_N[slice(*np.searchsorted(corpus.documents_N, [start + 1, end]))]
        return Window(
            feature=example.feature, sequence=sequence, start=start, at=place - start,
            tokens=[self.tokens.token(token) for token in corpus.tokens_T[start:end].tolist()],
            activations=activations.tolist(), kept=(corpus.kept_T[start:end] > 0).tolist(), position=start - first,
            document=int(corpus.document_ids_N[document]),
            source=self._sources[int(corpus.document_sources_N[document])],
            document_starts=(begins - start).tolist(), more_before=start > first, more_after=end < last)

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            UserError: a file differs.
        """
        for name, file in self.info.files.items():
            if sha256(self.path / name) != file.sha256:
                raise damaged(self.path / name, "its checksum differs")

    def _find(self, feature: int) -> tuple[dict[str, np.ndarray], int]:
        """A feature's part and its row in it."""
        if not 0 <= feature < self.info.sae.d_sae:
            raise IndexError(f"feature {feature} is out of range: the SAE has features 0 to {self.info.sae.d_sae - 1}")
        number = bisect.bisect_right(self.info.parts, feature) - 1
        if number not in self._parts:  # two threads may both map it, which does no harm
            self._parts[number] = map_tensors(part_path(self.path, number))
        return self._parts[number], feature - self.info.parts[number]

    def _histogram(self, part: dict[str, np.ndarray], row: int) -> Histogram:
        mine = _mine(part, "histogram", row)
        bins, rows = part["histogram.bin"][mine], part["histogram.rows"][mine]
        if not len(bins):
            return Histogram([], [])
        first, last = int(bins[0]), int(bins[-1])
        counts = np.zeros(last - first + 1, np.int64)
        counts[bins - first] = rows
        return Histogram(self._edges[first : last + 2], counts.tolist())

    def _logits(self, part: dict[str, np.ndarray], name: str, row: int) -> list[TokenLogit] | None:
        if self.info.unembedding is None:
            return None
        return [TokenLogit(self.tokens.token(token), logit)
                for token, logit in _columns(part, name, row, "id", "value")]

    def _lift(self, rows: int, fired: int, of: int) -> float:
        """The share of some kind of rows among those on which a feature fires, over their share of all rows; 0 for
        none."""
        return rows * self.info.rows / (fired * of) if rows else 0.0


def _mine(part: dict[str, np.ndarray], name: str, row: int) -> slice:
    """The slice with the entries of a feature."""
    offsets = part[f"{name}.offsets"]
    return slice(int(offsets[row]), int(offsets[row + 1]))


def _columns(part: dict[str, np.ndarray], name: str, row: int, *columns: str) -> Iterable[tuple]:  # type: ignore[type-arg]
    mine = _mine(part, name, row)
    return zip(*(part[f"{name}.{column}"][mine].tolist() for column in columns), strict=True)
