"""The version of the model to use when collection continues, or begins beside another split or part."""

from pathlib import Path

from olmoscope.activations.store.format import read_manifest
from olmoscope.activations.store.identity import is_of
from olmoscope.model_source import at_revision, pinned
from olmoscope.recipe.store import Model, StoreRecipe


def model_of_store(recipe: StoreRecipe, store: Path) -> Model:
    """The recipe's model at the commit with which this store, or another store beside it, was begun; at the current
    commit if there is none. So two versions of the model cannot be mixed if its branch on the hub moves.

    Raises:
        UserError: a manifest is damaged, or the hub and its cache do not have the model.
    """
    for path in (store / "manifest.json", *sorted(store.parent.glob("*/manifest.json"))):
        if path.exists() and is_of(recipe, path.parent, found := read_manifest(path.parent)):
            return at_revision(recipe.model, found.model.revision)
    return pinned(recipe.model)
