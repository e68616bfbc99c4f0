"""Whether stores match their output folder: they belong to its recipe, and all to the same model and revision."""

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
    """What disagrees: the path of the manifest (or of the tokens' recipe), and a description of the disagreement.

    Manifests that cannot be read are skipped: verification of their store reports them.
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
        tokens_hash = None  # verification of the store reports what is wrong with it
    if tokens_hash is not None and (wanted := as_packed(recipe, store).tokens_hash()) != tokens_hash:
        yield tokens, f"belongs to another recipe (hash {tokens_hash}) than {path} ({wanted})"
    if manifest is None or (manifest.of is not None and manifest.of not in recipe.models):
        return  # a part with a model that the recipe no longer reads
    if not is_of(recipe, store, manifest):
        yield store / "manifest.json", (f"belongs to another recipe (hash {manifest.recipe_hash}) than {path} "
                                        f"({as_collected(recipe, store, manifest).store_hash()})")
    revision = revision_here(recipe.model_of(manifest.of or ""))
    if revision is not None and PAIR.fullmatch(manifest.model.revision) and not PAIR.fullmatch(revision):
        return  # an adapter on the hub that is not in this cache: the revision of its base is unknown
    if revision is not None and revision != manifest.model.revision:
        yield store / "manifest.json", (f"was made with {manifest.model.name} at revision {manifest.model.revision}, "
                                        f"but the recipe's model is {revision}")


def _readable(store: Path) -> Manifest | None:
    try:
        return read_manifest(store)
    except UserError:
        return None


def _short(manifest: Manifest, key: str) -> str:
    return f"{manifest.model.name} at {manifest.model.revision}" if key == "model" else str(getattr(manifest, key))
