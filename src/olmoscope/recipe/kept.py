"""The resolved recipe that a folder keeps, for messages that say how it differs from the recipe that is wanted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import Recipe
from olmoscope.recipe.store import StoreRecipe, TokensRecipe
from olmoscope.recipe.tree import what_differs


def differs_from_tokens(store: Path, recipe: TokensRecipe, is_of: Callable[[TokensRecipe], bool]) -> str:
    """How the recipe of a store's tokens differs from another recipe: `: KEY is A there, B here`; empty if no recipe
    beside the store tells.

    Args:
        store: OUT/store/SPLIT; the kept recipe is OUT/recipe.yaml.
        is_of: whether a recipe made the store's tokens; called with the kept recipe.
    """
    return _differs(_beside(store), is_of, recipe, lambda of: _fixed(of.tokens_identity()))


def differs_from_store(store: Path, recipe: StoreRecipe, is_of: Callable[[StoreRecipe], bool],
                       part: Callable[[StoreRecipe], StoreRecipe]) -> str:
    """The same for a store.

    Args:
        part: returns the part of a recipe that the store belongs to.
    """
    return _differs(_beside(store), is_of, recipe, lambda of: _fixed(part(of).store_identity()))


def differs_from_run(run: Path, sae_id: str, recipe: Recipe) -> str:
    """The same for a run folder and the SAE with this id: how what decides its weights differs."""

    def identity(of: Recipe) -> dict[str, Any]:
        sae = next((sae for sae in of.saes if sae.id == sae_id), None)
        return of.store_identity() if sae is None else of.alone(sae).store_identity() | of.run_identity(sae)

    return _differs(run / "recipe.yaml", lambda kept: True, recipe, identity)


def _beside(store: Path) -> Path | None:
    """The recipe of the output folder that a store belongs to."""
    return store.absolute().parents[1] / "recipe.yaml" if store.absolute().parent.name == "store" else None


def _fixed(identity: dict[str, Any]) -> dict[str, Any]:
    """What decides a store, without what may grow."""
    grows = {"activations": ("layers", "sites"), "tokens": ("count", "held_out")}
    return {key: {name: value for name, value in part.items() if name not in grows.get(key, ())}
            if isinstance(part, dict) else part for key, part in identity.items()}


def same_run(kept: Recipe, recipe: Recipe, sae_id: str) -> bool:
    """Whether two recipes both have an SAE with this id, and it has the same weights."""
    found = [[of.alone(sae).run_hash(sae) for sae in of.saes if sae.id == sae_id] for of in (kept, recipe)]
    return bool(found[0]) and found[0] == found[1]


def _differs(path: Path | None, is_of: Callable[[Any], bool], recipe: TokensRecipe,
             identity: Callable[[Any], dict[str, Any]]) -> str:
    if path is None or not path.is_file():
        return ""
    try:
        kept = load_recipe(str(path))
    except UserError:  # not what this message is about: the code that needs that recipe reports it
        return ""
    if kept.model.dtype == "auto" or not is_of(kept):
        return ""
    found = what_differs(identity(kept), identity(recipe))
    return f": {found}" if found else ""
