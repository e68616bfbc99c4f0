"""Collection: token segments through the model, activations to disk.

    recipe -> tokens/ (packed once) -> for each segment of this worker's share: forward passes -> the segment's files
           -> when all segments exist, whichever worker made them: statistics, manifest

A segment that exists is never made again; a killed run continues with the first missing segment. While the model reads
a segment, the previous one is being written.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor

from olmoscope.activations.collect.begun import model_of_store
from olmoscope.activations.collect.forget import forget_tail
from olmoscope.activations.collect.forward import batches, site_rows
from olmoscope.activations.collect.refusals import (
    refuse_another_store,
    refuse_full_disk,
    refuse_not_finite,
    refuse_overflow,
    refuse_unsafe_float16,
)
from olmoscope.activations.store.format import (
    Manifest,
    ModelIdentity,
    SourceCount,
    has_segment,
    norm_name,
    read_manifest,
    stored_order,
    write_manifest,
    write_segment,
)
from olmoscope.activations.store.gather import Buffer, SegmentRows
from olmoscope.activations.store.growth import copy_tokens
from olmoscope.activations.store.inspect import finished_segments
from olmoscope.activations.store.shares import Worker, claim_segment, manifest_locked, share_locked, tokens_locked
from olmoscope.activations.store.statistics import read_statistics, segment_sums, write_statistics
from olmoscope.activations.store.writer import Writer
from olmoscope.errors import UserError
from olmoscope.model.bound import bounds_of
from olmoscope.model.config import read_config
from olmoscope.model.load import LoadedModel, load_model, pick_device
from olmoscope.model.positions import check_context
from olmoscope.model_source import at_revision
from olmoscope.progress import bar, console
from olmoscope.provenance import provenance
from olmoscope.recipe.store import Bos, Model, Split, StoreRecipe
from olmoscope.site import Site
from olmoscope.tokens.pack import is_packed, pack
from olmoscope.tokens.segments import TokenSegment, read_token_segment
from olmoscope.tokens.tokenizer import Tokenizer, load_tokenizer

BUFFERS = 2
"""Segments in memory: one that is being filled, one that is being written."""


@dataclass(frozen=True)
class Collected:
    """What `collect` did."""

    store: Path
    manifest: Manifest
    segments_made: int
    """How many segments this call made; 0 if all existed already."""
    segments_missing: int
    """Positive if other workers have not yet made all of theirs."""
    wanted: int
    """Tokens that the recipe asks for; the text may have had fewer."""
    padding: float
    """The share of padding among the tokens that the model computed."""
    statistics: dict[str, Any] | None
    """statistics.json of a finished store, else None."""
    lost: dict[str, dict[str, int]]
    """For each source that lost anything: what its chats say but their texts do not, and in how many messages."""


def collect(recipe: StoreRecipe, split: Split, store: Path, worker: Worker = Worker(),  # noqa: B008 (frozen)
            load: Callable[[Model, Sequence[Site], torch.device], LoadedModel] = load_model,
            first: Path | None = None, of: str = "") -> Collected:
    """Fill an activation store, or a worker's share of it. What exists already is kept.

    Args:
        first: the first part of the store, which has the tokens, if `store` is a later part
            (activations/store/growth.py).
        of: the whole recipe's name for the model; empty if it is the model from which `first` was collected.
        load: returns the model, cut off above the sites; a caller that has a model already passes its own function.

    Raises:
        UserError: the folder holds another recipe's store, another process works on the same share, or the store does
            not fit on the disk; the model or text cannot be loaded; an activation is not finite, or too large for the
            store's dtype.
        KeyboardInterrupt: a signal stopped the run; finished segments are kept.
    """
    refuse_another_store(store, recipe)
    with share_locked(store, worker):
        wanted = model_of_store(recipe, store)
        tokenizer = ready_to_pack(recipe, wanted, split)
        if first is not None and of:
            tokenizer = tokenizer_of_first(first, tokenizer, recipe.tokens.bos, wanted.name)
        # Load it before anything is packed, so that a model that cannot be read is refused at once.
        model = None if is_packed(store) else _load(recipe, wanted, worker, load)
        with tokens_locked(store):
            forget_tail(recipe, split, store)
            index = pack(recipe, tokenizer, split, store, wanted) if first is None else copy_tokens(first, store)
        share = worker.ordered(_missing(store, index))
        made = 0
        if share or not (store / "manifest.json").exists():
            model = model or _load(recipe, wanted, worker, load)
            begin_store(store, recipe, make_manifest(recipe, split, model, tokenizer, index, of))
            rows = sum(index["rows"][segment] for segment in share)
            refuse_full_disk(store, recipe, model.sites.widths.values(), rows)
            made = _make_segments(recipe, split, store, model, index, share)
        _finish(store, index)
        manifest = read_manifest(store)
        return Collected(store, manifest, made, len(_missing(store, index)), index["wanted"],
                         1 - sum(index["rows"]) / index["padded"],
                         read_statistics(store) if manifest.finished else None,
                         {name: counts["lost"] for name, counts in index["sources"].items() if "lost" in counts})


def ready_to_pack(recipe: StoreRecipe, model: Model, split: Split) -> Tokenizer:
    """The model's tokenizer, after a check that the model accepts sequences of the recipe's lengths.

    Args:
        model: the recipe's model, at the commit of the store.

    Raises:
        UserError: the model does not accept them, or the tokenizer cannot be loaded.
    """
    longest = max(high for _, high in recipe.tokens.chunk_lengths)
    if (warning := check_context(read_config(model), longest, model.name)) and split == "train":
        console.print(f"[yellow]{escape(warning)}[/]", soft_wrap=True, highlight=False)
    return load_tokenizer(model, recipe.tokens.bos)


def tokenizer_of_first(first: Path, own: Tokenizer, bos: Bos, name: str) -> Tokenizer:
    """The tokenizer that made the tokens of a store's first part, for another model to read.

    Args:
        own: the other model's tokenizer.
        name: the other model's name.

    Raises:
        UserError: the other model has another vocabulary.
    """
    manifest = read_manifest(first)
    if own.hash() == manifest.tokenizer_hash:
        return own
    tokenizer = load_tokenizer(at_revision(Model(name=manifest.model.name), manifest.model.revision), bos)
    if own.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise UserError(f"{name} cannot read the tokens of {first}, which come from {manifest.model.name}: its "
                        "tokenizer has another vocabulary")
    return tokenizer


def _load(recipe: StoreRecipe, wanted: Model, worker: Worker,
          load: Callable[[Model, Sequence[Site], torch.device], LoadedModel]) -> LoadedModel:
    model = load(wanted, recipe.activations.sites, pick_device(recipe.device, worker.local_index))
    model.probe.refuse_leak(recipe.model.name, recipe.tokens.documents)
    return model


def _missing(store: Path, index: dict[str, Any]) -> list[int]:
    return [segment for segment in range(len(index["rows"])) if not has_segment(store, segment)]


def _make_segments(recipe: StoreRecipe, split: Split, store: Path, model: LoadedModel, index: dict[str, Any],
                   share: list[int]) -> int:
    """Make the segments of a share, except those that another process makes; return how many were made."""
    bounds = bounds_of(model)
    refuse_unsafe_float16(recipe, bounds)
    total, to_do = sum(index["rows"]), sum(index["rows"][segment] for segment in share)
    rows = SegmentRows(model.sites.widths, max(index["rows"]), recipe.activations.dtype, model.device)
    made = 0
    try:
        with bar(f"activations ({split})", total, "tokens", done=total - to_do) as advance, \
                contextlib.ExitStack() as claims, Writer([rows.buffer() for _ in range(BUFFERS)]) as writer:
            elsewhere = set(share)
            for segment in share:
                made_elsewhere = elsewhere & finished_segments(store)
                elsewhere -= made_elsewhere
                advance(sum(index["rows"][other] for other in made_elsewhere))
                claim = claim_segment(store, segment)
                if claim is None:
                    continue
                claims.enter_context(claim)
                elsewhere.discard(segment)
                tokens = read_token_segment(store, segment)
                order_R = stored_order(recipe.seed, segment, tokens.rows)
                places_R = torch.from_numpy(np.argsort(order_R)).to(model.device)
                buffer = writer.buffer()
                rows.start(buffer)
                for batch in batches(tokens, apart=recipe.tokens.documents == "apart"):
                    for site, output_BD in site_rows(model, recipe.activations.sites, batch.to(model.device)):
                        rows.add(site, places_R[batch.rows], output_BD)
                    advance(batch.rows.stop - batch.rows.start)
                    writer.check()
                rows.hand_over(tokens.rows)
                writer.write(buffer, partial(_write, store, segment, claim, buffer, tokens, order_R, bounds))
                made += 1
    except KeyboardInterrupt:
        console.print(f"stopped: {len(index['rows']) - len(_missing(store, index))} of {len(index['rows'])} segments "
                      f"of {store} are saved; run the same command again to continue")
        raise
    return made


def _write(store: Path, segment: int, claim: IO[bytes], buffer: Buffer, tokens: TokenSegment, order_R: np.ndarray,
           bounds: Mapping[Site, float], between: Callable[[], None]) -> None:
    """Check a filled buffer, write the segment, and release its claim; runs in the writer's thread."""
    with claim:
        buffer.wait()
        rows = {name: tensor[torch.from_numpy(order_R)] for name, tensor in _rows(tokens).items()}
        norms = {norm_name(site): filled.square_norm_R[: tokens.rows].sqrt()
                 for site, filled in buffer.sites.items()}
        files: dict[str, dict[str, Tensor]] = {}
        sums: dict[str, Tensor] = {}
        for site, filled in buffer.sites.items():
            refuse_not_finite(site, filled, tokens, order_R)
            refuse_overflow(site, filled)
            files[site.folder] = {name: tensor[: tokens.rows] for name, tensor in filled.stored.items()}
            sums |= segment_sums(site, filled, rows["position"], bounds.get(site))
        write_segment(store, segment, files | {"rows": rows | norms, "statistics": sums}, between)


