"""The auxiliary loss and the lift (see auxiliary.py) of an SAE whose latents are in shards.

Dead latents are chosen in the same way as active ones: each shard proposes candidates, and the owner of a row selects.
All ranks know the residual of all rows, so they exchange only the reconstruction by dead latents and its error.

Shapes: B rows, b rows that a rank owns, D d_model, A places of dead latents.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from olmoscope.distributed.ranks import Ranks
from olmoscope.distributed.select import keep_largest
from olmoscope.distributed.sums import tree_sum
from olmoscope.kernels.interface import Kernels
from olmoscope.sae.normalize import RowStatistics
from olmoscope.train.auxiliary import residual_to_learn
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.gradients import Gradients
from olmoscope.train.shards import Shard


class ShardedAuxiliary:
    """The loss of all shards of one SAE."""

    def __init__(self, settings: SettledAuxiliary, shards: Sequence[Shard], ranks: Ranks, kernels: Kernels) -> None:
        self.settings, self.shards, self.ranks, self.kernels = settings, shards, ranks, kernels
        self._dead: list[int] | None = None
        """The number of dead latents in each shard of all ranks; None if not yet gathered since `look` was called."""

    def look(self, tokens: int) -> None:
        """Find the dead latents: those that did not fire in the last `dead_window` tokens."""
        for shard in self.shards:
            torch.ge(tokens - shard.last_fired_F, self.settings.dead_window, out=shard.dead_F)
            shard.list_dead()
        self._dead = None

    def gradients(self, y_BD: Tensor, u_BD: Tensor, statistics: RowStatistics | None, e_BD: Tensor,
                  loss_B: Tensor) -> tuple[Tensor, list[Gradients | None]] | None:
        """The loss of each row (without the weight), `[B]`, and the gradients of each shard of this rank (None for a
        shard without dead latents). None if no shard has a dead latent, or the weight is 0. The arguments are those of
        `AuxiliaryLoss.gradients`."""
        if not self.settings.weight:
            return None
        if self._dead is None:
            counts = torch.tensor([len(shard.dead_M) for shard in self.shards])
            self._dead = self.ranks.gather(counts).flatten().tolist()
        if not any(self._dead):
            return None
        k = min(self.settings.k, sum(self._dead))
        codes = [self._codes(shard, u_BD, k) for shard in self.shards]
        values = keep_largest([values_BA for values_BA, _ in codes], k, min(k, max(self._dead)), self.ranks).values
        r_BD, learn_B1 = residual_to_learn(y_BD, statistics, e_BD, loss_B)
        values = [values_BA * learn_B1 for values_BA in values]
        rhat_BD = tree_sum([self.kernels.decode(values_BA, indices_BA, shard.sae.W_dec)
                            for shard, values_BA, (_, indices_BA) in zip(self.shards, values, codes, strict=True)])
        rows = len(y_BD)
        rhat_bD = self.ranks.sums_to_owners({0: rhat_BD}, [[0]] * self.ranks.count)[0]
        left_b, e_bD = self.kernels.error(r_BD[self.ranks.own(rows)], rhat_bD, rows, None, None)
        left_B, e_BD = (self.ranks.gather_rows(own, rows) for own in (left_b, e_bD))
        share_B1 = (self.settings.weight * loss_B).to(y_BD.dtype).unsqueeze(1)
        e_BD = e_BD * share_B1
        found: list[Gradients | None] = []
        for shard, values_BA, (_, indices_BA) in zip(self.shards, values, codes, strict=True):
            if not values_BA.shape[1]:
                found.append(None)
                continue
            dz_BA = self.kernels.code_gradient(e_BD, values_BA, indices_BA, shard.sae.W_dec)
            found.append(Gradients(values_BA, dz_BA, indices_BA, e_BD, u_BD))
        return left_B * loss_B, found

    def lift(self, values: Sequence[Tensor]) -> None:
        """Raise the biases of dead latents, as `AuxiliaryLoss.lift` does.

        Args:
            values: the batch's activations in each shard of this rank.
        """
        if not self.settings.lift:
            return
        total = tree_sum(self.ranks.gather(tree_sum([values_BK.sum() for values_BK in values])).unbind())
        active = self.ranks.gather(torch.stack([(values_BK > 0).sum() for values_BK in values]).sum()).sum()
        share = self.settings.lift * len(values[0]) / self.settings.dead_window
        for shard in self.shards:
            shard.sae.b_latent.add_(shard.dead_F * (total / active.clamp_min(1) * share))

    def _codes(self, shard: Shard, u_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The codes of a shard's dead latents with the largest pre-activations: values and latents, `[B, A]`."""
        dead_M, sae = shard.dead_M, shard.sae
        if not len(dead_M):
            return u_BD.new_empty(len(u_BD), 0), dead_M.new_empty(len(u_BD), 0)
        values_BA, places_BA = self.kernels.encode_topk(u_BD, sae.W_enc[dead_M], sae.b_latent[dead_M],
                                                        min(k, len(dead_M)))
        return values_BA, dead_M[places_BA]
