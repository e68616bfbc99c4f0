"""One training step of an SAE whose latents are in V shards, on any number of ranks that can share them.

The maths is that of step.py. Each shard proposes its largest pre-activations and computes its part of the
reconstruction. The owner of a row selects, adds up the parts and computes the error. Each shard updates its own
latents:

    all ranks: x, u         each shard: its largest latents      owners: which of them stay (sharded_rules.py)
    each shard: its part of x̂     owners: the sum, loss and e       all ranks: e; each shard: dz, sort, update
                                  (sharded_loss.py)

A shard is computed by the same calls on whichever rank has it, and sums over shards have a fixed order
(distributed/sums.py). So the weights depend on the number of shards but not, even in the last bit, on the number of
ranks. On a CPU, this requires the same number of threads for each rank; on GPUs, the same GPU model and the same
versions of CUDA and torch.

Shapes: B rows, b rows that a rank owns, D d_model, K places of a shard's codes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from olmoscope.distributed.ranks import Ranks
from olmoscope.distributed.sums import tree_sum
from olmoscope.sae.io.checkpoint import rule_tensor
from olmoscope.sae.normalize import RowStatistics
from olmoscope.train.adam import Adam, plain_moments, update_parameter
from olmoscope.train.auxiliary import REFRESH_STEPS
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.gradients import Gradients, Pull, sorted_together
from olmoscope.train.orthogonal import move_apart
from olmoscope.train.sharded_auxiliary import ShardedAuxiliary
from olmoscope.train.sharded_candidates import ShardedCandidates
from olmoscope.train.sharded_loss import ShardedLoss, ShardedResidual
from olmoscope.train.sharded_rules import SHARDED_RULES
from olmoscope.train.shards import SHARED, Shard
from olmoscope.train.step import Sums, update_matrices


class ShardedStep:
    """The shards of an SAE that this rank has, and the state that all ranks share.

    Args:
        shards: contiguous shards, in order; the same number on every rank.
        auxiliary: settings of the auxiliary loss; None for no such loss.
        ranks: the ranks that train this SAE.
        matryoshka: shares of the latents that are SAEs of their own (nested.py).
        orthogonal: how strongly similar decoder rows of a shard are moved apart (orthogonal.py); 0: not at all.
    """

    def __init__(self, shards: Sequence[Shard], adam: Adam, auxiliary: SettledAuxiliary | None = None,
                 ranks: Ranks | None = None, matryoshka: Sequence[float] = (), orthogonal: float = 0.0) -> None:
        self.shards, self.adam, self.ranks = shards, adam, ranks or Ranks.alone()
        self.orthogonal = orthogonal
        first = shards[0].sae
        self.activation, self.latents, self.kernels = shards[0].activation, shards[0].latents, shards[0].kernels
        self.rule = SHARDED_RULES[self.activation](shards, self.ranks)
        self.loss = ShardedLoss(matryoshka, shards, self.ranks)
        self.sae, self.k = first, first.k
        """The first shard's SAE. Its k, biases and skip are those of all shards."""
        self.shared = {name: parameter for name, parameter in first.state_dict().items() if name in SHARED}
        self.moments = {name: plain_moments(parameter) for name, parameter in self.shared.items()}
        self.count = self.tokens = 0
        self.unit = torch.ones((), dtype=torch.float64)
        """The factor for the learning rate of the biases; on the CPU, because it becomes a scalar argument."""
        self.sums = torch.zeros(3, dtype=torch.float64, device=first.device)
        """`Sums.loss`, `auxiliary` and `auxiliary_rows`; the shards count the rest."""
        searches = [shard.candidates for shard in shards if shard.candidates is not None]
        self.candidates = ShardedCandidates(searches, self.ranks) if searches else None
        self.auxiliary = ShardedAuxiliary(auxiliary, shards, self.ranks, self.kernels) if auxiliary else None

    @torch.no_grad()
    def __call__(self, x_BD: Tensor, lr: float, target_BD: Tensor | None = None, pull: Pull | None = None) -> None:
        """Train on one batch of activations `[B, D]`, the same on every rank.

        Args:
            target_BD: the rows to be reconstructed, `[B, D_out]`, if they are not the rows read (train/ends.py).
            pull: a loss beside the NMSE, the same on every rank.
        """
        x_BD = x_BD.to(self.sae.W_dec.dtype).contiguous()
        y_BD = x_BD if target_BD is None else target_BD.to(x_BD.dtype).contiguous()
        u_BD, statistics = self.sae.center(x_BD)
        if self.count == 0:
            self._start(u_BD)
        adam = self.adam.at(self.count + 1, lr)
        values, indices = self.rule.encode(u_BD)
        skip_BD = None if self.sae.W_skip is None else x_BD @ self.sae.W_skip.T
        residual = self.loss.residual(y_BD, values, indices, statistics, skip_BD, pull)
        values, dz = self.rule.learn(values, residual.dz, indices, adam)
        asked = self.loss.gradients(residual, values, dz, indices, u_BD)
        auxiliary = self._auxiliary(y_BD, u_BD, statistics, residual)
        self.count += 1
        self.tokens += len(x_BD)
        self.sums[0] += residual.loss_B.sum()
        biases = self.adam.at(self.count, lr * float(self.unit))
        pulls = []
        for shard, values_BK, indices_BK, losses, more in zip(self.shards, values, indices, asked, auxiliary,
                                                              strict=True):
            losses = [*losses, *([more] if more else [])]
            shard.count(values_BK, indices_BK, self.tokens)
            own = replace(adam, shard=shard.number)
            db_latent_F, b_pull_D = update_matrices(
                self.kernels, shard.sae, shard.moments, *sorted_together(self.kernels, losses, shard.sae.d_sae),
                own, self.adam.decoder_rate)
            if self.orthogonal:
                move_apart(shard.sae.W_dec, self.orthogonal * self.adam.decoder_rate, own, len(x_BD))
            update_parameter(shard.sae.b_latent, db_latent_F, shard.moments["b_latent"], biases)
            pulls.append(b_pull_D)
        b_pull_D = tree_sum(self.ranks.gather(tree_sum(pulls)).unbind())
        e_D, dW_skip = self.loss.of_biases(residual, x_BD)
        gradients = {"b_pre": e_D - b_pull_D} if "b_pre" in self.shared else {"b_in": -b_pull_D, "b_out": e_D}
        for name, gradient_D in gradients.items():
            update_parameter(self.shared[name], gradient_D, self.moments[name], biases)
        if dW_skip is not None:
            update_parameter(self.shared["W_skip"], dW_skip, self.moments["W_skip"], adam)
        if self.auxiliary is not None:
            self.auxiliary.lift(values)

    def dead_share(self, window: int) -> float | None:
        """Share of latents that did not fire in the last `window` tokens; None before that many were seen. All ranks
        must call this."""
        if self.tokens < window:
            return None
        dead = sum(int((self.tokens - shard.last_fired_F >= window).sum()) for shard in self.shards)
        return sum(self.ranks.ask(dead)) / self.latents

    def take_sums(self) -> Sums:
        """The sums since the last call; waits for the device. All ranks must call this."""
        loss, auxiliary, auxiliary_rows = self.sums.tolist()
        active, capped = (sum(self.ranks.ask(sum(map(int, counts)))) for counts in (
            [shard.fired_1 for shard in self.shards], [shard.capped_1 for shard in self.shards]))
        self.sums.zero_()
        for shard in self.shards:
            shard.fired_1.zero_()
            shard.capped_1.zero_()
        return Sums(loss, float(active), auxiliary, auxiliary_rows, float(capped))

    def shared_tensors(self) -> dict[str, Tensor]:
        """The state that does not belong to a shard, by name: the same on every rank."""
        found = self.shared | {"sums": self.sums, "unit": self.unit}
        for name, moments in self.moments.items():
            found |= {f"adam.{name}.first": moments.first, f"adam.{name}.second": moments.second}
        return found | {rule_tensor(self.activation, name): tensor
                        for name, tensor in self.rule.shared_tensors().items()}

    def restore(self, count: int, tokens: int, tensor: Callable[[str], Tensor]) -> None:
        """Restore a state; the shards restore themselves.

        Args:
            tensor: gives the tensor that `shared_tensors` had under a name.
        """
        for name, target in self.shared_tensors().items():
            target.copy_(tensor(name))
        self.count, self.tokens = count, tokens

    def _start(self, u_BD: Tensor) -> None:
        """Set what depends on the first batch."""
        self.rule.start(u_BD)
        if self.adam.scale_biases:
            self.unit.copy_(u_BD.square().mean().sqrt())

    def _auxiliary(self, y_BD: Tensor, u_BD: Tensor, statistics: RowStatistics | None,
                   residual: ShardedResidual) -> Sequence[Gradients | None]:
        """The gradients of the auxiliary loss in each shard; None for a shard without any."""
        nothing = [None] * len(self.shards)
        if self.auxiliary is None:
            return nothing
        if self.count % REFRESH_STEPS == 0:
            self.auxiliary.look(self.tokens)
        found = self.auxiliary.gradients(y_BD, u_BD, statistics, residual.e_BD, residual.loss_B)
        if found is None:
            return nothing
        left_B, gradients = found
        self.sums[1] += left_B.sum()
        self.sums[2] += len(left_B)
        return gradients
