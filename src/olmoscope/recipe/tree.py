"""Settings as trees of mappings: merging one into another, and the differences between two."""

import json
from collections.abc import Iterator
from typing import Any

MOST_NAMED = 3
"""How many differences a message names in full; it gives only the keys of the rest."""
MOST_SAID = 80
"""The most characters of a value in a message."""

SHORT = {"layers": ("sites",), "sites": ("layers",), "layer": ("site", "reads"), "site": ("layer", "reads"),
         "reads": ("layer", "site")}
"""Keys with the same meaning: setting one replaces the others."""


def merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """A tree with another merged into it: mappings are merged key by key, any other value replaces the old one."""
    merged = dict(base)
    for key, value in overlay.items():
        for other in SHORT.get(key, ()):
            merged.pop(other, None)
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of a tree with the path of its key, such as `auxiliary.weight`. A list of mappings is traversed too,
    by number; an empty mapping counts as a value."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The values that differ between two trees: the key's path, the first tree's value, the second tree's value; `not
    given` if a tree does not have the key."""
    one, other = dict(leaves(there)), dict(leaves(here))
    return [(key, _said(one, key), _said(other, key)) for key in dict.fromkeys([*one, *other])
            if key not in one or key not in other or one[key] != other[key]]


def what_differs(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The differences between two trees, for a message: `train.lr is 0.001 there, 0.002 here; ...`. Empty if none."""
    found = differences(there, here)
    named = "; ".join(f"{key} is {old} there, {new} here" for key, old, new in found[:MOST_NAMED])
    rest = [key for key, _, _ in found[MOST_NAMED:]]
    return named + (f" (and {', '.join(rest)})" if rest else "")


def _said(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return "not given"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= MOST_SAID else f"{text[:MOST_SAID - 1]}…"
