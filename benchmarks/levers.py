"""The training step with levers that are no settings of the product; docs/recipe-study.md tells what they did.

Built of the package's own step, losses and kernels: a lever that wins would cost the same there. Shapes as in
olmoscope.train.step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.kernels.interface import SortedPairs
from olmoscope.sae.topk import TopK
from olmoscope.train.adam import Adam, update_parameter
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.gradients import Gradients, sorted_together
from olmoscope.train.step import Step


@dataclass(frozen=True)
class Levers:
    """One way to train; by default a rate of 1e-3 and nothing else."""

    order: str = "shuffled"
    batch: int = 256
    lr: float = 1e-3
    decoder_rate: float = 1.0
    scale_biases: bool = False
    decay: float = 0.2
    """Share of the steps over which the rate falls linearly to 0, at the end."""
    warmup: float = 0.0
    """Share of the steps over which it rises, at the start."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    adam: str = "exact"
    normalize: str = "none"
    weights: str = "tied"
    init: str = "random"
    """Rows of unit norm: `random`, or `data` (centred training rows)."""
    encoder_scale: float = 1.0
    """Untied: rows of the encoder start as this times those of the decoder."""
    k_aux: int = 0
    """The auxiliary loss's k; 0: no such loss."""
    aux: float = 1 / 32
    aux_window: int = 20_480
    aux_lift: float = 0.0
    """Of the auxiliary loss: how fast biases of dead latents rise."""
    lift: float = 0.0
    """The bias of a quiet latent rises, over `lift_window` tokens, by this times the mean k-th activation."""
    lift_window: int = 50_000
    """Tokens without firing after which a latent is quiet."""
    resample: int = 0
    """Tokens between revivals: latents dead for as long become residuals of badly reconstructed rows of the batch."""
    anneal: int = 0
    """k falls linearly from here to k over the first half of the steps."""
    multi: int = 0
    """Multi-TopK: a second loss, an eighth of the first, with this many times k."""
    clip: float = 0.0
    """Largest norm of the gradient of the matrices together."""
    ema: float = 0.0
    """Decay of the running mean of the weights; the mean is evaluated."""


class LeverStep(Step):
    """An SAE in training under `Levers`."""

    def __init__(self, sae: TopK, levers: Levers, steps: int, seed: int) -> None:
        auxiliary = None
        if levers.k_aux:
            auxiliary = SettledAuxiliary(weight=levers.aux, k=levers.k_aux, dead_window=levers.aux_window,
                                         lift=levers.aux_lift)
        super().__init__(sae, Adam(levers.betas, levers.eps, levers.adam,  # type: ignore[arg-type]
                                   decoder_rate=levers.decoder_rate, scale_biases=levers.scale_biases), auxiliary)
        self.levers, self.steps = levers, steps
        self.rng = torch.Generator().manual_seed(seed + 1)
        self.last_used_F = torch.zeros_like(self.last_fired_F)
        """As `last_fired_F`, but a revival counts: nobody is revived twice within the window."""
        self.mean = {name: value.clone() for name, value in sae.state_dict().items()} if levers.ema else {}

    def rate(self) -> float:
        """The learning rate of the step to come."""
        levers, left = self.levers, self.steps - self.count
        decay = min(1.0, left / (levers.decay * self.steps)) if levers.decay else 1.0
        return levers.lr * min(decay, (self.count + 1) / (levers.warmup * self.steps) if levers.warmup else 1.0)

    @torch.no_grad()
    def __call__(self, x_BD: Tensor, lr: float) -> None:
        sae, levers, kernels, moments = self.sae, self.levers, self.kernels, self.moments
        x_BD = x_BD.to(sae.W_dec.dtype).contiguous()
        u_BD, statistics = sae.center(x_BD)
        if self.count == 0:
            self._start(u_BD)
        mean_B1, std_B1 = (None, None) if statistics is None else (statistics.mean_B1, statistics.std_B1)
        k = self._k()
        wide_BK, places_BK = kernels.encode_topk(u_BD, sae.W_enc, sae.b_latent, k * max(1, levers.multi))
        values_BK, indices_BK = wide_BK[:, :k].contiguous(), places_BK[:, :k].contiguous()
        residual = kernels.residual(x_BD, values_BK, indices_BK, sae.W_dec, sae.b_out, mean_B1, std_B1)
        losses = [Gradients(values_BK, residual.dz_BK, indices_BK, residual.e_BD, u_BD)]
        e_sum_D = residual.e_BD.sum(dim=0)
        if levers.multi:
            more = kernels.residual(x_BD, wide_BK, places_BK, sae.W_dec, sae.b_out, mean_B1, std_B1)
            losses.append(Gradients(wide_BK, more.dz_BK / 8, places_BK, more.e_BD / 8, u_BD))
            e_sum_D += more.e_BD.sum(dim=0) / 8
        losses += self._auxiliary(x_BD, u_BD, statistics, residual)
        self._count(residual, values_BK, indices_BK)
        adam = self.adam.at(self.count, lr)
        pairs, e_RD, u_RD = sorted_together(kernels, losses, sae.d_sae)
        if levers.clip:
            factor = min(1.0, levers.clip / self._norm(pairs, e_RD, u_RD))
            e_RD = e_RD * factor
            pairs = SortedPairs(pairs.offsets, pairs.rows, pairs.values, pairs.gradients * factor)
        db_latent_F, b_pull_D = self._update_matrices(pairs, e_RD, u_RD, adam)
        biases = self.adam.at(self.count, lr * float(self.unit))
        update_parameter(sae.b_latent, db_latent_F, moments["b_latent"], biases)
        update_parameter(sae.b_in, e_sum_D - b_pull_D, moments["b_pre"], biases)
        if self.auxiliary is not None:
            self.auxiliary.lift(values_BK)
        if levers.lift:
            quiet_F = self.tokens - self.last_fired_F >= levers.lift_window
            sae.b_latent.add_(quiet_F * float(levers.lift * values_BK[:, -1].mean() * len(x_BD) / levers.lift_window))
        if levers.resample and self.tokens % levers.resample < len(x_BD) and self.count < 0.6 * self.steps:
            self._resample(residual.loss_B, residual.e_BD)
        for name, value in self.mean.items():
            value.lerp_(sae.state_dict()[name], 1 - min(levers.ema, self.count / (self.count + 10)))

    def finished(self) -> TopK:
        """The SAE to evaluate."""
        if not self.mean:
            return self.sae
        sae = TopK.from_state_dict(self.mean, k=self.sae.k, normalize=self.sae.normalize)
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        return sae

    def _k(self) -> int:
        share = min(1.0, 2 * self.count / self.steps)
        return round(self.levers.anneal * (1 - share) + self.sae.k * share) if self.levers.anneal else self.sae.k

    def _norm(self, pairs: SortedPairs, e_RD: Tensor, u_RD: Tensor) -> float:
        """Of the gradient of the matrices."""
        count = int(pairs.offsets[-1])
        rows_P, latents_P = pairs.rows[:count].long(), torch.arange(self.sae.d_sae).repeat_interleave(
            pairs.offsets.diff())
        decoder_FD = torch.zeros_like(self.sae.W_dec)
        decoder_FD.index_add_(0, latents_P, pairs.values[:count, None] * e_RD[rows_P])
        encoder_FD = decoder_FD if self.sae.tied else torch.zeros_like(decoder_FD)
        encoder_FD.index_add_(0, latents_P, pairs.gradients[:count, None] * u_RD[rows_P])
        return float(decoder_FD.norm() if self.sae.tied else torch.hypot(decoder_FD.norm(), encoder_FD.norm()))

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
