"""The token stage: text in, token segments out. It is cheap next to the model, deterministic, and resumable at any
segment.

A segment is written with the state from which the next one can be packed. The end of the last document read may still
be waiting. If it is no longer than a segment, it is written too. A longer one (from a document of many megabytes) would
be written again with every segment, so the state says instead where the document is, and resuming reads it again.

Tokens grow: for a recipe that asks for more of them, packing continues after the last whole segment. The tokens are
then the same as if they had been packed at once, so the last segment, which ended at the old number of tokens, is made
again.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from olmoscope.errors import UserError
from olmoscope.files import read_json, write_json
from olmoscope.progress import bar
from olmoscope.recipe.store import Model, Split, TokensRecipe
from olmoscope.text.document import Document
from olmoscope.text.mixture import Mixture
from olmoscope.text.template import template_for
from olmoscope.tokens.batches import plan_batches
from olmoscope.tokens.chunks import Chunker, Sequence, Waiting, waiting_from_arrays, waiting_to_arrays
from olmoscope.tokens.identity import identity_path, refuse_other_tokens, wanted_of, write_identity
from olmoscope.tokens.segments import (
    TokenSegment,
    has_token_segment,
    read_packing_state,
    token_checksum,
    write_token_segment,
)
from olmoscope.tokens.tokenizer import Tokenizer

DOCUMENTS_AT_ONCE = 64
"""How many documents are tokenised together, so that the tokenizer can use all cores; fewer if they are long."""
CHARACTERS_AT_ONCE = 2**22


def is_packed(store: Path) -> bool:
    """Whether a store has all its tokens."""
    return _index_path(store).exists()


def lacks_tokens(recipe: TokensRecipe, split: Split, store: Path) -> bool:
    """Whether packing finished for a recipe that asked for fewer tokens."""
    return is_packed(store) and bool(read_json(_index_path(store))["wanted"] < recipe.wanted[split])


def reopen(store: Path) -> None:
    """Undo the last segment and the index, so that packing can continue there."""
    last = _packed_segments(store) - 1
    if last >= 0:
        token_checksum(store, last).unlink()  # first: without the index, the segment would pass for a whole one
    _index_path(store).unlink(missing_ok=True)


def _packed_segments(store: Path) -> int:
    return next(number for number in itertools.count() if not has_token_segment(store, number))


def _index_path(store: Path) -> Path:
    return store / "tokens" / "index.json"


def pack(recipe: TokensRecipe, tokenizer: Tokenizer, split: Split, store: Path,
         model: Model | None = None) -> dict[str, Any]:
    """Write `tokens/` of a store; what is there already is kept.

    Args:
        model: the model whose chat template is used, at the commit of the store; by default the recipe's.

    Returns:
        The index: `rows` of every segment, `padded` (tokens computed, padding included), `wanted` (tokens), and
        for each source its `documents` and `tokens`, the numbers of `malformed` and `empty` rows, and what its chats
        `lost` (`Mixture`), if they lost anything.

    Raises:
        UserError: there is no usable text, sequences would hold nothing but BOS, or the text stage raises it.
    """
    assert recipe.tokens.bos != "auto" or not tokenizer.begin, "settle the recipe first (pipeline.py)"
    refuse_other_tokens(recipe, split, store)
    _refuse_nothing_but_bos(recipe, tokenizer)
    _make_room(recipe, split, store)
    if is_packed(store):
        return dict(read_json(_index_path(store)))
    count = recipe.wanted[split]
    mixture = Mixture(recipe.text, recipe.seed, split, template_for(recipe.text, model or recipe.model))
    chunker = Chunker(recipe.tokens.chunk_lengths, count, recipe.seed, tokenizer.begin,
                      apart=recipe.tokens.documents == "apart")
    sources = [source.name for source in recipe.text.sources]
    done = _packed_segments(store)
    totals: dict[str, Any] = {"rows": [], "padded": 0, "source_tokens": [0] * len(recipe.text.sources)}
    at = _Place(mixture.state_dict())
    if done:
        arrays, state = read_packing_state(store, done - 1)
        mixture.load_state_dict(state["mixture"])
        chunker.restore(state["chunker"], waiting_from_arrays(arrays))
        totals, at = state["totals"], _Place(state["mixture"])
        if "reread" in state and chunker.tokens < count:
            at = _read_again(mixture, chunker, tokenizer, sources, state)
    segment: list[Sequence] = []

    def close() -> None:
        """Write the segment, with the state from which the next can be packed; before the first, write the identity."""
        if not totals["rows"]:
            write_identity(recipe, store)
        tokens, padded = _segment(segment, recipe)
        totals["rows"].append(tokens.rows)
        totals["padded"] += padded
        counts = np.bincount(tokens.sources, minlength=len(sources))
        totals["source_tokens"] = [old + int(new) for old, new in zip(totals["source_tokens"], counts, strict=True)]
        state = {"mixture": at.mixture, "chunker": counters, "totals": totals}
        if (rest := sum(len(token_ids) for token_ids, _, _ in waiting)) > recipe.tokens.segment_rows:
            assert at.document is not None and len(waiting) == 1
            state["reread"] = at.document.where(rest)
        write_token_segment(store, len(totals["rows"]) - 1, tokens,
                            waiting_to_arrays(() if "reread" in state else waiting), state)
        segment.clear()

    counters, waiting = chunker.state()
    with bar(f"tokens ({split})", count, "tokens", done=chunker.tokens) as advance:
        for sequence, place in _sequences(mixture, chunker, tokenizer, sources, at):
            if sum(len(part.token_ids) for part in segment) + len(sequence.token_ids) > recipe.tokens.segment_rows:
                close()
            segment.append(sequence)
            at = place
            counters, waiting = chunker.state()
            advance(len(sequence.token_ids))
    if segment:
        close()
    if not totals["rows"]:
        raise UserError(f"text: the sources have no document for the {split} split; add text or change "
                        "text.held_out_share")
    mixture.load_state_dict(at.mixture)  # it may have read further: count only what went into sequences
    index = {"rows": totals["rows"], "padded": totals["padded"], "wanted": count, "sources": {
        name: {"documents": mixture.documents[name], "tokens": tokens, "malformed": mixture.malformed[name],
               "empty": mixture.empty[name]} | ({"lost": lost} if (lost := mixture.lost[name]) else {})
        for name, tokens in zip(sources, totals["source_tokens"], strict=True)}}
    write_json(_index_path(store), index)
    return index


def _make_room(recipe: TokensRecipe, split: Split, store: Path) -> None:
    """If a recipe asks for more tokens than the one before it, take back the last segment. This can be interrupted
    anywhere; the same recipe then continues here."""
    grows = wanted_of(store, recipe)[split] < recipe.wanted[split]
    if grows and not is_packed(store):
        reopen(store)
    if has_token_segment(store, 0) and (grows or not identity_path(store).exists()):  # it grows, or the file was lost
        write_identity(recipe, store)
    if lacks_tokens(recipe, split, store):
        reopen(store)


def _refuse_nothing_but_bos(recipe: TokensRecipe, tokenizer: Tokenizer) -> None:
    shortest = min(low for low, _ in recipe.tokens.chunk_lengths)
    if shortest <= len(tokenizer.begin):
        raise UserError(f"tokens.chunk_lengths: a sequence of {shortest} would hold nothing but BOS; the shortest must "
                        f"be over {len(tokenizer.begin)}, or set tokens.bos=no")


@dataclass(frozen=True)
class _LastDocument:
    """The last document that the chunker took in."""

    before: dict[str, Any]
    """The mixture's state just before it."""
    token_ids: np.ndarray

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.token_ids.tobytes()).hexdigest()

    def where(self, rest: int) -> dict[str, Any]:
        """How to get its last `rest` tokens again, as JSON values."""
        return {"mixture": self.before, "taken": len(self.token_ids) - rest, "sha256": self.digest}


