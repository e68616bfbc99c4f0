"""A shard of an SAE in training: contiguous latents, with all their state. Shapes: F latents of a shard."""

from collections.abc import Callable

import torch
from torch import Tensor

from olmoscope.distributed.ranks import Ranks
from olmoscope.kernels.dispatch import kernels_for
from olmoscope.kernels.interface import Kernels
from olmoscope.recipe.schema import Activation, Candidates
from olmoscope.sae.io.checkpoint import rule_tensor
from olmoscope.sae.topk import TopK
from olmoscope.train.activation_rules import RULES, CappedRule
from olmoscope.train.adam import Adam
from olmoscope.train.candidates import CandidateSearch

SHARED = ("b_pre", "b_in", "b_out", "W_skip")
"""Parameters that all shards share."""


def shard_bounds(latents: int, shards: int) -> list[int]:
    """The first latent of each shard, and the end: `shards + 1` numbers."""
    return [latents * number // shards for number in range(shards + 1)]


def own_shards(shards: int, ranks: Ranks) -> range:
    """The shards of a rank: contiguous, and the same number on every rank."""
    each = shards // ranks.count
    return range(ranks.index * each, (ranks.index + 1) * each)


class Shard:
    """Parameters, moments and counts of some contiguous latents.

    Args:
        number, of: the number of this shard, from 0, and how many there are.
        sae: only the latents of this shard, with the biases (and the skip) of the whole SAE.
        adam: makes the moments.
        latents: the number of latents of all shards.
        activation: the rule that says which latents are active.
        candidates: settings of the search by candidates; None if the encoder's product is exact.
        kernels: by default those of the SAE's device.
    """

    def __init__(self, number: int, of: int, sae: TopK, adam: Adam, latents: int, activation: Activation = "topk",
                 kernels: Kernels | None = None, candidates: Candidates | None = None) -> None:
        self.number, self.of, self.sae, self.latents, self.activation = number, of, sae, latents, activation
        self.kernels = kernels or kernels_for(sae.device)
        self.candidates = CandidateSearch(candidates, sae, self.kernels) if candidates else None
        self.steps = 0
        """The number of steps made so far."""
        self.rule = RULES[activation](sae, self.kernels, self._encode_topk, latents)
        self.moments = {name: adam.moments_of(name, parameter) for name, parameter in sae.state_dict().items()
                        if name not in SHARED}
        self.last_fired_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
        """How many tokens had been seen when each latent last fired."""
        self.fired_1 = torch.zeros(1, dtype=torch.int64, device=sae.device)
        """The number of active latents in all rows since the sums were last taken."""
        self.capped_1 = torch.zeros_like(self.fired_1)
        """For rules with a cap: the number of rows since then whose last place is active and in this shard."""
        self.dead_F = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.device)
        """Which latents were dead when the auxiliary loss last looked."""
        self.dead_M = torch.zeros(0, dtype=torch.int64, device=sae.device)
        """The same, as a list."""

    def count(self, values_BK: Tensor, indices_BK: Tensor, tokens: int) -> None:
        """Record which latents fired in a batch.

        Args:
            tokens: the number of tokens seen up to the end of this batch.
        """
        self.steps += 1
        active_BK = values_BK > 0
        self.fired_1 += active_BK.sum()
        self.last_fired_F.scatter_reduce_(0, indices_BK.flatten(), active_BK.flatten() * tokens, "amax")

    def list_dead(self) -> None:
        """Rebuild the list from `dead_F`; waits for the device."""
        self.dead_M = self.dead_F.nonzero().squeeze(1)

    def tensors(self) -> dict[str, Tensor]:
        """All state, by name. The tensors with the same name in all shards, concatenated, are those of the whole
        SAE."""
        found = {name: tensor for name, tensor in self.sae.state_dict().items() if name not in SHARED}
        for name, moments in self.moments.items():
            found |= {f"adam.{name}.{part}": tensor for part, tensor in vars(moments).items() if tensor is not None}
        found |= {rule_tensor(self.activation, name): tensor for name, tensor in self.rule.tensors_of_latents().items()}
        if isinstance(self.rule, CappedRule):
            found["capped"] = self.capped_1
        if self.candidates is not None:
            found |= self.candidates.tensors()
        return found | {"last_fired": self.last_fired_F, "fired": self.fired_1, "auxiliary.dead": self.dead_F}

    def restore(self, steps: int, tensor: Callable[[str], Tensor]) -> None:
        """Restore a state.

        Args:
            steps: the number of steps made up to then.
            tensor: gives the tensor that `tensors` had under a name.
        """
        self.steps = steps
        for name, target in self.tensors().items():
            target.copy_(tensor(name))
        self.list_dead()

    def _encode_topk(self, u_BD: Tensor, b_latent_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.candidates is None:
            return self.kernels.encode_topk(u_BD, self.sae.W_enc, b_latent_F, k)
        return self.candidates.encode(u_BD, b_latent_F, k, self.steps)
