"""Which activations an SAE in SAELens' format reads: hook names to layers and back, and what training left out."""

import re
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.recipe.schema import Bos

_BLOCK = re.compile(r"blocks\.(\d+)\.hook_(resid_post|out|resid_pre)")
"""How TransformerLens calls the residual stream after or before a layer."""
_MODULE = re.compile(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)")
"""How transformers' models call their layers; a hook there is one on what the layer puts out."""


def hook_names(layers_path: str, layer: int) -> dict[str, str]:
    """The residual stream after a layer, as TransformerLens and as the Hugging Face model name it.

    Args:
        layers_path: where the model keeps its layers, e.g. `model.layers`.
    """
    return {"hook_name": f"blocks.{layer}.hook_resid_post", "hf_hook_name": f"{layers_path}.{layer}"}


def layer_read(metadata: dict[str, Any], layer: int | None, config: Path) -> int:
    """The layer whose output an SAE reads.

    Args:
        layer: stands in for what the SAE does not say, and does not overrule what it says.
        config: the file that the metadata is of.

    Raises:
        UserError: it says none, not the output of a layer, two, or another than `layer`.
    """
    names = [str(metadata[key]) for key in ("hook_name", "hf_hook_name") if metadata.get(key) is not None]
    if not names:
        if layer is None:
            raise UserError(f"{config} does not say which layer the SAE reads (metadata.hook_name); give --layer")
        return layer
    said = _layer_of_hook(names[0], config)
    other = _MODULE.fullmatch(names[-1])
    if other is not None and int(other[1]) != said:
        raise UserError(f"{config}: hook_name {names[0]!r} and hf_hook_name {names[-1]!r} are different places: which "
                        "one is right?")
    refuse_other_layer(config, layer, said)
    return said


def refuse_other_layer(where: Path, layer: int | None, said: int) -> None:
    """`--layer` never overrules an SAE.

    Raises:
        UserError: they differ.
    """
    if layer not in (None, said):
        raise UserError(f"--layer {layer}: {where} says that this SAE reads layer {said}; leave --layer out")


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


def _layer_of_hook(hook: str, config: Path) -> int:
    """TransformerLens' `resid_pre` of a layer is the output of the one before."""
    if module := _MODULE.fullmatch(hook):
        return int(module[1])
    block = _BLOCK.fullmatch(hook)
    before = int(block is not None and block[2] == "resid_pre")
    if block is None or int(block[1]) < before:
        raise UserError(f"{config}: hook_name {hook!r} is not the output of a decoder layer (blocks.L.hook_resid_post)")
    return int(block[1]) - before
