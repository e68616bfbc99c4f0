"""A set of transcoders for circuit-tracer, one for each layer, and the pages of their features."""

from collections.abc import Sequence
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.features.feature_pages import write_pages
from olmoscope.features.format import FORMAT
from olmoscope.features.read import FeatureIndex
from olmoscope.files import read_json
from olmoscope.sae.io.circuit_tracer import CONFIG, config_of, write_config, write_layer
from olmoscope.sae.io.open import find_saes, open_sae
from olmoscope.sae.io.opened import Opened
from olmoscope.site import Site


def write_set(addresses: Sequence[str], folder: Path, site: Site | None = None) -> str:
    """Write transcoders, and the feature pages of the indexes that are given or are in the transcoders' runs.

    Args:
        addresses: of transcoders, of folders with transcoders, or of indexes.

    Returns:
        What was written, and what a set for circuit-tracer still needs.

    Raises:
        UserError: see `convert_set` of convert.py.
    """
    indexes = [Path(address) for address in addresses if is_index(Path(address))]
    saes = [sae for address in addresses if Path(address) not in indexes for sae in find_saes(address)]
    indexes += [path for sae in saes if is_index(path := Path(sae) / "index")]
    # Each one is checked and freed before the first is written, since a set may not fit into memory.
    layers = _checked(saes, folder, site)
    if layers:
        config = config_of(open_sae(saes[0], site), folder)
        (folder / CONFIG).unlink(missing_ok=True)  # written last: without it, the folder is not a set
        for earlier in folder.glob("layer_*.safetensors"):
            earlier.unlink()
        for sae in saes:
            write_layer(open_sae(sae, site), folder)
        write_config(folder, config)
    pages = write_pages([FeatureIndex(path) for path in indexes], folder) if indexes else 0
    said = [f"transcoders of {len(layers)} layers"] * bool(layers) + [f"pages of {pages:,} features"] * bool(pages)
    missing = sorted(set(range(max(layers) + 1)) - set(layers)) if layers else []
    if missing:
        said.append("circuit-tracer needs one for every layer, and there is none for layer "
                    + ", ".join(map(str, missing)))
    return "; ".join(said)


def is_index(folder: Path) -> bool:
    """Whether a folder is a feature index."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return False
    value = read_json(manifest)
    return isinstance(value, dict) and value.get("format") == FORMAT


def _checked(saes: Sequence[str], folder: Path, site: Site | None) -> list[int]:
    """The layers of a set's transcoders.

    Raises:
        UserError: they do not make a set.
    """
    layers, first, wanted = list[int](), "", dict[str, object]()
    for sae in saes:
        opened = open_sae(sae, site)
        found = _in_common(opened, folder)
        if not layers:
            first, wanted = opened.name, found
        if opened.site.layer in layers:
            raise UserError(f"{folder}: {opened.name} is another transcoder of layer {opened.site.layer}: a set has "
                            "one for each layer (choose with --only)")
        if different := [key for key in found | wanted if found.get(key) != wanted.get(key)]:
            key = different[0]
            raise UserError(f"{folder}: the transcoders of a set must agree in {key}; {first} has "
                            f"{wanted.get(key, 'none')}, {opened.name} has {found.get(key, 'none')}: leave one of them "
                            "out (--only chooses)")
        layers.append(opened.site.layer)
    return layers


def _in_common(opened: Opened, folder: Path) -> dict[str, object]:
    """What the transcoders of a set have in common."""
    return config_of(opened, folder) | {"width": opened.sae.d_in, "latents": opened.sae.d_sae}
