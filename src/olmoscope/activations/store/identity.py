"""Which recipe a store belongs to. What may grow (its sites and the tokens of its splits) is taken from the store."""

from pathlib import Path
from typing import TypeVar

from olmoscope.activations.store.format import Manifest
from olmoscope.recipe.store import StoreRecipe
from olmoscope.tokens.identity import as_packed

AnyRecipe = TypeVar("AnyRecipe", bound=StoreRecipe)


def as_collected(recipe: AnyRecipe, store: Path, manifest: Manifest) -> AnyRecipe:
    """The recipe with the store's model and sites, and with as many tokens of each split as the store's recipe asked
    for.

    Args:
        recipe: the recipe of all parts, or of this one.

    Raises:
        UserError: a file is damaged.
    """
    there = as_packed(recipe, store) if manifest.wanted is None else recipe.with_wanted(manifest.wanted)
    if manifest.of is None or manifest.of in recipe.models:
        there = there.of_model(manifest.of or "")
    return there.with_sites(list(manifest.sites))


def is_of(recipe: StoreRecipe, store: Path, manifest: Manifest) -> bool:
    """Whether a store belongs to a recipe, apart from what may grow."""
    return as_collected(recipe, store, manifest).store_hash() == manifest.recipe_hash
