"""The loss of an SAE whose latents are in shards: the loss of all latents, or the mean over several prefixes
(nested.py).

Each rank sends the owner of a row its part of the reconstruction, one for each group of latents that it has. The owner
adds up the parts in the order of the shards, and then the groups from the first on, which gives the reconstruction of
each prefix. All ranks get back the loss and e of the last group (all latents); e of another group goes only to the
ranks that have this group. The biases get the first group's e, which the first rank always has.

Shapes: B rows, b rows that a rank owns, D d_model, K places of a shard's codes, N groups that a rank has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.distributed.ranks import Ranks
from olmoscope.distributed.sums import tree_sum_of_some
from olmoscope.sae.normalize import RowStatistics, restore_rows
from olmoscope.train.gradients import Gradients, Pull
from olmoscope.train.nested import Group, groups_between, prefix_ends
from olmoscope.train.shards import Shard, shard_bounds


@dataclass(frozen=True)
class ShardedResidual:
    """The errors of the reconstructions by all prefixes, and their gradients."""

    loss_B: Tensor
    """The loss of each row with all latents, float64."""
    e_BD: Tensor
    """dL/dx̂ of all latents, as if there were no other prefix."""
    e: dict[int, Tensor]
    """The e of each group of this rank, `[B, D]`, by the group's number."""
    dz: list[Tensor]
    """dL/dz in each shard of this rank, `[B, K]`."""


