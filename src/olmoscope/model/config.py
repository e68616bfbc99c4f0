"""A model's config: read, and checked against the recipe."""

import contextlib
import urllib.error
import urllib.request
from typing import Any

from olmoscope.errors import UserError
from olmoscope.model_source import (
    base_of,
    is_local,
    loading,
    locate,
    naming_base,
    not_fetched,
    pinned,
    refuse_path,
    require_peft,
)
from olmoscope.recipe.schema import Model

REACH_SECONDS = 5
"""How long a plan waits for the hub; the hub's own library would retry for half a minute."""


def read_config(model: Model, *, cached: bool = False) -> Any:
    """The config of a model, as transformers loads it; for an adapter, its base's.

    Args:
        cached: look only in the package, local folders and the hub's cache.

    Raises:
        UserError: the config cannot be loaded.
    """
    from transformers import AutoConfig

    model = model if cached else pinned(model)
    if (base := base_of(model)) is not None:
        with naming_base(model, base):
            return read_config(base, cached=cached)
    with loading(model):
        return AutoConfig.from_pretrained(**locate(model), local_files_only=cached)


def config_at_hand(model: Model) -> Any | None:
    """The config of a model. None if it is on the hub but not in the cache and the hub cannot be reached, or if
    `olmoscope fetch-model` must make it first.

    Raises:
        UserError: the hub answers that the config does not exist or may not be read; or a local config is damaged.
    """
    if not_fetched(model):
        return None
    require_peft(model)
    base = base_of(model)
    if is_local(base or model):
        return read_config(model)
    refuse_path(base or model)
    with contextlib.suppress(UserError):
        return read_config(model, cached=True)
    return read_config(model) if _hub_answers() else None


def width_and_depth(config: Any, model: Model) -> tuple[int, int]:
    """d_model and the number of decoder layers of the text model.

    Raises:
        UserError: the config does not give them.
    """
    text = config.get_text_config()
    d_model, num_layers = (getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers"))
    if d_model is None or num_layers is None:
        raise UserError(f"the config of {model.name} ({type(text).__name__}) does not give its width and depth "
                        "(hidden_size, num_hidden_layers); olmoscope needs a model with one list of decoder layers")
    return d_model, num_layers


def check_config(config: Any, model: Model, deepest: int) -> None:
    """Compare a config with what the recipe says.

    Raises:
        UserError: the width or depth differs, or there is no such layer.
    """
    d_model, num_layers = width_and_depth(config, model)
    for key, stated, real in (("d_model", model.d_model, d_model), ("num_layers", model.num_layers, num_layers)):
        if stated is not None and stated != real:
            raise UserError(f"model.{key}: the recipe says {stated}, {model.name} has {real}")
    if deepest >= num_layers:
        raise UserError(f"activations.sites: layer {deepest} is out of range, {model.name} has layers 0 to "
                        f"{num_layers - 1}")


def _hub_answers() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError as answer:  # it answers; what its front page says does not matter
        answer.close()
    except OSError:
        return False
    return True
