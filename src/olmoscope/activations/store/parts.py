"""A store grows by parts: sites that a recipe names later are collected into a folder of their own, beside the first.

    OUT/store/train        tokens, and the sites that were collected first
    OUT/store/train-2      sites that came later, and a copy of the tokens (13 bytes each)
    OUT/store/train-3      ...

Each part is a whole store, which any reader of stores can read alone. All are of the same tokens, in the same order:
row i of a segment is the same token in each. reader.py reads them as one.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmoscope.activations.store.format import read_manifest
from olmoscope.errors import UserError
from olmoscope.files import atomic_path, read_json
from olmoscope.recipe.schema import Recipe
from olmoscope.tokens.identity import identity_path
from olmoscope.tokens.pack import reopen
from olmoscope.tokens.segments import segment_name, token_checksum


def parts_of(store: Path) -> list[Path]:
    """The first part, there or not, and those that were begun later."""
    parts = [store]
    while (later := _part(store, len(parts) + 1)).is_dir():
        parts.append(later)
    return parts


def _part(store: Path, number: int) -> Path:
    return store.with_name(f"{store.name}-{number}")


def parts_for(recipe: Recipe, store: Path) -> Iterator[tuple[Recipe, Path]]:
    """What makes a store hold all sites of a recipe: for each part, old or new, a recipe of its sites.

    Raises:
        UserError: a manifest is damaged.
    """
    missing = recipe.activations.sites
    for part in parts_of(store):
        if (part / "manifest.json").exists():
            sites = list(read_manifest(part).sites)
            missing = [site for site in missing if site not in sites]
            yield recipe.with_sites(sites), part
        elif missing:  # begun, or not even that: nothing but its tokens
            yield recipe.with_sites(missing), part
            missing = []
    if missing:
        yield recipe.with_sites(missing), _part(store, len(parts_of(store)) + 1)


def copy_tokens(first: Path, part: Path) -> dict[str, Any]:
    """Give a part the tokens of the first one; those that it has already stay.

    Returns:
        The index.

    Raises:
        UserError: the first part's tokens are not there any more, or damaged.
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