@dataclass(frozen=True)
class _Place:
    """A position in the text."""

    mixture: dict[str, Any]
    """The mixture's state after the last document that the chunker took in."""
    document: _LastDocument | None = None
    """That document; None if none has been read since packing was resumed."""


def _read_again(mixture: Mixture, chunker: Chunker, tokenizer: Tokenizer, sources: list[str],
                state: dict[str, Any]) -> _Place:
    """Give the chunker the rest of a document whose tokens were not written.

    Raises:
        UserError: the document has changed.
    """
    reread, counters = state["reread"], state["chunker"]
    mixture.load_state_dict(reread["mixture"])
    document = next(mixture, None)
    token_ids = np.empty(0, np.int32) if document is None else tokenizer.encode([document.text])[0]
    last = _LastDocument(reread["mixture"], token_ids)
    if document is None or last.digest != reread["sha256"]:
        name = "which is gone" if document is None else document.id
        raise UserError(f"cannot resume: document {counters['documents']} of the text ({name}) has changed since "
                        "packing stopped in it; restore it, or start again in another --out")
    waiting: Waiting = ((token_ids[reread["taken"] :], counters["documents"] - 1, sources.index(document.source)),)
    chunker.restore(counters, waiting)
    return _Place(mixture.state_dict(), last)


