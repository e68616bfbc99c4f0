"""A training step with levers that are not settings of the product (levers.py). Shapes as in olmoscope.train.step."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lever_updates import aligned, dense_gradients, limited, momentum_update, per_row
from olmoscope.kernels.interface import AdamStep, SortedPairs
from olmoscope.recipe.schema import CoderConfig, Recipe
from olmoscope.sae.topk import TopK
from olmoscope.train.adam import Adam, update_parameter
from olmoscope.train.derived import settled
from olmoscope.train.gradients import Gradients, sorted_together
from olmoscope.train.step import Pull, Step, update_matrices

RATE_MEMORY = 0.99
"""Decay of the running firing rates in each step."""


@dataclass(frozen=True)
class Levers:
    """Changes to training; by default none."""

    data_rows: bool = False
    """Both matrices start as training rows (centred, unit norm)."""
    encoder_scale: float = 1.0
    """Rows of the encoder start as this factor times those of the decoder."""
    warmup: float = 0.0
    """Share of the steps over which the rate rises."""
    resample: int = 0
    """Tokens between revivals: latents that have been dead for this long become residuals of badly reconstructed rows
    of the batch."""
    anneal: int = 0
    """k falls linearly from this value to k over the first half of the steps."""
    multi: int = 0
    """Multi-TopK: a second loss, an eighth of the first, with this many times k."""
    clip: float = 0.0
    """Largest norm of the gradient of both matrices together."""
    ema: float = 0.0
    """Decay of the running mean of the weights; this mean is evaluated."""
    optimiser: Literal["adam", "signum", "muon"] = "adam"
    """The optimiser of the matrices (lever_updates.py)."""
    rate: float = 1.0
    """The matrices' learning rate is this factor times the derived one."""
    restarts: tuple[float, ...] = ()
    """Shares of the steps after which Adam's moments of the matrices are reset: the first to 0, the second to its mean
    over the latents."""
    row_rates: float = 0.0
    """A latent's learning rate is multiplied by (mean firing rate / its firing rate) to this power, limited to the
    range 1/2 to 2."""
    aligned: bool = False
    """Each encoder row has an inner product of 1 with its decoder row (arXiv:2605.18629)."""
    frequency: float = 0.0
    """The bias of a latent that fires in more than a tenth of the rows falls by this factor times the rate."""
    rare_decay: float = 0.0
    """Weight decay, times the rate, of encoder rows of latents that fire less than a quarter as often as the mean."""
    space: Literal["rows", "whitened", "read by the model"] = "rows"
    """The rows that are encoded and reconstructed: unchanged; whitened (arXiv:2511.13981); or stretched along the
    directions on which the model's loss depends (lever_spaces.py). The finished SAE has the transformation and its
    inverse in its weights."""


@dataclass(frozen=True)
class Space:
    """A linear change of rows, x ↦ (x − origin) to_DD."""

    origin_D: Tensor
    to_DD: Tensor


