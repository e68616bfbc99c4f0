"""What writers of other tools' formats share: refusing what a format cannot express, and biases in its convention.

Shapes: D_in width read, D_out width written, F latents.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK

_LATENTS_AT_ONCE = 4096
"""Rows of the encoder that are held in float64 at a time."""


def encoder_bias(sae: TopK | JumpReLU, subtracted: Tensor | None) -> Tensor:
    """The latents' bias `[F]` for an encoder that subtracts something else from rows than ours does.

    Args:
        subtracted: `[D_in]`; None: nothing.
    """
    less_D = sae.b_in.double() if subtracted is None else sae.b_in.double() - subtracted.double()
    if not less_D.any():
        return sae.b_latent.float()
    # Not a matrix product: its last bits may depend on the number of threads, and an export must come out the same.
    taken_F = torch.cat([(part_FD.double() * less_D).sum(dim=1)
                         for part_FD in torch.split(sae.W_enc, _LATENTS_AT_ONCE)])
    return (sae.b_latent.double() - taken_F).float()


def refuse_inexpressible(sae: SparseCoder, path: Path, tool: str, kinds: str, expressible: bool) -> None:
    """Refuse what the tool has no class for, rows that are normalised first, and weights that are not finite.

    Args:
        tool: the tool's name.
        kinds: what it has, in words.
        expressible: whether this kind is among them.

    Raises:
        UserError: one of these applies; the message says which.
    """
    if not expressible:
        raise UserError(f"{path} was not written: {tool} has no class for this SAE, only {kinds}; write it for SAELens "
                        "(`olmoscope export` without --to)")
    if sae.normalize != "none":
        raise UserError(f"{path} was not written: {tool} does not normalise rows ({sae.normalize}) before it encodes; "
                        "write it for SAELens (`olmoscope export` without --to)")
    refuse_not_finite(sae.state_dict(), path)


def refuse_not_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that are not finite: no reader gives such, but a bias may overflow when it is converted.

    Args:
        path: the file or folder that is not written then.

    Raises:
        UserError: it says which.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path} was not written: {name} of its SAE holds NaN or inf, so it cannot be used; "
                            "evaluate the SAE as it is, or train it again")
