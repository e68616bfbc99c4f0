"""Which activations an SAE in SAELens' format reads and writes: hook names to sites and back, and what training left
out."""

import re
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.recipe.schema import Bos
from olmoscope.sae.io.reading import refuse_other_site
from olmoscope.site import Site, SiteModule, module_by_layer

_MODULE = re.compile(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)(?:\.(input|output))?")
"""Names of the layers in transformers' models; unless stated otherwise, a hook there is on the layer's output."""

_LAYER = re.compile(r"blocks\.(\d+)\.")

INPUT = ".input"
"""Suffix of a module's name if its input is meant, as in SAELens' own names for Gemma Scope 2."""


def hook_names(layers_path: str, site: Site, module: SiteModule | None = None, *, out: bool = False) -> dict[str, Any]:
    """The names of a site in TransformerLens and in the Hugging Face model, under SAELens' keys.

    A module's name alone means its output. `hf_hook_scale`, our own key, is there if the site is the output times a
    number.

    Args:
        layers_path: where the model keeps its layers, e.g. `model.layers`.
        module: the module at which the site is; None: it follows from `layers_path`.
        out: whether this is the site that a transcoder writes, which has keys of its own.
    """
    module = module or module_by_layer(layers_path, site)
    names: dict[str, Any] = {"hook_name": site.transformer_lens}
    if module is not None:
        names["hf_hook_name"] = module.path + (INPUT if module.end == "input" else "")
        if module.scale != 1:
            names["hf_hook_scale"] = module.scale
    return {f"{key}_out": value for key, value in names.items()} if out else names


def is_transcoder(architecture: str, metadata: dict[str, Any]) -> bool:
    """Whether it writes another place than it reads: by its architecture, or because there is a `hook_name_out`, as in
    SAELens."""
    if architecture.endswith("transcoder"):
        return True
    return any(metadata.get(f"{key}_out") not in (None, metadata.get(key)) for key in ("hook_name", "hf_hook_name"))


def ends(metadata: dict[str, Any], transcoder: bool, site: Site | None,
         config: Path) -> tuple[Site | None, Site | None]:
    """The site that an SAE or transcoder reads, and the one that it writes; None for one that is not stated.

    Args:
        site: the site that it writes, if the metadata do not state it.
        config: the file with the metadata.

    Raises:
        UserError: a site is unknown, or has two names that differ; `site` contradicts the metadata.
    """
    reads = _said(metadata, "", config)
    if not transcoder:
        if reads is not None:
            refuse_other_site(config, site, reads)
        return reads or site, reads or site
    writes = _said(metadata, "_out", config)
    if writes is not None:
        refuse_other_site(config, site, writes, "writes")
    return reads, writes or site


def refuse_unstated(reads: Site | None, writes: Site | None, transcoder: bool, config: Path) -> tuple[Site, Site]:
    """Both sites; refuses an unknown one.

    Raises:
        UserError: one is not stated.
    """
    if reads is None and not transcoder:
        raise UserError(f"{config} does not say which site the SAE reads (metadata.hook_name); give --site")
    if reads is None:
        raise UserError(f"{config} does not say which site the transcoder reads: write it there (metadata.hook_name, "
                        "e.g. blocks.7.mlp.hook_in)")
    if writes is None:
        raise UserError(f"{config} does not say which site the transcoder writes (metadata.hook_name_out); give --site")
    return reads, writes


def begins_with_bos(metadata: dict[str, Any], config: Path) -> Bos:
    """What the metadata says about BOS.

    Raises:
        UserError: the value is neither true nor false.
    """
    said = metadata.get("prepend_bos")
    if said is not None and not isinstance(said, bool):
        raise UserError(f"{config}: prepend_bos must be true or false, not {said!r}")
    return "auto" if said is None else "yes" if said else "no"


def unread(metadata: dict[str, Any]) -> str | None:
    """The tokens that SAELens' training left out: special tokens, and positions outside a Python slice."""
    left_out = ["special tokens"] if metadata.get("exclude_special_tokens") else []
    positions = metadata.get("seqpos_slice")
    if isinstance(positions, list) and any(value not in (None, usual) for value, usual in zip(
            [None, *positions] if len(positions) == 1 else positions, (0, None, 1), strict=False)):
        left_out.append(f"positions outside {positions}")
    return " and ".join(left_out) or None


def _said(metadata: dict[str, Any], suffix: str, config: Path) -> Site | None:
    """The site that the metadata states for one end; None if it states none.

    Args:
        suffix: `_out` for the site that a transcoder writes.
    """
    keys = [f"{key}{suffix}" for key in ("hook_name", "hf_hook_name")]
    names = {key: str(metadata[key]) for key in keys if metadata.get(key) is not None}
    if not names:
        return None
    layer, key = metadata.get(f"hook_layer{suffix}"), next(iter(names))
    hook = names[key].replace("{layer}", str(layer)) if layer is not None else names[key]
    said = _of_module(hook) or Site.of_transformer_lens(hook)
    if said is None:
        raise UserError(f"{config}: {key} {hook!r} is not a known site (blocks.L.hook_resid_post, "
                        "blocks.L.hook_mlp_out, ...)")
    block = _LAYER.match(hook)
    if layer is not None and block is not None and block[1] != str(layer):
        raise UserError(f"{config}: {key} {hook!r} and hook_layer{suffix} {layer!r} are different layers; correct the "
                        "wrong one")
    module = names.get(f"hf_hook_name{suffix}", "")
    if _of_module(module) not in (None, said):
        raise UserError(f"{config}: hook_name{suffix} {hook!r} and hf_hook_name{suffix} {module!r} are different "
                        "places; correct the wrong one")
    return said


def _of_module(name: str) -> Site | None:
    """The site that a whole layer's name means; None for other modules."""
    found = _MODULE.fullmatch(name)
    return found and Site(int(found[1]) - (found[2] == "input"))
