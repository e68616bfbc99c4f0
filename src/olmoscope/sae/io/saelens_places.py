"""Which activations an SAE in SAELens' format reads: hook names to sites and back, and what training left out."""

import re
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.recipe.schema import Bos
from olmoscope.site import Site

_MODULE = re.compile(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)")
"""How transformers' models call their layers; a hook there is one on what the layer puts out."""


def hook_names(layers_path: str, site: Site) -> dict[str, str]:
    """A site as TransformerLens and, where it is a module's output, as the Hugging Face model name it.

    Args:
        layers_path: where the model keeps its layers, e.g. `model.layers`.
    """
    module = {"hf_hook_name": f"{layers_path}.{site.layer}"} if site.is_layer_output else {}
    return {"hook_name": site.transformer_lens} | module


def site_read(metadata: dict[str, Any], site: Site | None, config: Path) -> Site:
    """The site that an SAE reads.

    Args:
        site: stands in for what the SAE does not say, and does not overrule what it says.
        config: the file that the metadata is of.

    Raises:
        UserError: it says none, no site that is known, two, or another than `site`.
    """
    names = [str(metadata[key]) for key in ("hook_name", "hf_hook_name") if metadata.get(key) is not None]
    if not names:
        if site is None:
            raise UserError(f"{config} does not say which site the SAE reads (metadata.hook_name); give --site")
        return site
    said = _site_of_hook(names[0], config)
    other = _MODULE.fullmatch(names[-1])
    if other is not None and Site(int(other[1])) != said:
        raise UserError(f"{config}: hook_name {names[0]!r} and hf_hook_name {names[-1]!r} are different places: which "
                        "one is right?")
    refuse_other_site(config, site, said)
    return said


def refuse_other_site(where: Path, site: Site | None, said: Site) -> None:
    """`--site` never overrules an SAE.

    Raises:
        UserError: they differ.
    """
    if site not in (None, said):
        raise UserError(f"--site {site}: {where} says that this SAE reads {said}; leave --site out")


def begins_with_bos(metadata: dict[str, Any], config: Path) -> Bos:
    """What the metadata says of BOS.

    Raises:
        UserError: neither yes nor no.
    """
    said = metadata.get("prepend_bos")
    if said is not None and not isinstance(said, bool):
        raise UserError(f"{config}: prepend_bos must be true or false, not {said!r}")
    return "auto" if said is None else "yes" if said else "no"


def unread(metadata: dict[str, Any]) -> str | None:
    """What SAELens' training left out: special tokens, and positions outside a Python slice."""
    left_out = ["special tokens"] if metadata.get("exclude_special_tokens") else []
    positions = metadata.get("seqpos_slice")
    if isinstance(positions, list) and any(value not in (None, usual) for value, usual in zip(
            [None, *positions] if len(positions) == 1 else positions, (0, None, 1), strict=False)):
        left_out.append(f"positions outside {positions}")
    return " and ".join(left_out) or None


def _site_of_hook(hook: str, config: Path) -> Site:
    module = _MODULE.fullmatch(hook)
    site = Site(int(module[1])) if module else Site.of_transformer_lens(hook)
    if site is None:
        raise UserError(f"{config}: hook_name {hook!r} is no site that is known here (blocks.L.hook_resid_post, "
                        "blocks.L.hook_mlp_out, ...)")
    return site
