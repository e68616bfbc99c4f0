"""Read the residual stream after decoder layers, by forward hooks.

Hooks and not `output_hidden_states`: transformers replaces the last hidden state by the one after the final norm, so
`hidden_states[L + 1]` is the output of layer L for every layer but the last.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from olmoscope.model.outputs import hidden_of


class _Deepest(BaseException):
    """Ends a forward pass after the deepest layer wanted; not an error, so no handler of errors may catch it."""


@contextlib.contextmanager
def captured(layers: nn.ModuleList, wanted: list[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of some layers while the block runs.

    Yields:
        A mapping from layer to its output `[batch, T, d_model]`, filled (and overwritten) by each forward pass.
    """
    outputs: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            outputs[layer] = hidden_of(output)
        return keep

    handles = [layers[layer].register_forward_hook(hook(layer)) for layer in wanted]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def given_positions(positions_BT: Tensor | None) -> dict[str, Tensor]:
    """Position ids as an argument of a forward, where there are any: not every architecture takes them."""
    return {} if positions_BT is None else {"position_ids": positions_BT}


@torch.no_grad()
def read_residual_stream(module: nn.Module, layers: nn.ModuleList, wanted: list[int], token_ids_BT: Tensor,
                         positions_BT: Tensor | None = None) -> dict[int, Tensor]:
    """The residual stream after each wanted layer, in one pass that ends at the deepest.

    Rows may be padded at their end, with any token: attention is causal, so nothing before sees the padding, and no
    mask is needed (one would cost the fast attention kernels).

    Args:
        module: a decoder, on the device of the tokens.
        wanted: layers, ascending.
        positions_BT: position ids; where they restart, documents are kept apart. transformers does so only
            without a mask and without a cache, which is how it is called here. None: documents share attention.

    Returns:
        For each layer `[batch, T, d_model]`, in the model's dtype.
    """
    def stop(module: nn.Module, arguments: Any, output: Any) -> None:
        raise _Deepest

    with captured(layers, wanted) as outputs:
        handle = layers[wanted[-1]].register_forward_hook(stop)
        try:
            module(input_ids=token_ids_BT, use_cache=False, **given_positions(positions_BT))
        except _Deepest:
            pass
        finally:
            handle.remove()
    return outputs