class ShardedLoss:
    """The mean loss over the prefixes given by `shares` and all latents; the plain NMSE if there are no shares.

    Args:
        shards: the shards of this rank.
    """

    def __init__(self, shares: Sequence[float], shards: Sequence[Shard], ranks: Ranks) -> None:
        first = shards[0]
        self.shards, self.ranks, self.kernels = shards, ranks, first.kernels
        self.stops = prefix_ends(shares, first.latents)
        bounds = shard_bounds(first.latents, first.of)
        self.groups = [groups_between(self.stops, bounds[shard.number], bounds[shard.number + 1]) for shard in shards]
        """The groups of each shard."""
        self.groups_of = groups_of_ranks(self.stops, first.of, ranks.count)

    def residual(self, y_BD: Tensor, values: Sequence[Tensor], indices: Sequence[Tensor],
                 statistics: RowStatistics | None, skip_BD: Tensor | None,
                 pull: Pull | None = None) -> ShardedResidual:
        """Compare the reconstructions of a batch with the target rows `y_BD`, in raw space.

        Args:
            values, indices: the codes in each shard of this rank.
            skip_BD: what a transcoder's skip adds to every prefix. Every rank computes it for all rows, because a
                product with only some of the rows may round differently.
            pull: an additional loss of the reconstruction by all latents; the same on every rank.
        """
        rows, ranks = len(y_BD), self.ranks
        loss_b, errors, xhat_bD = self._compared(y_BD, self._parts(values, indices), statistics, skip_BD)
        loss_B, e_BD = ranks.gather_rows(loss_b, rows), ranks.gather_rows(errors[-1], rows)
        asked, last = {}, len(self.stops) - 1
        if last:
            share = 1 / len(self.stops)
            for group in reversed(range(last)):
                above_bD = errors[group + 1] * share if group + 1 == last else errors[group + 1]
                errors[group] = above_bD + errors[group] * share
            coarse = [[group for group in groups if group < last] for groups in self.groups_of]
            asked = ranks.copies_from_owners(dict(enumerate(errors[:last])), coarse, rows)
        if last in self.groups_of[ranks.index]:
            asked[last] = e_BD * (1 / len(self.stops)) if last else e_BD
        if pull is not None:
            xhat_BD = restore_rows(ranks.gather_rows(xhat_bD, rows), statistics)
            std = 1 if statistics is None else statistics.std_B1  # in e, which is of normalised rows
            pull_BD = std * pull(xhat_BD, y_BD, e_BD / std)
            asked = {group: group_BD + pull_BD for group, group_BD in asked.items()}
        return ShardedResidual(loss_B, e_BD, asked, self._code_gradients(asked, values, indices))

    def gradients(self, residual: ShardedResidual, values: Sequence[Tensor], dz: Sequence[Tensor],
                  indices: Sequence[Tensor], u_BD: Tensor) -> list[list[Gradients]]:
        """The gradients of each shard's parameters, separately for each of its groups."""
        return [[Gradients(_only(groups, group, values_BK, indices_BK), dz_BK, indices_BK,
                           residual.e[group.number], u_BD) for group in groups]
                for groups, values_BK, dz_BK, indices_BK in zip(self.groups, values, dz, indices, strict=True)]

    def of_biases(self, residual: ShardedResidual, x_BD: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of the bias `[D]` and the skip `[D, D_in]` that every prefix adds; the same on every rank.

        Args:
            x_BD: the rows read.
        """
        sae, e_BD = self.shards[0].sae, residual.e.get(0)
        if e_BD is None:
            e_D, skip = torch.zeros_like(sae.b_out), None if sae.W_skip is None else torch.zeros_like(sae.W_skip)
        else:
            e_D, skip = e_BD.sum(dim=0), None if sae.W_skip is None else e_BD.T @ x_BD
        if len(self.stops) == 1:  # all ranks have the first group
            return e_D, skip
        return self.ranks.gather(e_D)[0], None if skip is None else self.ranks.gather(skip)[0]

    def _parts(self, values: Sequence[Tensor], indices: Sequence[Tensor]) -> dict[int, Tensor]:
        """This rank's part of the reconstruction for each of its groups, `[B, D]`, by the group's number."""
        of_shards = [{group.number: self.kernels.decode(_only(groups, group, values_BK, indices_BK), indices_BK,
                                                        shard.sae.W_dec) for group in groups}
                     for shard, groups, values_BK, indices_BK in zip(self.shards, self.groups, values, indices,
                                                                     strict=True)]
        found = {group: tree_sum_of_some([parts.get(group) for parts in of_shards])
                 for group in self.groups_of[self.ranks.index]}
        return {group: part_BD for group, part_BD in found.items() if part_BD is not None}

    def _compared(self, y_BD: Tensor, parts: dict[int, Tensor], statistics: RowStatistics | None,
                  skip_BD: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """For the rows that this rank owns: the loss of all latents `[b]`, e of each prefix `[b, D]`, and the
        reconstruction by all latents `[b, D]`."""
        rows, ranks = len(y_BD), self.ranks
        own = ranks.own(rows)
        mean_b1, std_b1 = (None, None) if statistics is None else (statistics.mean_B1[own], statistics.std_B1[own])
        sums = ranks.sums_to_owners(parts, self.groups_of)
        prefix_bD: Tensor | None = None
        errors = []
        for group in range(len(self.stops)):
            prefix_bD = tree_sum_of_some([prefix_bD, sums.get(group)])
            assert prefix_bD is not None, "the first group has a latent"
            xhat_bD = prefix_bD + self.shards[0].sae.b_out
            if skip_BD is not None:
                xhat_bD = xhat_bD + skip_BD[own]
            loss_b, e_bD = self.kernels.error(y_BD[own], xhat_bD, rows, mean_b1, std_b1)
            errors.append(e_bD)
        return loss_b, errors, xhat_bD

    def _code_gradients(self, asked: dict[int, Tensor], values: Sequence[Tensor],
                        indices: Sequence[Tensor]) -> list[Tensor]:
        """dL/dz in each shard, `[B, K]`, from the e of each latent's group."""
        found = []
        for shard, groups, values_BK, indices_BK in zip(self.shards, self.groups, values, indices, strict=True):
            dz = [self.kernels.code_gradient(asked[group.number], _only(groups, group, values_BK, indices_BK),
                                             indices_BK, shard.sae.W_dec) for group in groups]
            found.append(sum(dz[1:], start=dz[0]))  # each latent is in one group: the others add 0
        return found


def groups_of_ranks(stops: Sequence[int], shards: int, count: int) -> list[list[int]]:
    """The groups of latents that each of `count` ranks has.

    Args:
        stops: the ends of the prefixes; the last one is the number of latents.
        shards: the number of shards of all latents.
    """
    bounds = shard_bounds(stops[-1], shards)
    return [[group.number for group in groups_between(stops, bounds[shards * rank // count],
                                                      bounds[shards * (rank + 1) // count])]
            for rank in range(count)]


def _only(groups: Sequence[Group], group: Group, values_BK: Tensor, indices_BK: Tensor) -> Tensor:
    """The values of a group, with 0 for latents of the shard's other groups."""
    return values_BK if len(groups) == 1 else group.only(values_BK, indices_BK)