def _rows(tokens: TokenSegment) -> dict[str, Tensor]:
    """Each row's token, sequence, position in the sequence, and source."""
    lengths = np.diff(tokens.sequence_starts)
    return {"token_id": torch.from_numpy(tokens.token_ids),
            "sequence": torch.from_numpy(np.repeat(tokens.sequence_numbers, lengths).astype(np.int32)),
            "position": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)),
            "source": torch.from_numpy(tokens.sources)}


def begin_store(store: Path, recipe: StoreRecipe, wanted: Manifest) -> None:
    """Write the manifest if there is none; otherwise check that it names the same model. So the first worker to arrive
    decides. If the store has grown, write its new size.

    Raises:
        UserError: the store was begun with another model, revision, tokenizer or `model.dtype`.
    """
    with manifest_locked(store):
        if not (store / "manifest.json").exists():
            write_manifest(store, wanted)
            return
        found = read_manifest(store)
        if (found.model, found.tokenizer_hash) != (wanted.model, wanted.tokenizer_hash):
            raise UserError(f"{store} was begun with {found.model.name} at revision {found.model.revision}, but now it "
                            f"is {wanted.model.revision}: set model.revision, or choose another --out")
        if found.model_dtype != wanted.model_dtype:
            raise UserError(f"{store} was begun with model.dtype={found.model_dtype}, but now it is "
                            f"{wanted.model_dtype}: set model.dtype={found.model_dtype}, or choose another --out")
        # A text may run out. Then a store that should have grown has the same rows as before, but asks for more.
        grown = found.wanted is not None and found.wanted[found.split] != recipe.wanted[found.split]
        if grown or found.rows != wanted.rows:
            write_manifest(store, found.model_copy(update={
                "recipe_hash": recipe.with_sites(list(found.sites)).store_hash(), "wanted": wanted.wanted,
                "segments": wanted.segments, "rows": wanted.rows, "sources": wanted.sources, "finished": False}))


