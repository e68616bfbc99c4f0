"""A model's weights, loaded the same way for every stage."""

from typing import Any

import torch

from olmoscope.errors import UserError
from olmoscope.model.merge import adapter_to_merge, merge_adapter
from olmoscope.model_source import base_of, loading, locate, naming_base
from olmoscope.recipe.schema import Model


def read_weights(model: Model, config: Any) -> Any:
    """Load a causal LM of transformers for inference, on the CPU; an adapter is merged into its base.

    This always loads the whole class, with its head: the bare model of some architectures has parts (a pooler, an
    encoder) that a causal LM's checkpoint lacks.

    `model.attention: sdpa` leaves the choice to transformers, which takes sdpa if the architecture has it, else its
    plain attention.

    Args:
        config: as `AutoConfig` gives it, or cut off; for an adapter, the whole config of its base.

    Raises:
        UserError: the model cannot be found or read, or weights are missing.
    """
    if (base := base_of(model)) is not None:
        folder = adapter_to_merge(model)
        with naming_base(model, base):
            causal = read_weights(base, config)
        return merge_adapter(causal, model, folder).eval().requires_grad_(False)

    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    attention = None if model.attention == "sdpa" else model.attention
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would list every weight of the layers that we leave out
    logging.disable_progress_bar()
    try:
        with loading(model):
            module, info = AutoModelForCausalLM.from_pretrained(
                **locate(model), config=config, dtype=getattr(torch, model.dtype), attn_implementation=attention,
                use_safetensors=True, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"model {model.name!r} lacks weights: {missing[0]} and {len(missing) - 1} more; its files do "
                        "not fit its config.json, or belong to a model without its LM head")
    return module.eval().requires_grad_(False)
