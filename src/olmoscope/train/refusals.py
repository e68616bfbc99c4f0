"""Errors that stop training before it begins: a folder or a store belongs to something else."""

from pathlib import Path

from olmoscope.activations.store.format import read_manifest
from olmoscope.activations.store.identity import as_collected, is_of
from olmoscope.activations.store.reader import Store
from olmoscope.errors import UserError
from olmoscope.files import read_json
from olmoscope.recipe.kept import differs_from_run, differs_from_store, same_run
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import CoderConfig, Recipe


def refuse_other_run(recipe: Recipe, sae: CoderConfig, run: Path) -> None:
    """Refuse a folder of another run, whether that run is finished or not.

    Raises:
        UserError: the folder holds another run.
    """
    if (run / "recipe.yaml").exists():
        before = load_recipe(str(run / "recipe.yaml"))
        if not same_run(before, recipe, sae.id):
            raise UserError(f"{run} holds a different run of {sae.id}{differs_from_run(run, sae.id, recipe)}; choose "
                            "another --out, give the run another name, or delete the folder to train again")
        wanted = next(before.run_hash(other) for other in before.saes if other.id == sae.id)
        if (run / "done.json").exists() and read_json(run / "done.json")["run_hash"] != wanted:
            raise UserError(f"{run} holds a different finished run of {sae.id} than its recipe.yaml says; choose "
                            "another --out, or delete the folder to train again")


def refuse_other_store(recipe: Recipe, sae: CoderConfig, store: Store) -> None:
    """Refuse a store of another recipe. It may have more sites than the recipe, and fewer held-out tokens beside it.

    Raises:
        UserError: the store comes from another model or recipe, lacks a site, or has another number of tokens.
    """
    wanted, found = recipe.model, store.manifest
    if (wanted.name, wanted.d_model or found.model.d_model) != (found.model.name, found.model.d_model):
        raise UserError(f"{store.path} holds activations of {found.model.name} (d_model {found.model.d_model}), but "
                        f"the recipe is for {wanted.name} (d_model {wanted.d_model}); collect again into another --out")
    first = read_manifest(store.path)
    if not is_of(recipe, store.path, first):
        differing = differs_from_store(store.path, recipe, lambda kept: is_of(kept, store.path, first),
                                       lambda of: as_collected(of, store.path, first))
        what = differing or (f" (hash {found.recipe_hash}, this one's is {recipe.store_hash()}): its text, tokens, "
                             "model revision or seed differ")
        raise UserError(f"{store.path} was collected with another recipe{what}; change the recipe to match "
                        "it, or collect again into another --out")
    had, asked = as_collected(recipe, store.path, first).wanted["train"], recipe.wanted["train"]
    if had != asked:
        more = ", or run `olmoscope collect` with this recipe, which adds what is missing" if had < asked else ""
        raise UserError(f"{store.path} was collected with another recipe: tokens.count is {had} there, {asked} here; "
                        f"set tokens.count={had}{more}")
    for site in recipe.sites_for(sae):
        if site not in found.sites:
            raise UserError(f"{store.path} has no rows of {site} (it has {', '.join(map(str, found.sites))}); run "
                            "`olmoscope collect` with this recipe: it adds what is missing")
