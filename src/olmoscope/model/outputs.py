"""What a decoder layer outputs: the residual stream alone, or as the first entry of a tuple or a list.

A named tuple counts as neither: its field names say which entry is the stream, and they differ between models.
"""

from typing import Any

import torch
from torch import Tensor

from olmoscope.errors import UserError


def hidden_of(output: Any) -> Tensor:
    """The residual stream in a layer's output, `[batch, positions, d_model]`.

    Raises:
        UserError: the output holds no such tensor.
    """
    hidden = first_of(output)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        what = f"a tensor {list(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise UserError(f"a decoder layer of this model gives {what}, not rows as [batch, positions, d_model]; "
                        "olmoscope cannot read this architecture")
    return hidden


def first_of(output: Any) -> Any:
    """A module's output, or the first entry of a tuple or list."""
    return output[0] if _is_sequence(output) and output else output


def with_hidden(output: Any, x_BTD: Tensor) -> Any:
    """A layer's output with another residual stream, in the same form."""
    if _is_sequence(output):
        return type(output)([x_BTD, *output[1:]])
    return x_BTD


def without_tensors(output: Any) -> Any:
    """The form of a layer's output without its tensors, which `with_hidden` fills again; it keeps no memory."""
    if _is_sequence(output):
        return type(output)([None if isinstance(entry, Tensor) else entry for entry in output])
    return torch.empty(0)


def _is_sequence(output: Any) -> bool:
    return type(output) in (tuple, list)
