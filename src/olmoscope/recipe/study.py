"""Grids: an entry of `saes` with lists in place of single values becomes a run for each combination of their values.

    - {layer: 7, d_sae: 4096, k: [32, 64], train: {lr: [1e-3, 2e-3], seed: [0, 1, 2]}}

is 2 x 2 x 3 runs, such as `layer_07/width_4096/topk_32_raw_lr-1e-3_seed-1`. The name adds every varying key that is not
in it already; a list of one value counts as varying, so that adding a second value renames nothing. A key whose value
is itself a list (`reads`, `matryoshka`, `betas`) varies if it is a list of lists.
"""

from itertools import product
from typing import Any

from pydantic import ValidationError

from olmoscope.recipe.names import plain_text
from olmoscope.recipe.schema import CoderConfig

LISTS = ("matryoshka", "betas", "reads", "writes")
"""Keys whose single value is a list."""
IN_THE_ID = ("layer", "site", "reads", "writes", "skip", "d_sae", "k", "activation", "normalize", "weights")
"""Keys of an SAE that its `default_id` includes."""
Choice = tuple[tuple[str, ...], list[Any]]
"""A key's path, and the values in its list."""


def spread_out(tree: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """A recipe's tree with each entry of `saes` replaced by its runs.

    Returns:
        The tree, and for each run the number of the entry that it comes from.

    Raises:
        ValueError: a list is empty, a list has a value twice, or the recipe's own `train` has a list.
    """
    for path, _ in _choices(tree.get("train"), ()):
        raise ValueError(f"train.{'.'.join(path)}: a list spans a grid of runs only under an SAE: use saes.N.train."
                         f"{'.'.join(path)}")
    saes = tree.get("saes")
    if not isinstance(saes, list):
        return tree, []
    runs = [(number, run) for number, entry in enumerate(saes) for run in _runs(entry, f"saes.{number}")]
    return tree | {"saes": [run for _, run in runs]}, [number for number, _ in runs]


def _runs(entry: Any, where: str) -> list[Any]:
    """The runs of one entry; the alphabetically last key varies fastest."""
    choices = sorted(_choices(entry, ()), key=lambda choice: choice[0])  # names do not depend on the order of the file
    for path, values in choices:
        key = ".".join((where, *path))
        if not values:
            raise ValueError(f"{key}: an empty list gives no run; give a value, or leave the key out")
        said = [plain_text(value) for value in values]
        for text in said:
            if said.count(text) > 1:
                raise ValueError(f"{key}: {text} appears twice")
    if not choices:
        return [entry]
    return [_run(entry, dict(zip((path for path, _ in choices), values, strict=True)))
            for values in product(*(values for _, values in choices))]


def _run(entry: dict[str, Any], chosen: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    run: dict[str, Any] = _replaced(entry, chosen, ())
    given = run.get("name")
    labels = [f"{'.'.join(path[1:] if path[0] == 'train' else path)}-{plain_text(value)}"
              for path, value in chosen.items() if path != ("canonical",)
              and (given is not None or path[0] not in IN_THE_ID)]
    if labels and given is not None:
        run["name"] = "_".join([str(given), *labels])
    elif labels:
        try:
            sae = CoderConfig.model_validate({key: value for key, value in run.items() if key not in ("name", "train")})
        except ValidationError:
            return run  # the code that reads the whole recipe says what is wrong with it
        run["name"] = "_".join([sae.default_id, *labels])
    return run


def _choices(value: Any, path: tuple[str, ...]) -> list[Choice]:
    """The keys that have lists in place of single values."""
    if isinstance(value, dict):
        return [choice for key, inner in value.items() for choice in _choices(inner, (*path, str(key)))]
    if not isinstance(value, list) or not path:
        return []
    if path[-1] in LISTS and not (value and all(isinstance(item, list) for item in value)):
        return []
    return [(path, value)]


def _replaced(value: Any, chosen: dict[tuple[str, ...], Any], path: tuple[str, ...]) -> Any:
    if path in chosen:
        return chosen[path]
    if isinstance(value, dict):
        return {key: _replaced(inner, chosen, (*path, str(key))) for key, inner in value.items()}
    return value
