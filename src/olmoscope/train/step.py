"""One training step of an SAE or transcoder: forward pass, gradients by hand, Adam, unit norm. Only one product is
dense.

Loss: NMSE = mean over rows of ‖x̂ − x‖² / ‖x‖² in raw space (the reference recipe). With e = dL/dx̂ (times the row's
std in a layer-norm SAE), u the centred input and z the codes:

    dz_bj = e_b · W_dec_j  where z_bj > 0      dW_dec_j = Σ_b z_bj e_b      dW_enc_j = Σ_b dz_bj u_b
    db_latent_j = Σ_b dz_bj                    db_pre = Σ_b e_b − Σ_j db_latent_j W_enc_j

In a transcoder the target is another site's row y, and with a skip ŷ includes W_skip x; then db_in = − Σ_j db_latent_j
W_enc_j, db_out = Σ_b e_b, dW_skip = Σ_b e_b x_bᵀ.

A tied W gets the sum of both, in one update. The size of Adam's steps does not depend on the size of the gradients, so
each kind of parameter has its own rate (adam.py): biases have the unit of the activations, rows of the matrices have
none. An auxiliary loss (auxiliary.py) adds its own pairs, which go through the same update.

There is no dense gradient: each row of it is computed, given to Adam, and discarded while it is in cache. From the
gradient of a decoder row, tied or not, the component along this row of W is removed first, because the renormalisation
would undo it.

Shapes: B rows, D d_model, F latents, K active latents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from olmoscope.kernels.dispatch import kernels_for
from olmoscope.kernels.interface import AdamStep, Kernels, Moments, Residual, SortedPairs
from olmoscope.recipe.schema import Activation, Candidates
from olmoscope.sae.io.checkpoint import rule_tensor
from olmoscope.sae.normalize import RowStatistics, restore_rows
from olmoscope.sae.topk import TopK
from olmoscope.train.activation_rules import RULES
from olmoscope.train.adam import Adam, update_parameter
from olmoscope.train.auxiliary import REFRESH_STEPS, AuxiliaryLoss
from olmoscope.train.candidates import CandidateSearch
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.gradients import Gradients, Pull, sorted_together
from olmoscope.train.nested import NestedLoss
from olmoscope.train.orthogonal import move_apart


class Sums(NamedTuple):
    """Sums over rows since they were last taken."""

    loss: float
    l0: float
    auxiliary: float
    """The auxiliary loss, without its weight."""
    auxiliary_rows: float
    """The number of rows that had an auxiliary loss."""
    capped: float
    """The number of rows at the cap of their activation rule."""


class Step:
    """An SAE or transcoder with the state of its optimiser and the counts that training keeps on the device.

    Args:
        auxiliary: settings of the auxiliary loss; None for no such loss.
        kernels: by default those of the SAE's device.
        candidates: settings of the search by candidates; None if the encoder's product is exact.
        activation: the rule that says which latents are active (activation_rules.py).
        matryoshka: shares of the latents that are SAEs of their own (nested.py).
        orthogonal: how strongly similar decoder rows are moved apart (orthogonal.py); 0: not at all.
    """

    def __init__(self, sae: TopK, adam: Adam, auxiliary: SettledAuxiliary | None = None, kernels: Kernels | None = None,
                 candidates: Candidates | None = None, activation: Activation = "topk",
                 matryoshka: Sequence[float] = (), orthogonal: float = 0.0) -> None:
        self.sae = sae
        self.adam = adam
        self.orthogonal = orthogonal
        self.kernels = kernels or kernels_for(sae.W_dec.device)
        self.activation = activation
        self.rule = RULES[activation](sae, self.kernels, self._encode_topk)
        self.nested = NestedLoss(matryoshka, sae.d_sae)
        self.count = 0
        self.tokens = 0
        self.moments = {name: adam.moments_of(name, parameter) for name, parameter in sae.state_dict().items()}
        device = sae.W_dec.device
        self.last_fired_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        """How many tokens had been seen when each latent last fired."""
        self.unit = torch.ones((), dtype=torch.float64)
        """The factor for the learning rate of the biases; on the CPU, because it becomes a scalar argument."""
        self.sums = torch.zeros(len(Sums._fields), dtype=torch.float64, device=device)
        """`Sums`, on the device, because reading them waits for the device."""
        self.auxiliary = AuxiliaryLoss(auxiliary, sae, self.kernels) if auxiliary else None
        self.candidates = CandidateSearch(candidates, sae, self.kernels) if candidates else None

    @torch.no_grad()
    def __call__(self, x_BD: Tensor, lr: float, target_BD: Tensor | None = None, pull: Pull | None = None) -> None:
        """Train on one batch of activations `[B, D]`, any float dtype, on the coder's device.

        Args:
            lr: the learning rate of this step.
            target_BD: the target rows, `[B, D_out]`, if they are not the rows read (train/ends.py).
            pull: an additional loss beside the NMSE.
        """
        sae, kernels, moments = self.sae, self.kernels, self.moments
        x_BD = x_BD.to(sae.W_dec.dtype).contiguous()
        y_BD = x_BD if target_BD is None else target_BD.to(x_BD.dtype).contiguous()
        u_BD, statistics = sae.center(x_BD)
        if self.count == 0:
            self._start(u_BD)
        adam = self.adam.at(self.count + 1, lr)
        values_BK, indices_BK = self.rule.encode(u_BD)
        skip_BD = None if sae.W_skip is None else x_BD @ sae.W_skip.T
        residual = self.nested.residual(kernels, sae, y_BD, values_BK, indices_BK, statistics, skip_BD)
        if pull is not None:
            xhat_BD = kernels.decode(values_BK, indices_BK, sae.W_dec) + sae.b_out
            xhat_BD = restore_rows(xhat_BD if skip_BD is None else xhat_BD + skip_BD, statistics)
            std = 1 if statistics is None else statistics.std_B1  # in e, which is of normalised rows
            e_BD = std * pull(xhat_BD, y_BD, residual.whole.e_BD / std)
            residual = residual.pulled(kernels, sae, e_BD, values_BK, indices_BK)
        self.sums[4] += self.rule.capped(values_BK)
        values_BK, dz_BK = self.rule.learn(values_BK, residual.dz_BK, indices_BK, adam)
        losses = self.nested.gradients(residual, values_BK, dz_BK, indices_BK, u_BD)
        losses += self._auxiliary(y_BD, u_BD, statistics, residual.whole)
        self._count(residual.whole, values_BK, indices_BK)
        db_latent_F, b_pull_D = update_matrices(
            kernels, sae, moments, *sorted_together(kernels, losses, sae.d_sae), adam, self.adam.decoder_rate)
        if self.orthogonal:
            move_apart(sae.W_dec, self.orthogonal * self.adam.decoder_rate, adam, len(x_BD))
        biases = self.adam.at(self.count, lr * float(self.unit))
        update_parameter(sae.b_latent, db_latent_F, moments["b_latent"], biases)
        e_D = losses[0].e_BD.sum(dim=0)
        if sae.b_out is sae.b_in:
            update_parameter(sae.b_in, e_D - b_pull_D, moments["b_pre"], biases)
        else:
            update_parameter(sae.b_in, -b_pull_D, moments["b_in"], biases)
            update_parameter(sae.b_out, e_D, moments["b_out"], biases)
        if sae.W_skip is not None:
            update_parameter(sae.W_skip, losses[0].e_BD.T @ x_BD, moments["W_skip"], adam)
        if self.auxiliary is not None:
            self.auxiliary.lift(values_BK)

    def dead_share(self, window: int) -> float | None:
        """Share of latents that did not fire in the last `window` tokens; None before that many were seen."""
        if self.tokens < window:
            return None
        return float((self.tokens - self.last_fired_F >= window).double().mean())

    def take_sums(self) -> Sums:
        """The sums since the last call; waits for the device."""
        sums = Sums(*self.sums.tolist())
        self.sums.zero_()
        return sums

    def tensors(self) -> dict[str, Tensor]:
        """All state, by name: the SAE's parameters, Adam's moments, and counts."""
        found = self.sae.state_dict() | {"last_fired": self.last_fired_F, "sums": self.sums,
                                         "unit": self.unit}
        found |= {rule_tensor(self.activation, name): tensor for name, tensor in self.rule.tensors().items()}
        for name, moments in self.moments.items():
            found |= {f"adam.{name}.{part}": tensor for part, tensor in vars(moments).items() if tensor is not None}
        if self.auxiliary is not None:
            found["auxiliary.dead"] = self.auxiliary.dead_F
        if self.candidates is not None:
            found |= self.candidates.tensors()
        return found

    def restore(self, count: int, tokens: int, tensor: Callable[[str], Tensor]) -> None:
        """Restore a state.

        Args:
            tensor: gives the tensor that `tensors` had under a name.
        """
        for name, target in self.tensors().items():
            target.copy_(tensor(name))
        self.count, self.tokens = count, tokens
        if self.auxiliary is not None:
            self.auxiliary.list_dead()

    def _start(self, u_BD: Tensor) -> None:
        """Set the state that depends on the first batch."""
        self.rule.start(u_BD)
        if self.adam.scale_biases:
            self.unit.copy_(u_BD.square().mean().sqrt())

    def _encode_topk(self, u_BD: Tensor, b_latent_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.candidates is None:
            return self.kernels.encode_topk(u_BD, self.sae.W_enc, b_latent_F, k)
        return self.candidates.encode(u_BD, b_latent_F, k, self.count)

    def _auxiliary(self, y_BD: Tensor, u_BD: Tensor, statistics: RowStatistics | None,
                   residual: Residual) -> list[Gradients]:
        """Gradients of the auxiliary loss, if there is one and a latent is dead."""
        if self.auxiliary is None:
            return []
        if self.count % REFRESH_STEPS == 0:
            self.auxiliary.look(self.tokens, self.last_fired_F)
        found = self.auxiliary.gradients(y_BD, u_BD, statistics, residual.e_BD, residual.loss_B)
        if found is None:
            return []
        loss_B, gradients = found
        self.sums[2] += loss_B.sum()
        self.sums[3] += len(loss_B)
        return [gradients]

    def _count(self, residual: Residual, values_BK: Tensor, indices_BK: Tensor) -> None:
        self.count += 1
        self.tokens += len(residual.loss_B)
        self.sums[0] += residual.loss_B.sum()
        active_BK = values_BK > 0
        self.sums[1] += active_BK.sum()
        self.last_fired_F.scatter_reduce_(0, indices_BK.flatten(), active_BK.flatten() * self.tokens, "amax")


def update_matrices(kernels: Kernels, sae: TopK, moments: Mapping[str, Moments], pairs: SortedPairs, e_BD: Tensor,
                    u_BD: Tensor, adam: AdamStep, decoder_rate: float) -> tuple[Tensor, Tensor]:
    """Take one step of encoder and decoder, in place; return the gradients for the biases (`Kernels.update_tied`).

    Args:
        moments: the moments of each matrix, by its name.
        decoder_rate: the rate of an untied decoder, as a multiple of `adam`'s.
    """
    if sae.tied:
        return kernels.update_tied(sae.W_dec, moments["W"], pairs, e_BD, u_BD, adam)
    decoder = replace(adam, lr=adam.lr * decoder_rate)
    kernels.update_decoder(sae.W_dec, moments["W_dec"], pairs, e_BD, decoder)
    return kernels.update_encoder(sae.W_enc, moments["W_enc"], pairs, u_BD, adam)
