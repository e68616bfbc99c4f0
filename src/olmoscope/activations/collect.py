"""Collection: token segments through the model, residual stream to disk.

    recipe -> tokens/ (packed once) -> for each segment: forward passes -> layer_NN/, rows/, checksums/

A segment that exists is never made again; a killed run goes on with the first one missing.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.format import (
    Manifest,
    ModelIdentity,
    SourceCount,
    has_segment,
    read_manifest,
    write_manifest,
    write_segment,
)
from olmoscope.activations.forward import forward
from olmoscope.errors import UserError
from olmoscope.files import clean_temporary, locked
from olmoscope.model.load import LoadedModel, load_model, pick_device
from olmoscope.progress import bar
from olmoscope.provenance import provenance
from olmoscope.recipe import Recipe
from olmoscope.tokens.pack import pack
from olmoscope.tokens.segments import TokenSegment, read_token_segment
from olmoscope.tokens.tokenizer import Tokenizer, load_tokenizer
from olmoscope.units import format_bytes

Split = Literal["train", "held_out"]
BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Collected:
    """What `collect` did."""

    store: Path
    manifest: Manifest
    segments_made: int
    """0 if everything was there already."""
    wanted: int
    """Tokens the recipe asks for; the text may have held fewer."""
    padding: float
    """Share of computed tokens that were padding."""


def collect(recipe: Recipe, split: Split, store: Path) -> Collected:
    """Fill an activation store; what is there already is kept.

    Raises:
        UserError: the folder holds another recipe's store, is being filled by another process or does not fit on
            the disk; the model or text cannot be had; an activation is not finite.
    """
    refuse_another(store, recipe)
    with locked(store, "collecting"):
        clean_temporary(store)
        tokenizer = load_tokenizer(recipe.model)
        index = pack(recipe, tokenizer, split, store)
        rows, padding = sum(index["rows"]), 1 - sum(index["rows"]) / index["padded"]
        missing = [segment for segment in range(len(index["rows"])) if not has_segment(store, segment)]
        if not missing and (store / "manifest.json").exists() and read_manifest(store).finished:
            return Collected(store, read_manifest(store), 0, index["wanted"], padding)

        model = load_model(recipe.model, recipe.activations.layers[-1], pick_device(recipe.device))
        manifest = make_manifest(recipe, split, model, tokenizer, index)
        refuse_other_model(store, manifest)
        _refuse_full_disk(store, recipe, model.d_model, sum(index["rows"][segment] for segment in missing))
        write_manifest(store, manifest)
        done = rows - sum(index["rows"][segment] for segment in missing)
        with bar(f"activations ({split})", rows, "tokens", done=done) as advance:
            for segment in missing:
                tokens = read_token_segment(store, segment)
                activations = {layer: torch.empty(tokens.rows, model.d_model,
                                                  dtype=getattr(torch, recipe.activations.dtype))
                               for layer in recipe.activations.layers}
                for part, outputs in forward(model, tokens, recipe):
                    for layer, output_RD in outputs.items():
                        activations[layer][part] = output_RD.to("cpu", activations[layer].dtype)
                    advance(part.stop - part.start)
                refuse_not_finite(activations, tokens)
                write_segment(store, segment, recipe.seed, activations, _rows(tokens))
        manifest = manifest.model_copy(update={"finished": True})
        write_manifest(store, manifest)
        return Collected(store, manifest, len(missing), index["wanted"], padding)


def _rows(tokens: TokenSegment) -> dict[str, Tensor]:
    """What each row is: its token, its sequence, its place in the sequence, its source."""
    lengths = np.diff(tokens.sequence_starts)
    return {"token_id": torch.from_numpy(tokens.token_ids),
            "sequence": torch.from_numpy(np.repeat(tokens.sequence_numbers, lengths).astype(np.int32)),
            "position": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)),
            "source": torch.from_numpy(tokens.sources)}


def make_manifest(recipe: Recipe, split: Split, model: LoadedModel, tokenizer: Tokenizer,
                  index: dict[str, Any]) -> Manifest:
    """What a store of this recipe is, still unfinished."""
    identity = ModelIdentity(name=recipe.model.name, revision=model.revision, architecture=model.architecture,
                             d_model=model.d_model, num_layers=model.num_layers, layers_path=model.layers_path)
    sources = {name: SourceCount(documents=counts["documents"], tokens=counts["tokens"])
               for name, counts in index["sources"].items()}
    return Manifest(model=identity, tokenizer_hash=tokenizer.hash(), special_token_ids=tokenizer.special_ids(),
                    recipe_hash=recipe.store_hash(), split=split,
                    layers=recipe.activations.layers, dtype=recipe.activations.dtype, segments=len(index["rows"]),
                    rows=sum(index["rows"]), sources=sources, finished=False, provenance=provenance())


def refuse_another(store: Path, recipe: Recipe) -> None:
    """A folder serves one recipe; checked before anything heavy is loaded."""
    if (store / "manifest.json").exists():
        found = read_manifest(store)
        if found.recipe_hash != recipe.store_hash():
            raise UserError(f"{store} holds the store of another recipe (model {found.model.name}, layers "
                            f"{found.layers}); choose another --out or delete the folder")


def refuse_other_model(store: Path, wanted: Manifest) -> None:
    """A folder serves one revision of the model."""
    if (store / "manifest.json").exists():
        found = read_manifest(store)
        if (found.model, found.tokenizer_hash) != (wanted.model, wanted.tokenizer_hash):
            raise UserError(f"{store} was begun with {found.model.name} at revision {found.model.revision}, now it "
                            f"is {wanted.model.revision}: set model.revision, or choose another --out")


def _refuse_full_disk(store: Path, recipe: Recipe, d_model: int, rows: int) -> None:
    needed = rows * d_model * BYTES[recipe.activations.dtype] * len(recipe.activations.layers)
    free = shutil.disk_usage(store).free
    if needed > free:
        raise UserError(f"{store} needs {format_bytes(needed)} more, the disk has {format_bytes(free)} free; make "
                        "room, choose another --out, or lower tokens.count")


def refuse_not_finite(activations: dict[int, Tensor], tokens: TokenSegment) -> None:
    """NaN and infinity in activations `[rows, d_model]` are named by sequence and token."""
    for layer, rows_RD in activations.items():
        finite_R = rows_RD.isfinite().all(dim=1)
        if not finite_R.all():
            row = int(torch.argmin(finite_R.int()))
            sequence = int(np.searchsorted(tokens.sequence_starts, row, side="right")) - 1
            raise UserError(f"layer {layer} gave NaN or infinite activations ({int((~finite_R).sum())} of "
                            f"{len(finite_R)} rows; first: sequence {tokens.sequence_numbers[sequence]}, token "
                            f"{row - tokens.sequence_starts[sequence]}); try model.dtype=float32")
