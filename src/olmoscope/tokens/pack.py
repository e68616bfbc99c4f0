"""The token stage: text in, token segments out. Cheap next to the model, deterministic, resumable at any segment."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from olmoscope.errors import UserError
from olmoscope.files import read_json, write_json
from olmoscope.progress import bar
from olmoscope.recipe import Recipe
from olmoscope.text.document import Document
from olmoscope.text.mixture import Mixture
from olmoscope.tokens.batches import plan_batches
from olmoscope.tokens.chunks import Chunker, Sequence, waiting_from_arrays, waiting_to_arrays
from olmoscope.tokens.segments import TokenSegment, has_token_segment, read_packing_state, write_token_segment
from olmoscope.tokens.tokenizer import Tokenizer

DOCUMENTS_AT_ONCE = 64
"""Tokenised together, so that the tokenizer can use all cores."""


def is_packed(store: Path) -> bool:
    """Whether all tokens of a store are there."""
    return (store / "tokens" / "index.json").exists()


def pack(recipe: Recipe, tokenizer: Tokenizer, split: Literal["train", "held_out"], store: Path) -> dict[str, Any]:
    """Write `tokens/` of a store; what is there already is kept.

    Returns:
        The index: `rows` of every segment, `padded` (tokens computed, padding included), `wanted` (tokens), and
        for each source its `documents` and `tokens`, `malformed` and `empty` ones.

    Raises:
        UserError: no usable text, or what the text stage raises.
    """
    _refuse_another(recipe, store)
    if has_token_segment(store, 0) and not (store / "tokens" / "recipe.json").exists():  # lost since
        write_json(store / "tokens" / "recipe.json", _identity(recipe))
    index_path = store / "tokens" / "index.json"
    if is_packed(store):
        return dict(read_json(index_path))
    count = recipe.tokens.count if split == "train" else recipe.tokens.held_out
    mixture = Mixture(recipe.text, recipe.seed, split)
    chunker = Chunker(recipe.tokens.chunk_lengths, count, recipe.seed)
    done = next(number for number in itertools.count() if not has_token_segment(store, number))
    totals: dict[str, Any] = {"rows": [], "padded": 0, "source_tokens": [0] * len(recipe.text.sources)}
    mixture_state = mixture.state_dict()
    if done:
        arrays, state = read_packing_state(store, done - 1)
        mixture.load_state_dict(mixture_state := state["mixture"])
        chunker.restore(state["chunker"], waiting_from_arrays(arrays))
        totals = state["totals"]

    sources = [source.name for source in recipe.text.sources]
    segment: list[Sequence] = []

    def close() -> None:
        """Write the segment, with the state from which the next one can be packed; before the first, whose it is."""
        if not totals["rows"]:
            write_json(store / "tokens" / "recipe.json", _identity(recipe))
        tokens, padded = _segment(segment, recipe)
        totals["rows"].append(tokens.rows)
        totals["padded"] += padded
        counts = np.bincount(tokens.sources, minlength=len(sources))
        totals["source_tokens"] = [old + int(new) for old, new in zip(totals["source_tokens"], counts, strict=True)]
        write_token_segment(store, len(totals["rows"]) - 1, tokens, waiting_to_arrays(waiting),
                            {"mixture": mixture_state, "chunker": counters, "totals": totals})
        segment.clear()

    counters, waiting = chunker.state()
    with bar(f"tokens ({split})", count, "tokens", done=chunker.tokens) as advance:
        for sequence, document_state in _sequences(mixture, chunker, tokenizer, sources):
            if sum(len(part.token_ids) for part in segment) + len(sequence.token_ids) > recipe.tokens.segment_rows:
                close()
            segment.append(sequence)
            mixture_state = document_state
            counters, waiting = chunker.state()
            advance(len(sequence.token_ids))
    if segment:
        close()
    if not totals["rows"]:
        raise UserError(f"text: the sources have no document for the {split} split; add text or change "
                        "text.held_out_share")
    mixture.load_state_dict(mixture_state)  # it may have read on: count what went into sequences
    index = {"rows": totals["rows"], "padded": totals["padded"], "wanted": count, "sources": {
        name: {"documents": mixture.documents[name], "tokens": tokens, "malformed": mixture.malformed[name],
               "empty": mixture.empty[name]}
        for name, tokens in zip(sources, totals["source_tokens"], strict=True)}}
    write_json(index_path, index)
    return index


def _refuse_another(recipe: Recipe, store: Path) -> None:
    """Tokens are gone on with only for the recipe that began them."""
    path = store / "tokens" / "recipe.json"
    if path.exists() and read_json(path) != _identity(recipe):
        raise UserError(f"{store} holds tokens of another recipe (its text, tokens, model or seed differ); choose "
                        "another --out or delete the folder")


def _identity(recipe: Recipe) -> dict[str, str]:
    return {"tokens_hash": recipe.tokens_hash()}


def _sequences(mixture: Mixture, chunker: Chunker, tokenizer: Tokenizer,
               sources: list[str]) -> Iterator[tuple[Sequence, dict[str, Any]]]:
    """Every sequence, with the mixture's state after the last document that the chunker took in."""
    documents = _with_state(mixture)
    state = mixture.state_dict()
    while sequence := chunker.cut():  # what waited when packing was stopped may be enough for some
        yield sequence, state
    while chunker.tokens < chunker.count and (group := list(itertools.islice(documents, DOCUMENTS_AT_ONCE))):
        encoded = tokenizer.encode([document.text for document, _ in group])
        for (document, document_state), token_ids in zip(group, encoded, strict=True):
            chunker.add(token_ids, sources.index(document.source))
            state = document_state
            while sequence := chunker.cut():
                yield sequence, state
    while sequence := chunker.cut(last=True):
        yield sequence, mixture.state_dict()


def _with_state(mixture: Mixture) -> Iterator[tuple[Document, dict[str, Any]]]:
    for document in mixture:
        yield document, mixture.state_dict()


def _segment(sequences: list[Sequence], recipe: Recipe) -> tuple[TokenSegment, int]:
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
