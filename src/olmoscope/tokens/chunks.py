"""Documents joined end to end and cut into sequences of random length."""

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from olmoscope.seeds import generator


@dataclass(frozen=True)
class Sequence:
    """What the model reads at a time. All arrays have one entry per token."""

    number: int
    """The sequence's number in the whole store."""
    token_ids: np.ndarray
    """int32."""
    document_ids: np.ndarray
    """int64, counted in the order in which documents were drawn."""
    sources: np.ndarray
    """uint8, the recipe's source of each token."""


def positions(document_ids: np.ndarray, documents: str) -> np.ndarray:
    """Position ids of the tokens of one sequence, int64.

    Args:
        document_ids: `[T]`.
        documents: `share` (one count through the sequence) or `apart` (counted from 0 in every document).
    """
    index = np.arange(len(document_ids))
    if documents == "share" or not len(index):
        return index
    starts = np.flatnonzero(np.diff(document_ids, prepend=document_ids[0] - 1))
    return index - np.repeat(starts, np.diff(starts, append=len(index)))


Waiting = tuple[tuple[np.ndarray, int, int], ...]
"""Token ids, document number and source of each waiting document."""


def waiting_to_arrays(waiting: Waiting) -> dict[str, np.ndarray]:
    """Waiting documents as arrays to write, with one entry per token."""
    lengths = [len(token_ids) for token_ids, _, _ in waiting]
    return {"token_ids": np.concatenate([np.empty(0, np.int32), *(token_ids for token_ids, _, _ in waiting)]),
            "document_ids": np.repeat(np.array([document for _, document, _ in waiting], np.int64), lengths),
            "sources": np.repeat(np.array([source for _, _, source in waiting], np.uint8), lengths)}


def waiting_from_arrays(arrays: dict[str, np.ndarray]) -> Waiting:
    """The inverse of `waiting_to_arrays`."""
    token_ids, documents, sources = arrays["token_ids"], arrays["document_ids"], arrays["sources"]
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    return tuple((token_ids[start:end], int(documents[start]), int(sources[start]))
                 for start, end in pairwise([*starts, len(token_ids)]))


class Chunker:
    """Cuts the stream of documents into sequences; at any cut it can save its position and later resume from it."""

    def __init__(self, buckets: list[tuple[int, int]], count: int, seed: int, begin: tuple[int, ...] = (),
                 *, apart: bool = False) -> None:
        """
        Args:
            buckets: (shortest, longest) chunk lengths; a bucket is chosen at random, then a length in it.
            count: the total number of tokens; the last sequence is cut to meet it exactly.
            begin: token ids that each sequence begins with (BOS); they count as tokens.
            apart: whether each document in a sequence begins with them too.
        """
        self.buckets, self.count, self.seed = buckets, count, seed
        self._begin, self._apart = np.array(begin, np.int32), apart
        self.sequences = 0
        self.tokens = 0
        self._documents = 0
        self._waiting: deque[tuple[np.ndarray, int, int]] = deque()
        self._available = 0

    def add(self, token_ids: np.ndarray, source: int) -> None:
        """Append a document's tokens (with its EOS)."""
        self._waiting.append((token_ids, self._documents, source))
        self._documents += 1
        self._available += len(token_ids)

    def cut(self, last: bool = False) -> Sequence | None:
        """The next sequence, or None if it needs more documents first, or `count` is reached.

        Args:
            last: no more documents will come, so the remainder becomes a sequence, however short.
        """
        length = min(self._length(self.sequences), self.count - self.tokens)
        available = self._available + len(self._begin) * (len(self._waiting) if self._apart else bool(self._waiting))
        if last:
            length = min(length, available)
        if length == 0 or length > available:
            return None
        parts: list[tuple[np.ndarray, int, int]] = []
        missing = length
        while missing:
            token_ids, document, source = self._waiting.popleft()
            begin = self._begin[: missing if self._apart or not parts else 0]
            taken = min(len(token_ids), missing - len(begin))
            if taken < len(token_ids):
                self._waiting.appendleft((token_ids[taken:], document, source))
            parts.append((np.concatenate([begin, token_ids[:taken]]), document, source))
            missing -= len(begin) + taken
            self._available -= taken
        lengths = [len(part[0]) for part in parts]
        sequence = Sequence(
            self.sequences, np.concatenate([part[0] for part in parts]),
            np.repeat(np.array([part[1] for part in parts], dtype=np.int64), lengths),
            np.repeat(np.array([part[2] for part in parts], dtype=np.uint8), lengths))
        self.sequences += 1
        self.tokens += length
        return sequence

    def state(self) -> tuple[dict[str, int], Waiting]:
        """Its position: counters, and the documents (or what is left of them) that wait for the next cut."""
        counters = {"sequences": self.sequences, "tokens": self.tokens, "documents": self._documents}
        return counters, tuple(self._waiting)

    def restore(self, counters: dict[str, int], waiting: Waiting) -> None:
        """Resume from a `state`."""
        self.sequences, self.tokens = counters["sequences"], counters["tokens"]
        self._documents = counters["documents"]
        self._waiting = deque(waiting)
        self._available = sum(len(token_ids) for token_ids, _, _ in waiting)

    def _length(self, number: int) -> int:
        random = generator(self.seed, "chunk lengths", number)
        low, high = self.buckets[random.integers(len(self.buckets))]
        return int(random.integers(low, high, endpoint=True))
