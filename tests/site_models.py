"""Small random models of many families, with the paths in their layers stated by hand, for tests of sites.

`PATHS` uses nothing from the package. Shapes: B sequences, T positions, D width of a site.
"""

import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from olmoscope.model.layers import find_layers
from olmoscope.model.splice import try_causal_lm
from olmoscope.site import PARTS, Site

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from small_models import small_config

D = 64
TOKENS_BT = torch.randint(10, 2000, (3, 20), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Paths:
    """Modules of a layer, stated by hand."""

    attention: str = "self_attn"
    attention_added: str = "self_attn"
    """The module whose output is added to the stream."""
    projection: str = "self_attn.o_proj"
    mid_reader: str | None = "post_attention_layernorm"
    """The module whose input is the stream after attention; None: attention and MLP are added at once."""
    mlp: str = "mlp"
    mlp_added: str = "mlp"
    scale: float = 1.0
    settings: dict[str, Any] | None = None


LLAMA = Paths()
OLMO = Paths(attention_added="post_attention_layernorm", mid_reader="mlp", mlp_added="post_feedforward_layernorm")
GEMMA = replace(OLMO, mid_reader="pre_feedforward_layernorm")
NEOX = Paths("attention", "attention", "attention.dense", None)
PATHS = {
    "olmo2": OLMO, "olmo3": OLMO, "olmoe": LLAMA, "llama": LLAMA, "mistral": LLAMA, "mixtral": LLAMA, "qwen2": LLAMA,
    "qwen3": LLAMA, "qwen3_moe": LLAMA, "phi3": LLAMA, "gemma2": GEMMA, "gemma3_text": GEMMA,
    "gpt2": Paths("attn", "attn", "attn.c_proj", "ln_2"),
    "granite": replace(LLAMA, scale=0.22, settings={"residual_multiplier": 0.22}),
    "minicpm3": replace(LLAMA, scale=0.7, settings={"scale_depth": 1.4}),  # of 4 layers: 1.4 / 2
    "gpt_neox": NEOX, "cohere": Paths(mid_reader=None), "phi": Paths(projection="self_attn.dense", mid_reader=None),
    "gptj": Paths("attn", "attn", "attn.out_proj", None),
    "falcon": Paths("self_attention", "self_attention", "self_attention.dense", None),  # adds in place
    "bloom": Paths("self_attention", "self_attention.dense", "self_attention.dense", "post_attention_layernorm", "mlp",
                   "mlp.dense_4h_to_h")}
SEQUENTIAL = [family for family, paths in PATHS.items() if paths.mid_reader]
PARALLEL = [family for family in PATHS if family not in SEQUENTIAL]
FAMILIES = pytest.mark.parametrize("family", PATHS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@functools.cache
def causal_lm(family, dtype=torch.float32):
    """A small random model of a family: 4 layers, width 64; its attention and MLP outputs are about as large as the
    stream."""
    torch.manual_seed(0)
    config = small_config(family)
    for name, value in (PATHS.get(family, LLAMA).settings or {}).items():
        setattr(config, name, value)
    module = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:  # norms and biases without effect would hide faults
                parameter += 0.1 * torch.randn_like(parameter)
    module = module.to(dtype)
    path, layers = find_layers(module, config.get_text_config().num_hidden_layers)
    return try_causal_lm(module, path, layers, family, "none", D, module.get_input_embeddings().num_embeddings)


def parts_of(family):
    return [part for part in PARTS if part != "mid" or PATHS[family].mid_reader]


def places_of(model, layer, parts):
    found = model.find([Site(layer, part) for part in parts])
    return [found.places[Site(layer, part)] for part in parts]


def by_hand(family, model, layer):
    """The rows in a layer, from the test's own hooks: `[B, T, D]` by part, and the layer's input as `x`."""
    paths, block, found, handles = PATHS[family], model.layers[layer], {}, []

    def given(part):
        def hook(module, arguments, settings):
            found[part] = (arguments[0] if arguments else settings["hidden_states"]).clone()
        return hook

    def gave(part):
        def hook(module, arguments, output):
            found[part] = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        return hook

    inputs = {"x": "", "attn.in": paths.attention, "attn.z": paths.projection, "mlp.in": paths.mlp}
    if paths.mid_reader:
        inputs["mid"] = paths.mid_reader
    outputs = {"attn.out": paths.attention_added, "mlp.out": paths.mlp_added, "": ""}
    for part, path in inputs.items():
        handles.append(block.get_submodule(path).register_forward_pre_hook(given(part), with_kwargs=True))
    for part, path in outputs.items():
        handles.append(block.get_submodule(path).register_forward_hook(gave(part)))
    with torch.no_grad():
        model.module(input_ids=TOKENS_BT, use_cache=False)
    for handle in handles:
        handle.remove()
    return found | {part: paths.scale * found[part] for part in ("attn.out", "mlp.out")}


def logits_of(model, ids=TOKENS_BT):
    with torch.no_grad():
        return model.module(input_ids=ids, use_cache=False).logits


def noise(like_BTD, seed=0):
    x_BTD = torch.randn(like_BTD.shape, generator=torch.Generator().manual_seed(seed))
    return (x_BTD * like_BTD.float().std()).to(like_BTD.dtype)


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.module.modules())


def close(found, wanted, dtype=torch.float32):
    """Equal up to the rounding of a sum."""
    allowed = 4 * torch.finfo(dtype).eps * wanted.double().norm(dim=-1)
    off = (found.double() - wanted.double()).norm(dim=-1)
    assert (off <= allowed).all(), float((off / allowed).max())