def _finish(store: Path, index: dict[str, Any]) -> None:
    """Write the statistics and mark the store as finished, if all its segments exist."""
    if _missing(store, index):
        return
    with manifest_locked(store):
        manifest = read_manifest(store)
        if not manifest.finished or not (store / "statistics.json").exists():
            write_statistics(store, manifest)
            write_manifest(store, manifest.model_copy(update={"finished": True}))


def make_manifest(recipe: StoreRecipe, split: Split, model: LoadedModel, tokenizer: Tokenizer,
                  index: dict[str, Any], of: str = "") -> Manifest:
    """The manifest of an unfinished store of this recipe.

    Args:
        tokenizer: the tokenizer that made the tokens.
        of: as in `collect`.
    """
    assert recipe.model.dtype != "auto", "settle the recipe first (pipeline.py)"
    identity = ModelIdentity(name=recipe.model.name, revision=model.revision, architecture=model.architecture,
                             d_model=model.d_model, num_layers=model.num_layers, layers_path=model.layers_path,
                             base=model.base)
    sources = {name: SourceCount(documents=counts["documents"], tokens=counts["tokens"])
               for name, counts in index["sources"].items()}
    return Manifest(model=identity, tokenizer_hash=tokenizer.hash(), special_token_ids=tokenizer.special_ids(),
                    bos_token_ids=list(tokenizer.begin), recipe_hash=recipe.store_hash(), wanted=recipe.wanted,
                    split=split, of=of or None,
                    sites=list(model.sites.widths), widths=list(model.sites.widths.values()),
                    modules=[model.module_of(site) for site in model.sites.widths],
                    dtype=recipe.activations.dtype,
                    model_dtype=recipe.model.dtype, documents_apart=model.probe.documents_apart,
                    segments=len(index["rows"]), rows=sum(index["rows"]), sources=sources, finished=False,
                    provenance=provenance(dated=False))
