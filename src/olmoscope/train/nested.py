"""The loss of a Matryoshka SAE: the mean NMSE of several prefixes of the dictionary, each a whole SAE of its own.

A prefix's reconstruction uses only its own latents, so the first latents learn what is most general (Bussmann et al.
2025, arXiv:2503.17547). Let e_p = dL/dx̂ of prefix p, and let the ends of the prefixes divide the latents into G
groups. A latent j of group g is in the prefixes g, g + 1, …, so its gradient is that of a single loss with

    e_g = Σ_{p ≥ g} e_p        dz_bj = Σ_{p ≥ g} e_p,b · W_j

and each active pair is still used only once. Shapes: B rows, D d_model, K places of a code, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from olmoscope.kernels.interface import Kernels, Residual
from olmoscope.sae.normalize import RowStatistics
from olmoscope.sae.topk import TopK
from olmoscope.train.gradients import Gradients


@dataclass(frozen=True)
class NestedResidual:
    """The errors of the reconstructions by all prefixes, and their gradients."""

    whole: Residual
    """The residual of all latents."""
    dz_BK: Tensor
    """dL/dz; 0 where the value is 0."""
    e_GBD: list[Tensor]
    """The e of each group, `[B, D]`, for its decoder rows."""

    def pulled(self, kernels: Kernels, sae: TopK, e_BD: Tensor, values_BK: Tensor, indices_BK: Tensor) -> Self:
        """Add the gradient `e_BD` of another loss of the whole reconstruction, which concerns all groups."""
        dz_BK = kernels.code_gradient(e_BD, values_BK, indices_BK, sae.W_dec)
        return replace(self, dz_BK=self.dz_BK + dz_BK, e_GBD=[group_BD + e_BD for group_BD in self.e_GBD])


class NestedLoss:
    """The mean loss over the prefixes given by `shares` and all latents; the plain NMSE if there are no shares."""

    def __init__(self, shares: Sequence[float], d_sae: int) -> None:
        self.stops = prefix_ends(shares, d_sae)

    def residual(self, kernels: Kernels, sae: TopK, y_BD: Tensor, values_BK: Tensor, indices_BK: Tensor,
                 statistics: RowStatistics | None, skip_BD: Tensor | None = None) -> NestedResidual:
        """Decode all prefixes of a batch's codes and compare them with the target rows `y_BD`, in raw space.

        Args:
            skip_BD: what a transcoder's skip adds to every prefix.
        """
        mean_B1, std_B1 = (None, None) if statistics is None else (statistics.mean_B1, statistics.std_B1)

        def compared(values_BK: Tensor) -> Residual:
            if skip_BD is None:
                return kernels.residual(y_BD, values_BK, indices_BK, sae.W_dec, sae.b_out, mean_B1, std_B1)
            yhat_BD = kernels.decode(values_BK, indices_BK, sae.W_dec) + sae.b_out + skip_BD
            loss_B, e_BD = kernels.error(y_BD, yhat_BD, len(y_BD), mean_B1, std_B1)
            return Residual(loss_B, e_BD, kernels.code_gradient(e_BD, values_BK, indices_BK, sae.W_dec))

        whole = compared(values_BK)
        if len(self.stops) == 1:
            return NestedResidual(whole, whole.dz_BK, [whole.e_BD])
        share = 1 / len(self.stops)
        e_GBD, dz_BK = [whole.e_BD * share], whole.dz_BK * share
        for stop in reversed(self.stops[:-1]):
            inside_BK = (indices_BK < stop) & (values_BK != 0)
            prefix = compared(torch.where(inside_BK, values_BK, 0))
            dz_BK = dz_BK + torch.where(inside_BK, prefix.dz_BK, 0) * share
            e_GBD.append(e_GBD[-1] + prefix.e_BD * share)
        return NestedResidual(whole, dz_BK, e_GBD[::-1])

    def gradients(self, residual: NestedResidual, values_BK: Tensor, dz_BK: Tensor, indices_BK: Tensor,
                  u_BD: Tensor) -> list[Gradients]:
        """The gradients of the parameters, separately for each group. The first group's e is also that of `b_pre`."""
        if len(self.stops) == 1:
            return [Gradients(values_BK, dz_BK, indices_BK, residual.e_GBD[0], u_BD)]
        found = []
        for group in groups_between(self.stops, 0, self.stops[-1]):
            found.append(Gradients(group.only(values_BK, indices_BK), dz_BK, indices_BK, residual.e_GBD[group.number],
                                   u_BD))
        return found


@dataclass(frozen=True)
class Group:
    """Contiguous latents that are in the same prefixes.

    Attributes:
        number: the number of the group, from 0.
        start, stop: its latents are those from `start` up to `stop`, exclusive.
    """

    number: int
    start: int
    stop: int

    def only(self, values_BK: Tensor, indices_BK: Tensor) -> Tensor:
        """The values, with 0 for latents outside the group."""
        return torch.where((indices_BK >= self.start) & (indices_BK < self.stop), values_BK, 0)


def groups_between(stops: Sequence[int], first: int, last: int) -> list[Group]:
    """The groups that overlap the latents from `first` up to `last`, exclusive. Each is cut to the overlap, and its
    `start` and `stop` are counted from `first`.

    Args:
        stops: where the prefixes end.
    """
    bounds = [(max(start, first), min(stop, last)) for start, stop in zip((0, *stops), stops, strict=False)]
    return [Group(number, start - first, stop - first) for number, (start, stop) in enumerate(bounds) if start < stop]


def prefix_ends(shares: Sequence[float], d_sae: int) -> tuple[int, ...]:
    """The end of each prefix, exclusive. The last prefix is the whole dictionary."""
    return (*(max(1, round(share * d_sae)) for share in shares), d_sae)
