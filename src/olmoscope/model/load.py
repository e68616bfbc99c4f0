"""Load a causal LM up to the deepest layer needed: nothing above it, and no LM head, is loaded or run."""

import os
import shutil
from dataclasses import dataclass

import torch
from torch import nn

from olmoscope.errors import UserError
from olmoscope.model.config import check_config, cut_config, read_config
from olmoscope.model.dtype import settle_model
from olmoscope.model.layers import find_layers
from olmoscope.model_source import loading, locate, pinned, revision_of
from olmoscope.recipe import Model


@dataclass(frozen=True)
class LoadedModel:
    """A decoder cut off above a layer, and what it was cut from."""

    module: nn.Module
    layers: nn.ModuleList
    revision: str
    architecture: str
    d_model: int
    num_layers: int
    """Of the whole model."""
    layers_path: str
    """Path of the layers in the whole causal LM, e.g. `model.layers`."""

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


def load_model(model: Model, deepest: int, device: torch.device) -> LoadedModel:
    """Load layers 0 to `deepest` for inference.

    Raises:
        UserError: not to be found, weights missing, no such layer, or another width or depth than the recipe's.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    model = pinned(settle_model(model, device))
    config = read_config(model)
    check_config(config, model, deepest)
    revision = revision_of(model)
    architecture = (config.architectures or [type(config).__name__])[0]
    text_config = config.get_text_config()
    d_model, num_layers = text_config.hidden_size, text_config.num_hidden_layers
    cut_config(config, deepest)

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would list every weight of the layers that we leave out
    logging.disable_progress_bar()
    try:
        with loading(model):
            module, info = AutoModel.from_pretrained(**locate(model), config=config, dtype=getattr(torch, model.dtype),
                                                     attn_implementation=model.attention, use_safetensors=True,
                                                     output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"model {model.name!r} lacks weights: {missing[0]} and {len(missing) - 1} more; its files do "
                        "not fit its config.json")
    path, layers = find_layers(module, deepest + 1)
    prefix = module.base_model_prefix
    if model.compile:
        compile_layers(layers, device)
    if device.type == "cuda":
        # cuDNN's attention plans anew for each shape, which takes a third of a second, and no two batches are alike.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return LoadedModel(module.to(device).eval().requires_grad_(False), layers, revision, architecture, d_model,
                       num_layers, f"{prefix}.{path}" if prefix else path)


def compile_layers(layers: nn.ModuleList, device: torch.device) -> None:
    """Compile layer by layer: hooks stay outside, equal layers share their code, and so do batches of all shapes."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise UserError("model.compile: torch.compile needs a C++ compiler on a CPU, and there is none here; install "
                        "one (g++) or set model.compile=false")
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def pick_device(wanted: str, local_index: int = 0) -> torch.device:
    """The device of a recipe: `auto` takes a GPU where there is one.

    Args:
        local_index: which of several processes on this machine asks; they share the GPUs out among themselves.

    Raises:
        UserError: CUDA asked for and absent.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no CUDA device here; use device: cpu or auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        return torch.device("cuda", local_index % torch.cuda.device_count())
    return torch.device(wanted)
