"""Where a Hugging Face causal LM keeps its decoder layers."""

from torch import nn

from olmoscope.errors import UserError


def find_layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers: the only list of `count` modules that is not itself inside a layer.

    The text decoder is searched first, then the whole model: a vision tower may have as many blocks. If there are
    several lists, the least nested one is taken, if it is unique; a forward pass shows whether it is the decoder
    (probe.py).

    Args:
        model: a model, with or without its LM head.
        count: how many decoder layers it has.

    Returns:
        The path of the list inside `model` (e.g. `layers`, `h`), and the list.

    Raises:
        UserError: there is no such list, or several.
    """
    from transformers import PreTrainedModel

    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    found: list[tuple[str, nn.ModuleList]] = []
    for root in (decoder, model):
        if isinstance(root, nn.Module):
            inside = {id(module) for module in root.modules()}
            found = [(name, module) for name, module in _lists(model, count) if id(module) in inside]
            found.sort(key=lambda one: one[0].count("."))
            if len(found) == 1 or (found and found[0][0].count(".") < found[1][0].count(".")):
                return found[0]
    names = ", ".join(name for name, _ in found) or "none"
    raise UserError(f"cannot tell which modules of {type(model).__name__} are its {count} decoder layers (lists of "
                    f"that length: {names}); olmoscope needs a decoder-only model with one list of layers")


def _lists(model: nn.Module, count: int) -> list[tuple[str, nn.ModuleList]]:
    """All lists of `count` modules that are not inside an element of another list (`layers.0.experts`)."""
    return [(name, module) for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
            and not any(part.isdigit() for part in name.split("."))]