class LeverStep(Step):
    """An SAE in training under `Levers`."""

    def __init__(self, recipe: Recipe, spec: CoderConfig, sae: TopK, levers: Levers, steps: int, x_BD: Tensor,
                 space: Space | None) -> None:
        """
        Args:
            x_BD: some training rows, at least `d_sae` if latents start from them.
            space: the space that `levers.space` names; None: unchanged rows.
        """
        settings = settled(recipe, spec)
        super().__init__(sae, Adam.of(settings), settings.auxiliary)
        self.levers, self.steps, self.space = levers, steps, space
        self.rng = torch.Generator().manual_seed(settings.seed + 1)
        if space is not None:
            sae.b_in.copy_((sae.b_in - space.origin_D) @ space.to_DD)
        if levers.data_rows:
            order = torch.randperm(len(x_BD), generator=self.rng)[:sae.d_sae]
            rows_FD = sae.center(x_BD[order].float())[0]
            for matrix_FD in (sae.W_enc, sae.W_dec):
                matrix_FD.copy_(rows_FD / rows_FD.norm(dim=1, keepdim=True))
        if not sae.tied:
            sae.W_enc.mul_(levers.encoder_scale)
        self.last_used_F = torch.zeros_like(self.last_fired_F)
        """Like `last_fired_F`, but a revival counts too: no latent is revived twice within the window."""
        self.mean = {name: value.clone() for name, value in sae.state_dict().items()} if levers.ema else {}
        self.rate_F = torch.full((sae.d_sae,), sae.k / sae.d_sae)
        """Running share of the rows in which each latent fires."""

    @torch.no_grad()
    def __call__(self, x_BD: Tensor, lr: float, target_BD: Tensor | None = None, pull: Pull | None = None) -> None:
        sae, levers, kernels, moments = self.sae, self.levers, self.kernels, self.moments
        if pull is not None:
            raise ValueError("a run with train.finish cannot be trained again with levers")
        x_BD, y_BD = self._in_space(x_BD), self._in_space(x_BD if target_BD is None else target_BD)
        u_BD, statistics = sae.center(x_BD)
        if self.count == 0:
            self._start(u_BD)
        if self.count in [round(share * self.steps) for share in levers.restarts]:
            self._restart()
        if levers.warmup:
            lr *= min(1.0, (self.count + 1) / (levers.warmup * self.steps))
        mean_B1, std_B1 = (None, None) if statistics is None else (statistics.mean_B1, statistics.std_B1)
        k = self._k()
        wide_BK, places_BK = kernels.encode_topk(u_BD, sae.W_enc, sae.b_latent, k * max(1, levers.multi))
        values_BK, indices_BK = wide_BK[:, :k].contiguous(), places_BK[:, :k].contiguous()
        residual = kernels.residual(y_BD, values_BK, indices_BK, sae.W_dec, sae.b_out, mean_B1, std_B1)
        losses = [Gradients(values_BK, residual.dz_BK, indices_BK, residual.e_BD, u_BD)]
        e_sum_D = residual.e_BD.sum(dim=0)
        if levers.multi:
            more = kernels.residual(y_BD, wide_BK, places_BK, sae.W_dec, sae.b_out, mean_B1, std_B1)
            losses.append(Gradients(wide_BK, more.dz_BK / 8, places_BK, more.e_BD / 8, u_BD))
            e_sum_D += more.e_BD.sum(dim=0) / 8
        losses += self._auxiliary(y_BD, u_BD, statistics, residual)
        self._count(residual, values_BK, indices_BK)
        fired_F = torch.bincount(indices_BK[values_BK > 0], minlength=sae.d_sae) / len(x_BD)
        self.rate_F.lerp_(fired_F, 1 - RATE_MEMORY)
        adam = self.adam.at(self.count, lr * levers.rate)
        pairs, e_RD, u_RD = sorted_together(kernels, losses, sae.d_sae)
        if levers.clip:
            factor = min(1.0, levers.clip / self._norm(pairs, e_RD, u_RD))
            e_RD = e_RD * factor
            pairs = SortedPairs(pairs.offsets, pairs.rows, pairs.values, pairs.gradients * factor)
        db_latent_F, b_pull_D = self._update_under_levers(pairs, e_RD, u_RD, adam)
        biases = self.adam.at(self.count, lr * float(self.unit))
        update_parameter(sae.b_latent, db_latent_F, moments["b_latent"], biases)
        update_parameter(sae.b_in, e_sum_D - b_pull_D, moments["b_pre"], biases)
        if self.auxiliary is not None:
            self.auxiliary.lift(values_BK)
        if levers.frequency:
            sae.b_latent.sub_(biases.lr * levers.frequency * (self.rate_F > 0.1))
        if levers.resample and self.tokens % levers.resample < len(x_BD) and self.count < 0.6 * self.steps:
            self._resample(residual.loss_B, residual.e_BD)
        self._average()
        if self.space is not None and self.count == self.steps:
            self._leave(self.space)

    def _in_space(self, x_BD: Tensor) -> Tensor:
        x_BD = x_BD.to(self.sae.W_dec.dtype).contiguous()
        return x_BD if self.space is None else (x_BD - self.space.origin_D) @ self.space.to_DD

    def _leave(self, space: Space) -> None:
        """Fold the space into the weights. Rows of the decoder no longer have unit norm, which would change the top
        k."""
        sae = self.sae
        back_DD = torch.linalg.inv(space.to_DD.double())
        sae.W_enc.copy_(sae.W_enc.double() @ space.to_DD.double().T)
        sae.W_dec.copy_(sae.W_dec.double() @ back_DD)
        sae.b_in.copy_(sae.b_in.double() @ back_DD + space.origin_D)

    def _update_under_levers(self, pairs: SortedPairs, e_BD: Tensor, u_BD: Tensor,
                             adam: AdamStep) -> tuple[Tensor, Tensor]:
        """Update encoder and decoder; returns the biases' gradients that the update gives."""
        levers, sae = self.levers, self.sae
        update = partial(update_matrices, self.kernels, sae, self.moments, pairs, e_BD, u_BD, adam,
                         self.adam.decoder_rate)
        if levers.optimiser != "adam":
            found = momentum_update(self, pairs, e_BD, u_BD, adam.lr, levers.optimiser)
        elif levers.row_rates:
            factor_F = limited(self.rate_F.mean() / self.rate_F, levers.row_rates)
            found = per_row(sae, factor_F, update)
        else:
            found = update()
        if levers.rare_decay:
            rare_F = self.rate_F < self.rate_F.mean() / 4
            sae.W_enc.mul_(1 - adam.lr * levers.rare_decay * rare_F[:, None])
        if levers.aligned:
            aligned(sae.W_enc, sae.W_dec)
        return found

    def _restart(self) -> None:
        for name, moments in self.moments.items():
            if name.startswith("W"):
                moments.first.zero_()
                moments.second.copy_(moments.second.mean(dim=0).expand_as(moments.second))

    def _k(self) -> int:
        share = min(1.0, 2 * self.count / self.steps)
        return round(self.levers.anneal * (1 - share) + self.sae.k * share) if self.levers.anneal else self.sae.k

    def _average(self) -> None:
        """Update the running mean of the weights, which replaces them after the last step."""
        now = self.sae.state_dict()
        for name, value in self.mean.items():
            value.lerp_(now[name], 1 - min(self.levers.ema, self.count / (self.count + 10)))
            if self.count == self.steps:
                now[name].copy_(value)
        if self.mean and self.count == self.steps:
            self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True))

    def _norm(self, pairs: SortedPairs, e_RD: Tensor, u_RD: Tensor) -> float:
        """The norm of the gradient of both matrices."""
        encoder_FD, decoder_FD = dense_gradients(self.sae, pairs, e_RD, u_RD)
        return float((encoder_FD + decoder_FD).norm() if self.sae.tied
                     else torch.hypot(encoder_FD.norm(), decoder_FD.norm()))

    def _resample(self, loss_B: Tensor, e_BD: Tensor) -> None:
        sae = self.sae
        torch.maximum(self.last_used_F, self.last_fired_F, out=self.last_used_F)
        dead_M = (self.tokens - self.last_used_F >= self.levers.resample).nonzero()[:, 0][:len(loss_B) // 4]
        if not len(dead_M):
            return
        chosen_M = torch.multinomial(loss_B.float().square(), len(dead_M), generator=self.rng)
        rows_MD = -e_BD[chosen_M] / e_BD[chosen_M].norm(dim=1, keepdim=True)
        sae.W_enc[dead_M] = rows_MD * sae.W_enc.norm(dim=1).mean()
        sae.W_dec[dead_M] = rows_MD
        sae.b_latent[dead_M] = 0.0
        for name, moments in self.moments.items():
            if name != "b_pre":
                moments.first[dead_M] = 0.0
                moments.second[dead_M] = moments.second.mean(dim=0)
        self.last_used_F[dead_M] = self.tokens
