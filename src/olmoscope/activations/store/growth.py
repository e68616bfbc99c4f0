"""A store grows by parts: sites that a recipe names later are collected into a separate folder, beside the first.

    OUT/store/train        tokens, and the sites that were collected first
    OUT/store/train-2      sites that came later, and a copy of the tokens (13 bytes each)
    OUT/store/train-3      sites of another model that reads the same tokens (a recipe's `models`)

Each part is a whole store, which any reader of stores can read alone. All have the same tokens in the same order: row i
of a segment is the same token in each. reader.py reads them as one.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmoscope.activations.store.format import read_manifest
from olmoscope.errors import UserError
from olmoscope.files import atomic_path, read_json
from olmoscope.recipe.store import StoreRecipe
from olmoscope.tokens.identity import identity_path
from olmoscope.tokens.pack import reopen
from olmoscope.tokens.segments import segment_name, token_checksum


def parts_of(store: Path) -> list[Path]:
    """The first part, whether it exists or not, and the parts that were begun later."""
    parts = [store]
    while (later := _part(store, len(parts) + 1)).is_dir():
        parts.append(later)
    return parts


def _part(store: Path, number: int) -> Path:
    return store.with_name(f"{store.name}-{number}")


@dataclass(frozen=True)
class Part:
    """A part of a store, which exists or is to be made."""

    folder: Path
    of: str
    """The recipe's name for its model; empty for the recipe's own model."""
    recipe: StoreRecipe
    """The recipe with the part's own model and sites."""


def parts_for(recipe: StoreRecipe, store: Path) -> Iterator[Part]:
    """The parts that make a store hold all sites of a recipe; the first is for the recipe's own model.

    Raises:
        UserError: a manifest is damaged.
    """
    missing = recipe.activations.sites

    def part(folder: Path) -> Part:
        """The next part to make, with all missing sites of one model."""
        nonlocal missing
        of = missing[0].model
        made = Part(folder, of, recipe.with_sites(missing).of_model(of))
        missing = [site for site in missing if site.model != of]
        return made

    for folder in parts_of(store):
        if (folder / "manifest.json").exists():
            found = read_manifest(folder)
            of = found.of or ""
            if of and of not in recipe.models:
                continue  # it belongs to another recipe over the same tokens, and stays as it is
            missing = [site for site in missing if site.model != of or site.of("") not in found.sites]
            yield Part(folder, of, recipe.of_model(of).with_sites(list(found.sites)))
        elif missing:  # the folder has no activations yet
            yield part(folder)
    while missing:
        yield part(_part(store, len(parts_of(store)) + 1))


def copy_tokens(first: Path, part: Path) -> dict[str, Any]:
    """Give a part the tokens of the first part; it keeps those that it already has.

    Returns:
        The index.

    Raises:
        UserError: the first part's tokens are gone or damaged.
    """
    index = dict(read_json(first / "tokens" / "index.json"))
    there = part / "tokens" / "index.json"
    if there.exists() and read_json(there) != index:  # the first part has grown
        reopen(part)
    if not there.exists():
        _copy(identity_path(first), identity_path(part))
        for segment in range(len(index["rows"])):
            _copy(first / "tokens" / segment_name(segment), part / "tokens" / segment_name(segment))
            _copy(token_checksum(first, segment), token_checksum(part, segment))
        _copy(first / "tokens" / "index.json", there)
    return index


def _copy(source: Path, target: Path) -> None:
    if not source.exists():
        raise UserError(f"{source} is missing; run `olmoscope store repair` on {source.parents[1]}, then collect again")
    if not target.exists() or target.read_bytes() != source.read_bytes():
        with atomic_path(target) as path:
            shutil.copyfile(source, path)
