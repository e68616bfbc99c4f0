"""The activation rules (activation_rules.py) of an SAE whose latents are in shards.

Each shard proposes latents by its own rule, the owner of a row selects among them, and the shards' rules turn the
selected latents into activations. The threshold of a batch is the n-th largest of all selected values
(distributed/select.py). Group-max needs no selection, because each shard has whole groups.

Shapes: B rows, D d_model, K places of a shard's codes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from olmoscope.distributed.ranks import Ranks
from olmoscope.distributed.select import Kept, keep_largest, nth_largest
from olmoscope.kernels.interface import AdamStep
from olmoscope.recipe.schema import Activation
from olmoscope.train.activation_rules import BARELY, BatchTopKRule, JumpReLURule
from olmoscope.train.shards import Shard

Codes = tuple[list[Tensor], list[Tensor]]
"""values_BK and indices_BK of each shard of this rank."""


class ShardedTopK:
    """k active latents per row. The other rules override what differs.

    Args:
        shards: the shards of this rank.
    """

    def __init__(self, shards: Sequence[Shard], ranks: Ranks) -> None:
        self.shards, self.ranks = shards, ranks
        first = shards[0]
        self.k, self.latents, self.places = first.sae.k, first.latents, first.rule.places
        self.widest = min(self.places, -(-self.latents // first.of))
        """The largest number of places in a shard's codes."""

    def start(self, u_BD: Tensor) -> None:
        """Prepare for training, given its first batch."""

    def encode(self, u_BD: Tensor) -> Codes:
        """The codes of a batch."""
        values, indices = self._candidates(u_BD)
        return self._selected(values).values, indices

    def learn(self, values: list[Tensor], dz: list[Tensor], indices: list[Tensor], adam: AdamStep) -> Codes:
        """Learn from dL/dz of the codes that `encode` gave; return values and dL/dz for the other parameters."""
        return values, dz

    def shared_tensors(self) -> dict[str, Tensor]:
        """The state that does not belong to single latents, the same on every rank."""
        return self.shards[0].rule.shared_tensors()

    def _candidates(self, u_BD: Tensor) -> Codes:
        codes = [shard.rule.candidates(u_BD) for shard in self.shards]
        return [values_BK for values_BK, _ in codes], [indices_BK for _, indices_BK in codes]

    def _selected(self, values: Sequence[Tensor]) -> Kept:
        return keep_largest(values, self.places, self.widest, self.ranks)

    def _count_capped(self, values: Sequence[Tensor], last: Sequence[Tensor]) -> None:
        """Count the rows whose last place is an active latent, in the shard that has this latent."""
        if self.places == self.latents:
            return
        for shard, values_BK, last_B in zip(self.shards, values, last, strict=True):
            ends_B = values_BK.gather(1, last_B.clamp_min(0)[:, None])[:, 0]
            shard.capped_1 += ((last_B >= 0) & (ends_B > BARELY)).sum()


class ShardedGroupMax(ShardedTopK):
    """The largest latent of each group."""

    def encode(self, u_BD: Tensor) -> Codes:
        return self._candidates(u_BD)


class ShardedBatchTopK(ShardedTopK):
    """k active latents per row on average over the batch."""

    def __init__(self, shards: Sequence[Shard], ranks: Ranks) -> None:
        super().__init__(shards, ranks)
        self.rules = [shard.rule for shard in shards if isinstance(shard.rule, BatchTopKRule)]

    def encode(self, u_BD: Tensor) -> Codes:
        values, indices = self._candidates(u_BD)
        kept = self._selected(values)
        least = nth_largest(kept.values, len(u_BD) * self.k, self.ranks)
        self.rules[0].note(least)
        values = [rule.keep(values_BK, least) for rule, values_BK in zip(self.rules, kept.values, strict=True)]
        self._count_capped(values, kept.last)
        return values, indices


class ShardedJumpReLU(ShardedTopK):
    """A learned threshold for each latent."""

    def __init__(self, shards: Sequence[Shard], ranks: Ranks) -> None:
        super().__init__(shards, ranks)
        self.rules = [shard.rule for shard in shards if isinstance(shard.rule, JumpReLURule)]

    def start(self, u_BD: Tensor) -> None:
        kept = self._selected([rule.activations(u_BD)[0] for rule in self.rules])
        least = nth_largest(kept.values, len(u_BD) * self.k, self.ranks)
        for rule in self.rules:
            rule.begin(least)

    def encode(self, u_BD: Tensor) -> Codes:
        over, indices = self._candidates(u_BD)
        kept = self._selected(over)
        values = [rule.keep(over_BK, indices_BK)
                  for rule, over_BK, indices_BK in zip(self.rules, kept.values, indices, strict=True)]
        self._count_capped(values, kept.last)
        return values, indices

    def learn(self, values: list[Tensor], dz: list[Tensor], indices: list[Tensor], adam: AdamStep) -> Codes:
        active = self.ranks.gather(torch.stack([(values_BK > BARELY).sum() for values_BK in values]).sum()).sum()
        learned = [rule.learn(values_BK, dz_BK, indices_BK, adam, active) for rule, values_BK, dz_BK, indices_BK
                   in zip(self.rules, values, dz, indices, strict=True)]
        return [values_BK for values_BK, _ in learned], [dz_BK for _, dz_BK in learned]


SHARDED_RULES: dict[Activation, type[ShardedTopK]] = {
    "topk": ShardedTopK, "batchtopk": ShardedBatchTopK, "jumprelu": ShardedJumpReLU, "groupmax": ShardedGroupMax}
