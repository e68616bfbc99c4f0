"""A training step with every lever of docs/recipes.md, those too that are no settings of the product.

Built of the package's own kernels, so that a lever that wins costs the same in the product. Shapes as in
olmoscope.train.step; R rows of all parts of the loss (the batch once for each).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olmoscope.kernels.compile import compiled
from olmoscope.kernels.dispatch import kernels_for
from olmoscope.kernels.interface import AdamStep, SortedPairs
from olmoscope.sae.topk import TopK
from olmoscope.train.adam import Adam, bias_moments, update_bias


@dataclass(frozen=True)
class Levers:
    """One way to train; the defaults are the package's before this study."""

    order: str = "shuffled"
    batch: int = 512
    lr: float = 1e-3
    decay: float = 0.2
    """Share of the steps over which the rate falls linearly to 0."""
    warmup: float = 0.0
    """Share of the steps over which it rises."""
    betas: tuple[float, float] = (0.9, 0.999)
    adam: str = "exact"
    normalize: str = "none"
    tied: bool = True
    init: str = "random"
    """Rows: `random`, `data` (centred training rows of unit norm), or `mixed` (data rows plus as much noise)."""
    encoder_scale: float = 1.0
    """Untied: rows of the encoder start as this times those of the decoder."""
    aux: float = 0.0
    """Weight of the auxiliary loss: dead latents reconstruct the detached residual."""
    k_aux: int = 128
    aux_window: int = 50_000
    """Tokens without firing after which a latent is dead to the auxiliary loss."""
    resample: int = 0
    """Tokens between revivals: latents dead for as long become badly reconstructed rows of the batch."""
    resample_until: float = 0.8
    resample_to: str = "rows"
    """`rows`, or `residuals` of these rows."""
    anneal: int = 0
    """k starts here and falls linearly to k..."""
    anneal_share: float = 0.5
    """...over this share of the steps."""
    multi: int = 0
    """Multi-TopK: a second loss with this many times k..."""
    multi_weight: float = 0.125
    clip: float = 0.0
    """Largest norm of the gradient of the dictionary."""
    ema: float = 0.0
    """Decay of the running mean of the weights that is evaluated in the end."""


