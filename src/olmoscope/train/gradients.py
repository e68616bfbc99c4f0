"""The gradients of a loss with respect to an SAE's parameters, as active pairs and rows; and several losses joined.

Shapes: B rows, D d_model, K places of a code, P pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.kernels.interface import Kernels, SortedPairs

Pull = Callable[[Tensor, Tensor, Tensor], Tensor]
"""An additional loss beside the NMSE. Given the reconstructions x̂, the target rows, and the gradient of the NMSE at
x̂, it returns the gradient to add. All are `[B, D_out]`."""


@dataclass(frozen=True)
class Gradients:
    """The gradients of one loss: Σ_b z_bj e_b for row j of the decoder, Σ_b dz_bj u_b for row j of the encoder."""

    values_BK: Tensor
    """z; 0 where not active."""
    dz_BK: Tensor
    """dL/dz."""
    indices_BK: Tensor
    """The latent of each value."""
    e_BD: Tensor
    """dL/d(z W_dec + b_pre)."""
    u_BD: Tensor
    """The rows as the encoder sees them."""


def sorted_together(kernels: Kernels, losses: Sequence[Gradients], d_sae: int) -> tuple[SortedPairs, Tensor, Tensor]:
    """The pairs of all losses sorted by latent, and the rows e and u that they refer to, concatenated over the losses.

    A latent with gradients from several losses gets their sum, in one update.
    """
    if len(losses) == 1:
        loss = losses[0]
        return kernels.sort_pairs(loss.values_BK, loss.dz_BK, loss.indices_BK, d_sae), loss.e_BD, loss.u_BD
    rows = []
    first = 0
    for loss in losses:
        numbers_B1 = torch.arange(first, first + len(loss.e_BD), dtype=torch.int32, device=loss.e_BD.device)[:, None]
        rows.append(numbers_B1.expand_as(loss.values_BK).flatten())
        first += len(loss.e_BD)
    values_P, dz_P, indices_P = (torch.cat([getattr(loss, name).flatten() for loss in losses])
                                 for name in ("values_BK", "dz_BK", "indices_BK"))
    pairs = kernels.sort_pairs(values_P, dz_P, indices_P, d_sae, torch.cat(rows))
    return pairs, torch.cat([loss.e_BD for loss in losses]), torch.cat([loss.u_BD for loss in losses])
