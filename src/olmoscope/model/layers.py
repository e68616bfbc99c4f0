"""Where a Hugging Face causal LM keeps its decoder layers."""

from torch import nn

from olmoscope.errors import UserError


def find_layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers: the only list of `count` modules that is not itself inside a layer.

    Args:
        model: a model, with or without its LM head.
        count: how many decoder layers it has.

    Returns:
        The path of the list inside `model` (e.g. `layers`, `h`), and the list.

    Raises:
        UserError: no such list, or several.
    """
    found = [(name, module) for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) == count and not _inside_a_layer(name)]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise UserError(f"cannot tell which modules of {type(model).__name__} are its {count} decoder layers (lists of "
                        f"that length: {names}); olmoscope needs a decoder-only model with one list of layers")
    return found[0]


def _inside_a_layer(name: str) -> bool:
    """Whether a module sits inside an element of another list (`layers.0.experts`)."""
    return any(part.isdigit() for part in name.split("."))
