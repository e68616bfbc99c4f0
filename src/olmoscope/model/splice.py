"""The whole language model, and its run gone on with from any layer's output: to see what a reconstruction does to it.

What a layer gives is all that the layers above see. So to put something else in its place, only those above run: the
ones below pass on what they get, and the layer itself gives the replacement. The LM head runs on a few tokens at a
time, since the logits of all would not fit. Shapes: B sequences, T positions, D d_model, C tokens of a chunk, V tokens
of the vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from olmoscope.errors import UserError
from olmoscope.model.capture import captured
from olmoscope.model.config import check_config, read_config
from olmoscope.model.dtype import settle_model
from olmoscope.model.layers import find_layers
from olmoscope.model_source import loading, locate, pinned, revision_of
from olmoscope.recipe import Model


@dataclass(frozen=True)
class CausalLM:
    """A causal LM with all its layers and its head."""

    module: nn.Module
    layers: nn.ModuleList
    name: str
    revision: str
    d_model: int
    vocabulary: int
    body_output: type[Any]
    """What the model without its head returns: a type of transformers."""

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def body(self) -> nn.Module:
        """The model without its head."""
        body = self.module.base_model
        assert isinstance(body, nn.Module)
        return body

    @torch.no_grad()
    def read(self, token_ids_BT: Tensor, positions_BT: Tensor | None, layers: list[int]) -> tuple[Tensor,
                                                                                                 dict[int, Tensor]]:
        """Run the model up to its head.

        Padding at the end of rows needs no mask: attention is causal. For `positions_BT` see `read_residual_stream`.

        Returns:
            The last hidden state and the outputs of `layers`, `[B, T, D]` each, in the model's dtype.
        """
        with captured(self.layers, layers) as outputs:
            hidden_BTD = self._run(token_ids_BT, positions_BT)
        return hidden_BTD, dict(outputs)

    @torch.no_grad()
    def go_on(self, layer: int, x_BTD: Tensor, token_ids_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
        """The last hidden state if `layer` gave `x_BTD`; with its own output, exactly `read`'s."""
        with _replaced(self.layers, layer, x_BTD):
            return self._run(token_ids_BT, positions_BT)

    @torch.no_grad()
    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Logits `[C, V]` of last hidden states, by the model's own forward: it may cap or scale them."""
        def give(*arguments: Any, **settings: Any) -> Any:
            return self.body_output(last_hidden_state=hidden_CD[None])

        with _forward_of(self.body, give):
            nothing = torch.zeros(1, len(hidden_CD), dtype=torch.int64, device=hidden_CD.device)
            logits: Tensor = self.module(input_ids=nothing, use_cache=False).logits[0]
        return logits

    def _run(self, token_ids_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
        hidden: Tensor = self.body(input_ids=token_ids_BT, position_ids=positions_BT, use_cache=False)[0]
        return hidden


def load_causal_lm(model: Model, device: torch.device, deepest: int = 0) -> CausalLM:
    """Load a whole causal LM for inference.

    Args:
        deepest: a layer that it must have.

    Raises:
        UserError: not to be found, weights missing, no such layer, or another width or depth than the recipe's.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    model = pinned(settle_model(model, device))
    config = read_config(model)
    check_config(config, model, deepest)
    revision = revision_of(model)
    text = config.get_text_config()
    logging.disable_progress_bar()
    try:
        with loading(model):
            module, info = AutoModelForCausalLM.from_pretrained(
                **locate(model), config=config, dtype=getattr(torch, model.dtype), attn_implementation=model.attention,
                use_safetensors=True, output_loading_info=True)
    finally:
        logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"model {model.name!r} lacks weights: {missing[0]} and {len(missing) - 1} more; without all of "
                        "them, its LM head too, there is no cross-entropy")
    _, layers = find_layers(module, text.num_hidden_layers)
    module = module.to(device).eval().requires_grad_(False)
    with torch.no_grad():
        output = module.base_model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    return CausalLM(module, layers, model.name, revision, text.hidden_size, text.vocab_size, type(output))


@contextlib.contextmanager
def _replaced(layers: nn.ModuleList, layer: int, x_BTD: Tensor) -> Iterator[None]:
    """While the block runs, layers up to `layer` compute nothing and the last of them gives `x_BTD`."""
    def give(*arguments: Any, **settings: Any) -> Tensor:
        return x_BTD

    with contextlib.ExitStack() as stack:
        for index in range(layer + 1):
            stack.enter_context(_forward_of(layers[index], give))
        yield


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward while the block runs."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own
