"""A small random model of every causal LM family of the installed transformers, for architectures.py and its test.

A family is a key of transformers' mapping of causal LMs, such as `llama`. Its config is made with sizes by attribute
name (`SIZES`), the same in every family and in the parts of a multimodal wrapper; `EXCEPTIONS` has what a family needs
in addition, `LEFT_OUT` the families that cannot be made, with the reason.
"""

import dataclasses
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from small_model_sizes import ALWAYS, EXCEPTIONS, LAYER_PATHS, SIZES

LAYERS = 4
TOKENIZER = resources.files("olmoscope") / "model" / "tiny"
"""The tokenizer of the model in the package has 4096 tokens; token 0 ends a document."""


def families() -> list[str]:
    """All families of the installed transformers, one for each config class."""
    return sorted({CONFIG_MAPPING[name].model_type for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})


def make_model(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a small random model of a family in float32, with a tokenizer.

    Args:
        folder: the folder to create.

    Raises:
        Exception: whatever transformers raises for a family that cannot be made (`LEFT_OUT`).
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = small_config(family)
    module = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1 and name.endswith(("weight", "bias")):  # norms without effect would hide faults
                parameter += 0.1 * torch.randn_like(parameter)
    module.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(TOKENIZER / file), folder / file)
    return folder


def layers_path(family: str) -> str:
    """The path of the decoder layers in a causal LM of a family."""
    return LAYER_PATHS.get(family, "model.layers")


def small_config(family: str) -> Any:
    """The config of a small model of a family."""
    return _small(CONFIG_MAPPING[family])


def _small(config_class: Any) -> Any:
    exceptions = EXCEPTIONS.get(config_class.model_type, {})
    arguments = _sizes(config_class)
    for name, part in config_class.sub_configs_defaults.items():
        if name not in exceptions:  # the parts of multimodal models have standard configs
            arguments[name] = _small(CONFIG_MAPPING[part.model_type] if part.config_class is AutoConfig
                                     else part.config_class)
    return config_class(**_with_all_kinds(config_class, arguments | exceptions))


def _sizes(config_class: Any) -> dict[str, Any]:
    """Sizes for the fields of a config whose default is not None: None mostly means that a part is left out."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    sizes = {name: value for name, value in SIZES.items() if name in fields and fields[name].default is not None}
    sizes |= {name: value for name, value in ALWAYS.items() if name in fields}
    if "num_key_value_heads" in fields:  # in some families it equals the number of heads
        heads = fields["num_attention_heads"].default if "num_attention_heads" in fields else None
        sizes["num_key_value_heads"] = 4 if fields["num_key_value_heads"].default == heads else 2
    optional = {name for name, field in fields.items() if "None" in str(field.type)}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name in fields:
            sizes[name] = {"eos_token_id": 0, "pad_token_id": 1}.get(name, None if name in optional else 2)
    return sizes


def _with_all_kinds(config_class: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that give one layer of every kind in a full-size model, if the config lists kinds."""
    names = {field.name for field in dataclasses.fields(config_class)}
    for name in ("layer_types", "mlp_layer_types"):
        if name in names and name not in arguments:
            kinds = list(dict.fromkeys(getattr(config_class(), name) or []))
            if len(kinds) > 1:
                arguments[name] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
    return arguments