class LeverStep:
    """An SAE in training under `Levers`."""

    def __init__(self, sae: TopK, levers: Levers, steps: int, seed: int) -> None:
        self.sae, self.levers, self.steps = sae, levers, steps
        self.kernels = kernels_for(sae.W_dec_FD.device)
        self.adam = Adam(levers.betas, 1e-8, levers.adam)  # type: ignore[arg-type]
        self.dec = self.adam.dictionary_moments(sae.W_dec_FD)
        self.enc = self.adam.dictionary_moments(sae.W_enc_FD)
        self.b_latent, self.b_pre = bias_moments(sae.b_latent_F), bias_moments(sae.b_pre_D)
        self.count = self.tokens = 0
        self.last_fired_F = torch.zeros(sae.d_sae, dtype=torch.int64)
        self.last_used_F = torch.zeros(sae.d_sae, dtype=torch.int64)
        """As `last_fired_F`, but a revival counts: nobody is revived twice within the window."""
        self.rng = torch.Generator().manual_seed(seed + 1)
        self.next_resample = levers.resample
        self.ema = {name: value.clone() for name, value in sae.parameters().items()} if levers.ema else None
        self.loss = 0.0

    def rate(self) -> float:
        """The learning rate of the step to come."""
        levers, left = self.levers, self.steps - self.count
        decay = min(1.0, left / (levers.decay * self.steps)) if levers.decay else 1.0
        return levers.lr * min(decay, (self.count + 1) / (levers.warmup * self.steps) if levers.warmup else 1.0)

    @torch.no_grad()
    def __call__(self, x_BD: Tensor) -> None:
        sae, levers, kernels = self.sae, self.levers, self.kernels
        lr = self.rate()
        x_BD = x_BD.float().contiguous()
        u_BD, statistics = sae.center(x_BD)
        mean_B1, std_B1 = (None, None) if statistics is None else (statistics.mean_B1, statistics.std_B1)
        k = self._k()
        values_BK, indices_BK = kernels.encode_topk(u_BD, sae.W_enc_FD, sae.b_latent_F, k * max(1, levers.multi))
        main = kernels.residual(x_BD, values_BK[:, :k].contiguous(), indices_BK[:, :k].contiguous(), sae.W_dec_FD,
                                sae.b_pre_D, mean_B1, std_B1)
        parts = [(values_BK[:, :k], indices_BK[:, :k], main.dz_BK, main.e_BD)]
        if levers.multi:
            wide = kernels.residual(x_BD, values_BK, indices_BK, sae.W_dec_FD, sae.b_pre_D, mean_B1, std_B1)
            weight = levers.multi_weight
            parts.append((values_BK, indices_BK, wide.dz_BK * weight, wide.e_BD * weight))
        self.count += 1
        self.tokens += len(x_BD)
        self.loss += float(main.loss_B.sum())
        fired = torch.unique(indices_BK[:, :k][values_BK[:, :k] > 0])
        self.last_fired_F[fired] = self.tokens
        self.last_used_F[fired] = self.tokens
        if levers.aux:
            assert statistics is None
            x2_B1 = x_BD.square().sum(1, keepdim=True).clamp_min(1e-30)
            residual_BD = main.e_BD * (-0.5 * len(x_BD)) * x2_B1
            if (part := self._auxiliary(u_BD, residual_BD)) is not None:
                parts.append(part)
        db_latent_F, b_pull_D = self._update(parts, u_BD, self.adam.at(self.count, lr))
        update_bias(sae.b_latent_F, db_latent_F, self.b_latent, self.adam.at(self.count, lr))
        update_bias(sae.b_pre_D, sum(e_BD.sum(0) for _, _, _, e_BD in parts[:2 if levers.multi else 1]) - b_pull_D,
                    self.b_pre, self.adam.at(self.count, lr))
        if levers.resample and self.tokens >= self.next_resample and self.count < levers.resample_until * self.steps:
            self.next_resample += levers.resample
            self._resample(u_BD, main.loss_B, main.e_BD)
        if self.ema:
            for name, value in sae.parameters().items():
                self.ema[name].lerp_(value, 1 - min(levers.ema, self.count / (self.count + 10)))

    def finished(self) -> TopK:
        """The SAE to evaluate."""
        if not self.ema:
            return self.sae
        sae = TopK.of(self.ema, self.sae.k, self.sae.normalize)
        sae.W_dec_FD.div_(sae.W_dec_FD.norm(dim=1, keepdim=True))
        return sae

    def _k(self) -> int:
        levers, k = self.levers, self.sae.k
        if not levers.anneal:
            return k
        share = min(1.0, self.count / (levers.anneal_share * self.steps))
        return round(levers.anneal + (k - levers.anneal) * share)

    def _auxiliary(self, u_BD: Tensor, residual_BD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """‖r − r̂‖² / ‖r‖² of the residual r, by the most active dead latents."""
        dead = (self.tokens - self.last_fired_F >= self.levers.aux_window).nonzero()[:, 0]
        if len(dead) == 0:
            return None
        sae = self.sae
        pre = torch.addmm(sae.b_latent_F[dead], u_BD, sae.W_enc_FD[dead].T)
        values, places = pre.topk(min(self.levers.k_aux, len(dead)))
        values, indices = values.relu(), dead[places]
        out = self.kernels.residual(residual_BD, values, indices, sae.W_dec_FD, torch.zeros_like(sae.b_pre_D), None,
                                    None)
        weight = self.levers.aux
        return values, indices, out.dz_BK * weight, out.e_BD * weight

    def _update(self, parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], u_BD: Tensor,
                adam: AdamStep) -> tuple[Tensor, Tensor]:
        sae, kernels, most = self.sae, self.kernels, max(part[0].shape[1] for part in parts)

        def stacked(place: int) -> Tensor:
            return torch.cat([torch.nn.functional.pad(part[place], (0, most - part[place].shape[1]))
                              for part in parts]).contiguous()

        values_RK, indices_RK, dz_RK = stacked(0), stacked(1), stacked(2)
        e_RD, u_RD = torch.cat([part[3] for part in parts]), u_BD.repeat(len(parts), 1)
        pairs = kernels.sort_pairs(values_RK, dz_RK, indices_RK, sae.d_sae)
        if self.levers.clip:
            norm = self._norm(pairs, e_RD, u_RD)
            factor = min(1.0, self.levers.clip / max(norm, 1e-30))
            e_RD.mul_(factor)
            pairs = SortedPairs(pairs.offsets, pairs.rows, pairs.values, pairs.gradients * factor)
        if sae.tied:
            return kernels.update_dictionary(sae.W_dec_FD, self.dec, pairs, e_RD, u_RD, adam)
        alone = SortedPairs(pairs.offsets, pairs.rows, pairs.values, torch.zeros_like(pairs.gradients))
        kernels.update_dictionary(sae.W_dec_FD, self.dec, alone, e_RD, u_RD, adam)
        db_latent_F = torch.empty(sae.d_sae)
        numbers = torch.tensor([adam.rate, adam.root_scale, adam.beta1, adam.beta2, adam.eps])
        before = sae.W_enc_FD.clone()
        update_encoder(*(tensor.numpy() for tensor in (
            sae.W_enc_FD, self.enc.first, self.enc.second, pairs.offsets, pairs.rows, pairs.gradients, u_RD, numbers,
            db_latent_F)))
        return db_latent_F, db_latent_F @ before

    def _norm(self, pairs: SortedPairs, e_RD: Tensor, u_RD: Tensor) -> float:
        count = int(pairs.offsets[-1])
        rows = pairs.rows[:count].long()
        latents = torch.repeat_interleave(torch.arange(self.sae.d_sae), pairs.offsets.diff())
        gradient_FD = torch.zeros_like(self.sae.W_dec_FD)
        gradient_FD.index_add_(0, latents, pairs.values[:count, None] * e_RD[rows])
        gradient_FD.index_add_(0, latents, pairs.gradients[:count, None] * u_RD[rows])
        return float(gradient_FD.norm())

    def _resample(self, u_BD: Tensor, loss_B: Tensor, e_BD: Tensor) -> None:
        sae, levers = self.sae, self.levers
        dead = (self.tokens - self.last_used_F >= levers.resample).nonzero()[:, 0]
        dead = dead[torch.randperm(len(dead), generator=self.rng)[:len(u_BD) // 4]]
        if len(dead) == 0:
            return
        chosen = torch.multinomial(loss_B.float().square(), len(dead), generator=self.rng)
        rows = u_BD[chosen] if levers.resample_to == "rows" else -e_BD[chosen]
        rows = rows / rows.norm(dim=1, keepdim=True)
        alive = self.tokens - self.last_fired_F < levers.resample
        sae.W_dec_FD[dead] = rows
        if not sae.tied:
            sae.W_enc_FD[dead] = rows * sae.W_enc_FD[alive].norm(dim=1).mean()
        sae.b_latent_F[dead] = 0.0
        for moments in (self.dec, self.enc, self.b_latent):
            moments.first[dead] = 0.0
            moments.second[dead] = moments.second[alive].mean(0)
        self.last_used_F[dead] = self.tokens


@compiled()
def update_encoder(W_FD, first_FD, second_FD, offsets, rows_P, gradients_P, u_RD, numbers, db_latent_F):  # type: ignore
    """Adam on the rows of an untied encoder: the gradient of row j is Σ dz u."""
    rate, root_scale, beta1, beta2, eps = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    one = np.float32(1)
    gradient = np.empty(W_FD.shape[1], np.float32)
    for latent in range(len(W_FD)):
        gradient[:] = 0
        db = np.float32(0)
        for pair in range(offsets[latent], offsets[latent + 1]):
            weight = gradients_P[pair]
            db += weight
            row = rows_P[pair]
            for d in range(len(gradient)):
                gradient[d] += weight * u_RD[row, d]
        db_latent_F[latent] = db
        for d in range(len(gradient)):
            g = gradient[d]
            m = beta1 * first_FD[latent, d] + (one - beta1) * g
            v = beta2 * second_FD[latent, d] + (one - beta2) * g * g
            first_FD[latent, d] = m
            second_FD[latent, d] = v
            W_FD[latent, d] -= rate * m / (np.sqrt(v) * root_scale + eps)
