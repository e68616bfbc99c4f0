"""Settings as trees of mappings: one laid over another, and what differs between two."""

import json
from collections.abc import Iterator
from typing import Any

MOST_NAMED = 3
"""Differences that a message names; of more it gives the keys only."""
MOST_SAID = 80
"""Characters of a value in a message."""


SHORT = {"layers": ("sites",), "sites": ("layers",), "layer": ("site", "reads"), "site": ("layer", "reads"),
         "reads": ("layer", "site")}
"""Keys that say the same in other words: who sets one replaces the others."""


def merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """A tree with another laid over it: mappings are merged key by key, anything else replaces what stood there."""
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
    """Each value of a tree with the path of its key, `auxiliary.weight`. A list of mappings is gone through as well,
    by number; an empty mapping is a value."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Which values differ between two trees: the key's path, the value of the first, the value of the second; `not
    given` where a tree does not have the key."""
    one, other = dict(leaves(there)), dict(leaves(here))
    return [(key, _said(one, key), _said(other, key)) for key in dict.fromkeys([*one, *other])
            if key not in one or key not in other or one[key] != other[key]]


def what_differs(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The differences of two trees for a message: `train.lr is 0.001 there, 0.002 here; ...`. Empty without any."""
    found = differences(there, here)
    named = "; ".join(f"{key} is {old} there, {new} here" for key, old, new in found[:MOST_NAMED])
    rest = [key for key, _, _ in found[MOST_NAMED:]]
    return named + (f" (and {', '.join(rest)})" if rest else "")


def _said(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return "not given"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= MOST_SAID else f"{text[:MOST_SAID - 1]}…"
