"""The text of an index cut into blocks, and each document put into one part: to learn rules, to choose among them, or
to score labels.

A block is up to `LONGEST` neighbouring tokens of one document in one sequence. A document's part follows from a hash of
its number. So a feature's label and the label's scores never come from the same document, whichever features are
labelled, and in whatever order.

Shapes: T tokens of the corpus (a token's number is its place), B blocks, V vocabulary, N documents.
"""

import hashlib
from functools import cached_property
from typing import Literal

import numpy as np

from olmoscope.features.read import FeatureIndex

LONGEST = 32
"""The most tokens of a block."""
SHORTEST = 4
"""Shorter blocks, at the ends of documents and sequences, are left out."""
Part = Literal["learn", "choose", "score"]
SHARES: dict[Part, float] = {"learn": 0.35, "choose": 0.15, "score": 0.5}
"""The share of the documents in each part."""


class TextBlocks:
    """The blocks of an index.

    Attributes:
        starts_B, ends_B: places of the first token of each block, and of the first after it; int64, ascending.
        ids_T: int32 token ids.
        sources: names of the text sources.
    """

    def __init__(self, index: FeatureIndex, seed: int = 0) -> None:
        """
        Args:
            seed: of the parts; another seed puts other documents into them.
        """
        corpus = index.corpus
        self.index, self.seed = index, seed
        self.ids_T = np.asarray(corpus.tokens_T)
        self.sources = list(index.info.sources)
        ends = np.union1d(corpus.documents_N, corpus.sequences_S1)
        starts = ends[:-1] if ends[-1] == len(self.ids_T) else ends
        lengths = np.diff(starts, append=len(self.ids_T))
        blocks = -(-lengths // LONGEST)
        offset = np.arange(int(blocks.sum())) - np.repeat(np.cumsum(blocks) - blocks, blocks)
        first = np.repeat(starts, blocks) + offset * LONGEST
        end = np.minimum(first + LONGEST, np.repeat(starts + lengths, blocks))
        long = end - first >= SHORTEST
        self.starts_B, self.ends_B = first[long].astype(np.int64), end[long].astype(np.int64)
        self.document_B = np.searchsorted(corpus.documents_N, self.starts_B, side="right") - 1
        self._part_N = _parts(np.asarray(corpus.document_ids_N), seed)
        self.part_B = self._part_N[self.document_B]

    @property
    def identity(self) -> str:
        """What decides which documents are for scores; each label records it."""
        return f"{self.index.info.identity}:{self.seed}"

    @cached_property
    def part_T(self) -> np.ndarray:
        """uint8, the part of each token that is a row of the index and in a block; 255 for all others."""
        part_T = np.full(len(self.ids_T), 255, np.uint8)
        for part in range(len(SHARES)):
            mine = self.part_B == part
            edges = np.zeros(len(self.ids_T) + 1, np.int8)
            edges[self.starts_B[mine]] += 1
            edges[self.ends_B[mine]] -= 1
            part_T[np.cumsum(edges[:-1]) > 0] = part
        part_T[np.asarray(self.index.corpus.kept_T) == 0] = 255
        return part_T

    @cached_property
    def positions_T(self) -> np.ndarray:
        """int32, position in the sequence."""
        return self.index.corpus.positions_T

    @cached_property
    def sources_T(self) -> np.ndarray:
        """uint8, number of the text source."""
        return self.index.corpus.sources_T

    @cached_property
    def previous_T(self) -> np.ndarray:
        """int32, the token before in the same sequence; −1: none."""
        previous_T = np.empty_like(self.ids_T)
        previous_T[1:] = self.ids_T[:-1]
        previous_T[np.asarray(self.index.corpus.sequences_S1[:-1])] = -1
        return previous_T

    @cached_property
    def next_T(self) -> np.ndarray:
        """int32, the token after it in the same sequence; −1: none."""
        next_T = np.empty_like(self.ids_T)
        next_T[:-1] = self.ids_T[1:]
        next_T[np.asarray(self.index.corpus.sequences_S1[1:]) - 1] = -1
        return next_T

    @cached_property
    def _by_token(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.ids_T, kind="stable")
        return order, np.searchsorted(self.ids_T[order], np.arange(int(self.ids_T.max()) + 2))

    def places_of(self, token: int) -> np.ndarray:
        """Where a token is, ascending."""
        order, offsets = self._by_token
        return order[offsets[token] : offsets[token + 1]]

    def blocks_at(self, places: np.ndarray) -> np.ndarray:
        """The block of each place; −1 where there is none."""
        blocks = np.searchsorted(self.starts_B, places, side="right") - 1
        inside = (blocks >= 0) & (places < self.ends_B[np.maximum(blocks, 0)])
        return np.where(inside, blocks, -1)

    def of_part(self, *parts: Part) -> np.ndarray:
        """The blocks of some parts, ascending."""
        wanted = [list(SHARES).index(part) for part in parts]
        return np.flatnonzero(np.isin(self.part_B, wanted))


def _parts(documents_N: np.ndarray, seed: int) -> np.ndarray:
    """Number of the part of each document, uint8."""
    bounds = np.cumsum(list(SHARES.values()))
    share_N = np.array([int.from_bytes(hashlib.blake2b(f"labels {seed} {document}".encode(), digest_size=8).digest())
                        / 2**64 for document in documents_N.tolist()])
    return np.minimum(np.searchsorted(bounds, share_N, side="right"), len(SHARES) - 1).astype(np.uint8)
