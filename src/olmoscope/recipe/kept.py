"""The resolved recipe that a folder keeps, for messages that say what differs from what is wanted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import Recipe
from olmoscope.recipe.tree import what_differs


def differs_from_store(store: Path, recipe: Recipe, is_of: Callable[[Recipe], bool]) -> str:
    """What a store (or its tokens) is of and a recipe wants otherwise: `: KEY is A there, B here`; empty where nothing
    beside the store says it.

    Args:
        store: OUT/store/SPLIT, where OUT/recipe.yaml is.
        is_of: whether what is in the store was made by the recipe that is kept beside it.
    """
    if store.absolute().parent.name != "store":
        return ""
    return _differs(store.absolute().parents[1] / "recipe.yaml", is_of, recipe, Recipe.store_identity)


def differs_from_run(run: Path, sae_id: str, recipe: Recipe) -> str:
    """The same of a run folder and the SAE of this id: what decides its weights."""

    def identity(of: Recipe) -> dict[str, Any]:
        sae = next((sae for sae in of.saes if sae.id == sae_id), None)
        return of.store_identity() | ({} if sae is None else of.run_identity(sae))

    return _differs(run / "recipe.yaml", lambda kept: True, recipe, identity)


def _differs(path: Path, is_of: Callable[[Recipe], bool], recipe: Recipe,
             identity: Callable[[Recipe], dict[str, Any]]) -> str:
    if not path.is_file():
        return ""
    try:
        kept = load_recipe(str(path))
    except UserError:  # a message about something else: whoever needs that recipe says what is wrong with it
        return ""
    if kept.model.dtype == "auto" or not is_of(kept):
        return ""
    found = what_differs(identity(kept), identity(recipe))
    return f": {found}" if found else ""
