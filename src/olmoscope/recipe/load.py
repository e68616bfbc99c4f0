"""Recipes from YAML: forms, changes from the command line, and mistakes named by the path of their key.

A recipe file may hold `forms`: named overlays on the recipe (`--form reference`). An overlay's mappings are merged key
by key; any other value replaces the recipe's. `--set train.lr=1e-3` comes last. Then each entry of `saes` that has
lists in place of single values becomes the runs of its grid (study.py).
"""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from olmoscope.errors import UserError
from olmoscope.recipe.mistakes import first_mistake
from olmoscope.recipe.schema import Recipe
from olmoscope.recipe.study import spread_out
from olmoscope.recipe.tree import SHORT, merge

Overrides = Sequence[str] | Mapping[str, Any]
"""Changes to a recipe: `key.path=value` strings, whose values are YAML, or values by key path."""


def find_recipe(recipe: str | Path | Recipe, out: str | Path | None = None, form: str | None = None,
                overrides: Overrides = ()) -> tuple[Recipe, Path]:
    """A recipe, and the folder that everything made from it goes into.

    Args:
        recipe: a YAML file, the name of a recipe in the package, an output folder, or a recipe itself.
        out: the output folder; by default the one given as `recipe`, else one named after the recipe.
        form, overrides: as in `load_recipe`.

    Raises:
        UserError: see `load_recipe`; or a folder has no recipe.yaml, or is that of a single run.
    """
    if not isinstance(recipe, Recipe) and (folder := Path(recipe)).is_dir():
        if not (folder / "recipe.yaml").is_file():
            raise UserError(f"{folder} has no recipe.yaml, so it is not an output folder; give one that `olmoscope "
                            "collect` or `olmoscope train` wrote")
        if out is None and (whole := _output_folder_of_run(folder)) is not None:
            raise UserError(f"{folder} is the folder of one run; give its output folder, {whole}")
        return load_recipe(str(folder / "recipe.yaml"), form, overrides), Path(out or folder)
    found = load_recipe(recipe if isinstance(recipe, Recipe) else str(recipe), form, overrides)
    return found, Path(out or (found.name if found.form == "default" else f"{found.name}-{found.form}"))


def _output_folder_of_run(folder: Path) -> Path | None:
    """The output folder whose run is in this folder; None if the folder is not that of a run."""
    if not (folder / "done.json").is_file() and not (folder / "checkpoints").is_dir():
        return None
    return next((above.parent for above in folder.absolute().parents if above.name == "runs"), None)


def load_recipe(recipe: str | Recipe, form: str | None = None, overrides: Overrides = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: a YAML file, the name of a recipe in the package (`tiny`, `smollm2`, `olmo3-7b-think`), or a recipe that
            was read before.
        form: an overlay of the file's `forms`; `default` is the recipe without one. By default, the form that the file
            names, as a resolved recipe does, else `default`.
        overrides: `["train.lr=1e-3"]` or `{"train.lr": 1e-3}`.

    Raises:
        UserError: there is no such recipe or form, the file is not YAML, a key is unknown, a type is wrong, or parts
            disagree.
    """
    where, tree = (f"recipe {recipe.name}", recipe.model_dump(mode="json")) if isinstance(recipe, Recipe) else (
        _read_tree(recipe))
    forms = tree.pop("forms", None) or {}
    own = tree.get("form", "default")
    if form not in (None, own):
        if form not in forms:
            raise UserError(f"{where} has no form {form!r}; it has: {', '.join([own, *forms])}")
        tree = merge(tree, forms[form])
        tree["form"] = form
    if isinstance(overrides, str):
        raise UserError(f"overrides are a list of key.path=value, or values by key; {overrides!r} is a single string")
    for path, value in overrides.items() if isinstance(overrides, Mapping) else map(_parsed, overrides):
        _override(tree, path, value)
    try:
        tree, entries = spread_out(tree)
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_of_entry(first_mistake(error), entries)}") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _of_entry(mistake: str, entries: list[int]) -> str:
    """A mistake, named by the entry of `saes` in the file and not by the run that a grid made from it."""
    return re.sub(r"^saes\.(\d+)", lambda match: f"saes.{entries[int(match[1])]}", mistake)


def _read_tree(name_or_path: str) -> tuple[str, dict[str, Any]]:
    where, text = _read(name_or_path)
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{where} is not a recipe: its top level must be a mapping of keys")
    return where, tree


def _read(name_or_path: str) -> tuple[str, str]:
    path = Path(name_or_path)
    if path.is_file():
        try:
            return str(path), path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    packaged = resources.files("olmoscope") / "recipes" / f"{name_or_path}.yaml"
    if packaged.is_file():
        return f"recipe {name_or_path}", packaged.read_text(encoding="utf-8")
    names = sorted(entry.name.removesuffix(".yaml") for entry in (resources.files("olmoscope") / "recipes").iterdir())
    raise UserError(f"no recipe {name_or_path!r}: neither a file or folder nor one of the package's "
                    f"({', '.join(names)}); give one of these, or the path of a YAML file or an output folder")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text; people who write a learning rate mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"))


def _parsed(override: str) -> tuple[str, Any]:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override!r} is not of the form key.path=value")
    try:
        return path, yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not YAML: {' '.join(str(error).split())}") from error


def _override(tree: dict[str, Any], path: str, value: Any) -> None:
    node: Any = tree
    *parents, last = path.split(".")
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        for other in SHORT.get(last, ()) if isinstance(node, dict) else ():
            node.pop(other, None)
        node[int(last) if isinstance(node, list) else last] = value
    except (IndexError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--set {path}={value}: there is no key {path} to set") from error


def made_live(recipe: Recipe) -> Recipe:
    """The same recipe, trained straight from the model.

    Raises:
        UserError: the recipe asks for something that a live stream cannot do.
    """
    tree = recipe.model_dump(mode="json")
    tree["train"]["live"] = {}
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"--live: {first_mistake(error)}") from error
