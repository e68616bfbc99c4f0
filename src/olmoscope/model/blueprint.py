"""A model that takes no memory: its modules and the shapes of its parameters, from the config alone."""

import copy
from typing import Any

import torch


def blueprint(config: Any) -> Any:
    """The causal LM of a config, on the meta device.

    Args:
        config: a config of transformers; it is not changed.

    Raises:
        ValueError: transformers has no causal LM for such a config.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))
