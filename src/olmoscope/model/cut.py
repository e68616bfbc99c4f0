"""A config of the beginning of a model, up to the deepest layer wanted: nothing above it is loaded or run.

A shortened config need not describe the beginning of the whole model: layers may share keys and values with later
layers, one matrix may hold the embeddings of all layers, a schedule may count from the end. So the whole and the cut
model are both built without memory (on the meta device) and compared; if they differ, nothing is cut.
"""

import copy
from typing import Any

from torch import nn

from olmoscope.model.blueprint import blueprint
from olmoscope.model.layers import find_layers
from olmoscope.model_source import base_of
from olmoscope.recipe.schema import Model

MISFITS = (NotImplementedError, ValueError)
"""What transformers raises about a config that is no longer consistent (all families of 5.23 were tried), and what
`find_layers` raises about its model."""


def cut_config(config: Any, deepest: int) -> Any:
    """A config of the model's layers 0 to `deepest`, at least two (some architectures divide by their depth − 1); the
    config itself if the model cannot be cut.

    Args:
        config: a config of transformers; it is not changed.
    """
    total = config.get_text_config().num_hidden_layers
    count = max(2, deepest + 1)
    if count >= total:
        return config
    try:
        whole = blueprint(config)
        path, layers = find_layers(whole, total)
    except (ImportError, *MISFITS):
        return config  # it cannot be built, cut or not: the code that loads it says why
    wanted = _description(whole, path, layers, count)
    for lists_too in (True, False):
        cut = copy.deepcopy(config)
        try:
            _shorten(cut.get_text_config(), count, lists_too)
            shorter = blueprint(cut)
            if _description(shorter, *find_layers(shorter, count), count) == wanted:
                return cut
        except MISFITS:
            continue
    return config


def config_to_load(model: Model, config: Any, deepest: int) -> Any:
    """The config of the part of a model to load: its beginning, if it can be cut. For an adapter, the whole base into
    which it is merged, since an adapter may change any layer, the embedding and the head."""
    return cut_config(config, deepest) if base_of(model) is None else config


def _shorten(text: Any, count: int, lists_too: bool) -> None:
    """Shorten a text config in place: its depth, and every list with an entry for each layer."""
    total = text.num_hidden_layers
    if lists_too:
        for name, value in list(vars(text).items()):
            if isinstance(value, list | tuple) and len(value) == total:
                setattr(text, name, value[:count])
    if text.num_hidden_layers != count:  # some configs count the entries of such a list
        text.num_hidden_layers = count


def _description(module: nn.Module, path: str, layers: nn.ModuleList, count: int) -> dict[str, Any]:
    """Shapes of the parameters outside the layers and in the first `count` layers, and the settings of those layers."""
    prefixes = tuple(f"{path}.{number}." for number in range(count, len(layers)))
    shapes: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()
                              if not name.startswith(prefixes)}
    for number in range(count):
        for name, part in layers[number].named_modules():
            for key, value in vars(part).items():
                if not key.startswith("_") and isinstance(value, str | int | float | tuple | type(None)):
                    shapes[f"{number}.{name}.{key}"] = value
    return shapes
