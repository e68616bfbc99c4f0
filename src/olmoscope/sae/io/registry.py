"""SAELens' registry of published dictionaries: its YAML file, read without importing SAELens, a release at a time.

    saelens:RELEASE/ID    an entry of it
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import yaml

from olmoscope.errors import UserError, did_you_mean
from olmoscope.sae.io.registered import Registered

PREFIX = "saelens:"
FILE = "sae_lens/pretrained_saes.yaml"

_RELEASE = re.compile(r"^(?P<name>[^\s#:][^\n:]*):[ \t]*\n(?P<body>(?:[ \t-].*\n|\n)*)", re.MULTILINE)
"""A release begins at the start of a line; its lines are indented, or items of its list."""


def registered(address: str) -> Registered:
    """The entry that `saelens:RELEASE/ID` names.

    Raises:
        UserError: SAELens is not installed, or its registry has no such release or id.
    """
    release, _, name = address.removeprefix(PREFIX).partition("/")
    entry = read_release(release)
    saes = {str(sae["id"]): sae for sae in entry["saes"]}
    if name not in saes:
        few = ", ".join(list(saes)[:3])
        raise UserError(f"{address}: release {release} has {len(saes)} dictionaries, but none is called {name!r}"
                        f"{did_you_mean(name, saes) or f' (they are called {few}, ...)'}")
    return _entry(release, entry, saes[name])


def in_release(address: str) -> list[str]:
    """The addresses of all dictionaries in `saelens:RELEASE`.

    Raises:
        UserError: SAELens is not installed, or its registry has no such release.
    """
    release = address.removeprefix(PREFIX)
    return [f"{PREFIX}{release}/{sae['id']}" for sae in read_release(release)["saes"]]


def entries() -> Iterator[Registered]:
    """All entries of the registry.

    Raises:
        UserError: SAELens is not installed.
    """
    for release, entry in _parsed("".join(f"{name}:\n{body}" for name, body in releases().items())).items():
        for sae in entry["saes"]:
            yield _entry(release, entry, sae)


def read_release(release: str) -> Mapping[str, Any]:
    """What the registry says about one release.

    Raises:
        UserError: SAELens is not installed, or its registry has no such release.
    """
    if release not in (found := releases()):
        raise UserError(f"{PREFIX}{release}: SAELens' registry has no release {release!r}"
                        f"{did_you_mean(release, found) or f'; its {len(found)} releases are listed in {_file()}'}")
    entry: Mapping[str, Any] = _parsed(f"{release}:\n{releases()[release]}")[release]
    return entry


@cache
def releases() -> dict[str, str]:
    """The text of each release in the YAML file, by its name.

    Raises:
        UserError: SAELens is not installed.
    """
    return {found["name"]: found["body"] for found in _RELEASE.finditer(_file().read_text(encoding="utf-8") + "\n")}


def _file() -> Path:
    try:
        path = Path(str(distribution("sae-lens").locate_file(FILE)))
    except PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise UserError(f"{PREFIX}RELEASE/ID is looked up in SAELens' registry, which is part of its package: pip "
                        "install olmoscope[saelens], or give the SAE's address on the hub, OWNER/NAME:PATH")
    return path


def _parsed(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return loaded


def _entry(release: str, entry: Mapping[str, Any], sae: Mapping[str, Any]) -> Registered:
    loader = entry.get("conversion_func")
    return Registered(release, str(sae["id"]), entry["repo_id"], _path(loader, str(sae["path"])), entry["model"],
                      loader, sae.get("norm_scaling_factor"), sae.get("l0"), sae.get("variance_explained"),
                      entry.get("config_overrides") or {})


def _path(loader: str | None, path: str) -> str:
    """The path in the repository; the registry does not name the files of cross-layer transcoders."""
    if loader == "mntss_clt_layer_transcoder":
        return f"W_enc_{path}.safetensors"
    return f"{path}.safetensors" if loader == "gemma_3" and "clt" in path else path

