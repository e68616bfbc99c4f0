"""Which recipe's tokens a folder holds: tokens/recipe.json.

    {"tokens_hash": "84682330d71db1d5", "wanted": {"train": 300000, "held_out": 40000}}

`wanted`, the numbers of tokens asked for, may grow: a recipe is compared at the numbers in the file (`as_packed`).
Older files have only the hash.
"""

from pathlib import Path
from typing import TypeVar

from olmoscope.errors import UserError
from olmoscope.files import read_json, write_json
from olmoscope.recipe.kept import differs_from_tokens
from olmoscope.recipe.store import COUNT_KEYS, SPLITS, Split, TokensRecipe, Wanted

AnyRecipe = TypeVar("AnyRecipe", bound=TokensRecipe)


def identity_path(store: Path) -> Path:
    """Where the file is."""
    return store / "tokens" / "recipe.json"


def wanted_of(store: Path, recipe: TokensRecipe) -> Wanted:
    """How many tokens of each split the recipe of these tokens asked for: as recorded; else as many as each split's
    index says; else as the given recipe says.

    Raises:
        UserError: a file is damaged.
    """
    path = identity_path(store)
    if path.exists() and "wanted" in (begun := read_json(path)):
        return dict(begun["wanted"])
    wanted = recipe.wanted
    for split in SPLITS if store.name in SPLITS else ():
        index = store.with_name(split) / "tokens" / "index.json"
        if index.exists():
            wanted = wanted | {split: read_json(index)["wanted"]}
    return wanted


def as_packed(recipe: AnyRecipe, store: Path) -> AnyRecipe:
    """The recipe with as many tokens of each split as the recipe of these tokens asked for.

    Raises:
        UserError: a file is damaged.
    """
    return recipe.with_wanted(wanted_of(store, recipe))


def write_identity(recipe: TokensRecipe, store: Path) -> None:
    """Record which recipe these tokens belong to."""
    write_json(identity_path(store), {"tokens_hash": recipe.tokens_hash(), "wanted": recipe.wanted})


def keep_wanted(recipe: TokensRecipe, store: Path) -> None:
    """Record `wanted` in a file that is too old to have it, so that the other split may grow.

    Args:
        recipe: the recipe; `refuse_other_tokens` must have accepted it.
    """
    path = identity_path(store)
    if path.exists() and "wanted" not in read_json(path):
        write_identity(as_packed(recipe, store), store)


def refuse_other_tokens(recipe: TokensRecipe, split: Split, store: Path) -> None:
    """Refuse to continue packing for another recipe than the one that began it; it may now ask for more tokens.

    Raises:
        UserError: the tokens belong to another recipe, or are more than the recipe asks for.
    """
    path = identity_path(store)
    if not path.exists():
        return
    begun, taken = read_json(path), as_packed(recipe, store)
    if taken.tokens_hash() != begun["tokens_hash"]:
        differing = differs_from_tokens(store, recipe, lambda kept: kept.tokens_hash() == begun["tokens_hash"])
        what = differing or " (its text, tokens, model or seed differ)"
        raise UserError(f"{store} holds tokens of another recipe{what}; choose another --out, or delete the folder to "
                        "start again")
    refuse_fewer(store, split, taken, recipe)


def refuse_fewer(store: Path, split: Split, there: TokensRecipe, recipe: TokensRecipe) -> None:
    """Refuse a recipe that asks for fewer tokens than there are: tokens are added, never removed.

    Raises:
        UserError: the recipe asks for fewer tokens than there are.
    """
    had, asked = there.wanted[split], recipe.wanted[split]
    if asked < had:
        key = COUNT_KEYS[split]
        raise UserError(f"{store} holds the store of another recipe: tokens.{key} is {had} there, {asked} here; a "
                        f"store can grow, not shrink: set tokens.{key}={had}, or choose another --out")
