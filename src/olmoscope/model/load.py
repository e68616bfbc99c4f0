"""Load a causal LM up to the deepest layer needed: nothing above it is loaded, and no LM head is kept."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from olmoscope.errors import UserError
from olmoscope.model.config import check_config, read_config, width_and_depth
from olmoscope.model.cut import config_to_load
from olmoscope.model.dtype import settle_model
from olmoscope.model.layers import find_layers
from olmoscope.model.positions import most_positions
from olmoscope.model.probe import Probe, probe
from olmoscope.model.sites import Sites, find_sites
from olmoscope.model.weights import read_weights
from olmoscope.model_source import base_of, pinned, revision_of
from olmoscope.recipe.schema import Model
from olmoscope.site import Site, SiteModule, deepest


@dataclass(frozen=True)
class LoadedModel:
    """A decoder cut off above a layer (or whole, if it cannot be cut), and facts about the model it was cut from."""

    name: str
    module: nn.Module
    layers: nn.ModuleList
    """The layers up to the deepest one needed."""
    revision: str
    architecture: str
    d_model: int
    num_layers: int
    """The number of layers of the whole model."""
    layers_path: str
    """Path of the layers in the whole causal LM, e.g. `model.layers`."""
    vocabulary: int
    """The number of rows of the embedding."""
    probe: Probe
    sites: Sites
    """The requested sites."""
    base: str | None = None
    """The base model, if this is an adapter, else None."""

    def module_of(self, site: Site) -> SiteModule:
        """The module of the whole causal LM that one of the sites is at."""
        place = self.sites.places[site]
        number = max(site.layer, 0)  # `embed` is the input of layer 0
        name = next(name for name, module in self.layers[number].named_modules() if module is place.module)
        return SiteModule(".".join(filter(None, (self.layers_path, str(number), name))),
                          "output" if place.kind == "output" else "input", place.scale)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


def load_model(model: Model, sites: Sequence[Site], device: torch.device) -> LoadedModel:
    """Load the layers up to the last site for inference, and test what is assumed of them.

    Raises:
        UserError: the model or some of its weights cannot be found, there is no such layer or site, the width or depth
            is not the recipe's, the model is not causal, or its layers do not output rows.
    """
    model = pinned(settle_model(model, device))
    config = read_config(model)
    last = deepest(sites)
    check_config(config, model, last)
    architecture = (config.architectures or [type(config).__name__])[0]
    d_model, num_layers = width_and_depth(config, model)
    cut = config_to_load(model, config, last)
    causal = read_weights(model, cut)
    path, layers = find_layers(causal, cut.get_text_config().num_hidden_layers)
    vocabulary = causal.get_input_embeddings().num_embeddings
    module = causal.base_model.to(device)
    if device.type == "cuda":
        # cuDNN's attention makes a new plan for each shape, which takes a third of a second, and batch shapes differ.
        torch.backends.cuda.enable_cudnn_sdp(False)
    layers = layers[: last + 1]
    found = probe(module, layers, model.name, d_model, vocabulary, most_positions(config))
    places = find_sites(module, layers, sites, model.name, d_model, vocabulary, model.modules)
    if model.compile:
        compile_layers(layers, device, places)
    return LoadedModel(model.name, module, layers, revision_of(model), architecture, d_model, num_layers, path,
                       vocabulary, found, places, None if (base := base_of(model)) is None else base.name)


def compile_layers(layers: nn.ModuleList, device: torch.device, sites: Sites) -> None:
    """Compile layer by layer: hooks stay outside, equal layers share their code, and so do batches of all shapes.

    Raises:
        UserError: there is no compiler, or a site is inside a layer, so its hook would be inside compiled code.
    """
    if inner := [site for site in sites.places if not site.is_layer_output]:
        raise UserError(f"model.compile: whole layers are compiled, and {inner[0]} is inside one; set "
                        "model.compile=false, or use residual streams only (layers.L)")
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise UserError("model.compile: torch.compile needs a C++ compiler on a CPU, and there is none here; install "
                        "one (g++) or set model.compile=false")
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def pick_device(wanted: str, local_index: int = 0) -> torch.device:
    """The device of a recipe: `auto` takes a GPU if there is one.

    Args:
        local_index: the number of this process among several on this machine; they divide the GPUs among themselves.

    Raises:
        UserError: the recipe says cuda, and there is no CUDA device.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no CUDA device here; use device: cpu or auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        return torch.device("cuda", local_index % torch.cuda.device_count())
    return torch.device(wanted)
