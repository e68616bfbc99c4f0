"""The tokens on which an SAE is evaluated, in the order of the text, with facts about each.

N tokens in S sequences; a batch has B sequences of at most T tokens, and R of its B · T places are not padding.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olmoscope.evaluate.chat_parts import parts_of_tokens
from olmoscope.files import read_json
from olmoscope.tokens.batches import plan_batches
from olmoscope.tokens.begin import Begun, begun_with, is_begin
from olmoscope.tokens.chunks import positions
from olmoscope.tokens.segments import read_token_segment
from olmoscope.tokens.tokenizer import Tokenizer

MAX_PADDING = 0.03


@dataclass(frozen=True)
class TokenBatch:
    """The tokens that the model reads in one pass."""

    token_ids_BT: Tensor
    positions_BT: Tensor | None
    real_R: Tensor
    """Which places of the flattened batch are not padding."""
    index_R: Tensor
    """For each of these, its index among the N tokens."""


@dataclass(frozen=True)
class Sequences:
    """Tokens, in the order of the text."""

    token_ids: np.ndarray
    """`[N]` int32."""
    starts: np.ndarray
    """`[S + 1]` int64: sequence s is tokens `starts[s]` to `starts[s + 1]`."""
    documents: np.ndarray
    """`[N]` int64, the document of each token, counted from 0."""
    parts: np.ndarray
    """`[N]` uint8, the part of a chat that each token is in (chat_parts.py)."""
    special: np.ndarray
    """`[N]` bool: tokens that the tokenizer calls special."""
    apart: bool
    """Whether the model sees each document as if it were alone."""

    @property
    def rows(self) -> int:
        return len(self.token_ids)

    def positions(self) -> np.ndarray:
        """`[N]`: the position of each token in its sequence."""
        places: np.ndarray = np.arange(self.rows) - np.repeat(self.starts[:-1], np.diff(self.starts))
        return places

    def next_tokens(self) -> np.ndarray:
        """`[N]` int64: the token that follows each token in its sequence (and in its document, if these are apart); −1
        if there is none."""
        following = np.append(self.token_ids[1:], -1).astype(np.int64)
        following[self.starts[1:] - 1] = -1
        if self.apart:
            following[:-1][np.diff(self.documents) != 0] = -1
        return following

    def first(self, tokens: int) -> "Sequences":
        """The first tokens only; a last sequence may be cut."""
        if tokens >= self.rows:
            return self
        starts = np.append(self.starts[self.starts < tokens], tokens)
        return replace(self, token_ids=self.token_ids[:tokens], starts=starts, documents=self.documents[:tokens],
                       parts=self.parts[:tokens], special=self.special[:tokens])

    def hash(self) -> str:
        """A hash of the tokens and of how the model sees them."""
        digest = hashlib.sha256(str(self.apart).encode())
        for array in (self.token_ids, self.starts, self.documents):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def plan(self, batch_tokens: int) -> list[np.ndarray]:
        """The sequences of each batch; sequences of similar length are together."""
        return plan_batches(np.diff(self.starts), batch_tokens, MAX_PADDING)

    def batch(self, sequences: np.ndarray) -> TokenBatch:
        """Some sequences, padded at their ends."""
        lengths = np.diff(self.starts)[sequences]
        real_BT = np.arange(lengths.max()) < lengths[:, None]
        index = np.concatenate([np.arange(self.starts[number], self.starts[number + 1]) for number in sequences])
        token_ids_BT = np.zeros(real_BT.shape, dtype=np.int64)
        token_ids_BT[real_BT] = self.token_ids[index]
        positions_BT = np.zeros(real_BT.shape, dtype=np.int64)
        if self.apart:
            positions_BT[real_BT] = np.concatenate([
                positions(self.documents[self.starts[number] : self.starts[number + 1]], "apart")
                for number in sequences])
        return TokenBatch(torch.from_numpy(token_ids_BT), torch.from_numpy(positions_BT) if self.apart else None,
                          torch.from_numpy(np.flatnonzero(real_BT)), torch.from_numpy(index))


def read_sequences(folder: Path, tokenizer: Tokenizer, *, apart: bool, stored: tuple[int, ...]) -> Sequences:
    """All token segments of a folder, in the order of the text.

    Args:
        folder: a store, or a folder with a store's `tokens/`.
        tokenizer: its `begin` has the tokens with which the model's contexts must begin.
        stored: the tokens with which the folder's sequences begin.

    Raises:
        UserError: a segment is missing or damaged.
    """
    segments = len(read_json(folder / "tokens" / "index.json")["rows"])
    tokens, documents, numbers = zip(*_sequences(folder, segments), strict=True)
    order = np.argsort(numbers)
    text = begun_with(Begun(np.concatenate([tokens[place] for place in order]),
                            np.concatenate([documents[place] for place in order]),
                            np.cumsum([0, *(len(tokens[place]) for place in order)])),
                      stored, tokenizer.begin, apart=apart)
    parts = parts_of_tokens(text.token_ids, text.document_ids,
                            lambda token: tokenizer.backend.decode([token], skip_special_tokens=False))
    begins = is_begin(text.document_ids, text.starts, len(tokenizer.begin), apart=apart)
    parts[begins] = 0
    return Sequences(text.token_ids, text.starts, np.unique(text.document_ids, return_inverse=True)[1].astype(np.int64),
                     parts, np.isin(text.token_ids, tokenizer.special_ids()) | begins, apart)


def _sequences(folder: Path, segments: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    for segment in range(segments):
        tokens = read_token_segment(folder, segment)
        for number, (start, end) in zip(tokens.sequence_numbers, pairwise(tokens.sequence_starts), strict=True):
            yield tokens.token_ids[start:end], tokens.document_ids[start:end], int(number)
