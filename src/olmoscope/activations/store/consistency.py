"""Whether stores are what their output folder takes them for: of its recipe, and all of one model and revision."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from olmoscope.activations.store.format import Manifest, read_manifest
from olmoscope.activations.store.identity import as_collected, is_of
from olmoscope.activations.store.inspect import output_folder
from olmoscope.errors import UserError
from olmoscope.files import read_json
from olmoscope.model_adapter import PAIR
from olmoscope.model_source import revision_here
from olmoscope.recipe.load import load_recipe
from olmoscope.tokens.identity import as_packed


def disagreements(stores: list[Path]) -> Iterator[tuple[Path, str]]:
    """What does not agree: the manifest (or recipe of the tokens) in question, and with what.

    Manifests that cannot be read are passed over: verification of their store says so.
    """
    manifests = {store: manifest for store in stores if (manifest := _readable(store)) is not None}
    for (first, one), (second, other) in combinations(manifests.items(), 2):
        for key in ("model", "tokenizer_hash", "dtype") if one.of == other.of else ("tokenizer_hash", "dtype"):
            if getattr(one, key) != getattr(other, key):
                yield second / "manifest.json", (f"its {key} is {_short(other, key)}, that of {first.name} is "
                                                 f"{_short(one, key)}")
    for store in stores:
        out = output_folder(store)
        if out is not None and (out / "recipe.yaml").exists():
            yield from _against_recipe(out / "recipe.yaml", store, manifests.get(store))


def _against_recipe(path: Path, store: Path, manifest: Manifest | None) -> Iterator[tuple[Path, str]]:
    try:
        recipe = load_recipe(str(path))
    except UserError as error:
        yield store / "manifest.json", f"cannot be compared with the recipe: {error}"
        return
    tokens = store / "tokens" / "recipe.json"
    try:
        tokens_hash = read_json(tokens)["tokens_hash"]
    except (UserError, KeyError, TypeError):
        tokens_hash = None  # verification of the store says what is wrong with it
    if tokens_hash is not None and (wanted := as_packed(recipe, store).tokens_hash()) != tokens_hash:
        yield tokens, f"is of another recipe (hash {tokens_hash}) than {path} ({wanted})"
    if manifest is None or (manifest.of is not None and manifest.of not in recipe.models):
        return  # a part of a model that the recipe does not read any more
    if not is_of(recipe, store, manifest):
        yield store / "manifest.json", (f"is of another recipe (hash {manifest.recipe_hash}) than {path} "
                                        f"({as_collected(recipe, store, manifest).store_hash()})")
    revision = revision_here(recipe.model_of(manifest.of or ""))
    if revision is not None and PAIR.fullmatch(manifest.model.revision) and not PAIR.fullmatch(revision):
        return  # an adapter of the hub that is not in this cache: that of its base is not known
    if revision is not None and revision != manifest.model.revision:
        yield store / "manifest.json", (f"is of {manifest.model.name} at revision {manifest.model.revision}, the "
                                        f"recipe's model is {revision}")


def _readable(store: Path) -> Manifest | None:
    try:
        return read_manifest(store)
    except UserError:
        return None


def _short(manifest: Manifest, key: str) -> str:
    return f"{manifest.model.name} at {manifest.model.revision}" if key == "model" else str(getattr(manifest, key))
