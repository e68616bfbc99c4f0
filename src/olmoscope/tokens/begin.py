"""What the model's contexts begin with: BOS, or whatever else a tokenizer puts first.

A context is a sequence or, if documents are kept apart, each document in it. T tokens of a text, S sequences.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Begun:
    """Sequences, in the order of the text."""

    token_ids: np.ndarray
    """`[T]` int32."""
    document_ids: np.ndarray
    """`[T]` int64; the beginning of a context belongs to the document that follows it."""
    starts: np.ndarray
    """`[S + 1]` int64: sequence s is tokens `starts[s]` to `starts[s + 1]`."""


def is_begin(document_ids: np.ndarray, starts: np.ndarray, length: int, *, apart: bool) -> np.ndarray:
    """Which tokens are among the `length` tokens that each context begins with, `[T]` bool."""
    found = np.zeros(len(document_ids), bool)
    contexts = _contexts(document_ids, starts, apart=apart)
    for offset in range(length):
        places = contexts + offset
        found[places[places < np.append(contexts[1:], len(found))]] = True
    return found


def begun_with(text: Begun, old: tuple[int, ...], new: tuple[int, ...], *, apart: bool) -> Begun:
    """The same sequences with another beginning; a context that has nothing else is dropped."""
    if old == new:
        return text
    kept = ~is_begin(text.document_ids, text.starts, len(old), apart=apart)
    tokens, documents = text.token_ids[kept], text.document_ids[kept]
    before = np.concatenate([[0], np.cumsum(kept)])
    starts = np.unique(before[text.starts])
    contexts = _contexts(documents, starts, apart=apart)
    at = np.repeat(contexts, len(new))
    longer = np.insert(tokens, at, np.tile(np.array(new, tokens.dtype), len(contexts)))
    earlier = np.searchsorted(contexts, starts, side="left")
    return Begun(longer, np.insert(documents, at, documents[at]), starts + len(new) * earlier)


def _contexts(document_ids: np.ndarray, starts: np.ndarray, *, apart: bool) -> np.ndarray:
    """Where contexts begin, ascending."""
    first = starts[:-1]
    return np.union1d(first, np.flatnonzero(np.diff(document_ids)) + 1) if apart else first