def _sequences(mixture: Mixture, chunker: Chunker, tokenizer: Tokenizer, sources: list[str],
               place: _Place) -> Iterator[tuple[Sequence, _Place]]:
    """Every sequence, with the place after the last document that the chunker took in.

    Args:
        place: the current position in the text.
    """
    documents = _with_state(mixture)
    while sequence := chunker.cut():  # the documents that were waiting when packing stopped may fill some
        yield sequence, place
    while chunker.tokens < chunker.count and (group := _group(documents)):
        encoded = tokenizer.encode([document.text for document, _ in group])
        for (document, document_state), token_ids in zip(group, encoded, strict=True):
            chunker.add(token_ids, sources.index(document.source))
            place = _Place(document_state, _LastDocument(place.mixture, token_ids))
            while sequence := chunker.cut():
                yield sequence, place
    while sequence := chunker.cut(last=True):
        yield sequence, _Place(mixture.state_dict(), place.document)


def _group(documents: Iterator[tuple[Document, dict[str, Any]]]) -> list[tuple[Document, dict[str, Any]]]:
    group: list[tuple[Document, dict[str, Any]]] = []
    characters = 0
    while len(group) < DOCUMENTS_AT_ONCE and characters < CHARACTERS_AT_ONCE and (one := next(documents, None)):
        group.append(one)
        characters += len(one[0].text)
    return group


def _with_state(mixture: Mixture) -> Iterator[tuple[Document, dict[str, Any]]]:
    for document in mixture:
        yield document, mixture.state_dict()


def _segment(sequences: list[Sequence], recipe: TokensRecipe) -> tuple[TokenSegment, int]:
    """The sequences in batches, and how many tokens the model computes for them, padding included."""
    lengths = np.array([len(sequence.token_ids) for sequence in sequences])
    batches = plan_batches(lengths, recipe.tokens.batch_tokens, recipe.tokens.max_padding)
    ordered = [sequences[index] for batch in batches for index in batch]
    tokens = TokenSegment(
        token_ids=np.concatenate([sequence.token_ids for sequence in ordered]),
        document_ids=np.concatenate([sequence.document_ids for sequence in ordered]),
        sources=np.concatenate([sequence.sources for sequence in ordered]),
        sequence_numbers=np.array([sequence.number for sequence in ordered], dtype=np.int64),
        sequence_starts=np.cumsum([0, *(len(sequence.token_ids) for sequence in ordered)]),
        batch_starts=np.cumsum([0, *map(len, batches)]))
    return tokens, sum(len(batch) * int(lengths[batch[0]]) for batch in batches)
