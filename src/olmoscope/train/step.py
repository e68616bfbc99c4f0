"""One training step of a tied TopK SAE: forward, gradients by hand, Adam, unit norm; all sparse but one product.

Loss: NMSE = mean over rows of ‖x̂ − x‖² / ‖x‖² in raw space (the reference recipe). With e = dL/dx̂ (times the row's
std in a layer-norm SAE), u the centred input and z the codes:

    dz_bj = e_b · W_j  where z_bj > 0          dW_j = Σ_b z_bj e_b + dz_bj u_b
    db_latent_j = Σ_b dz_bj                    db_pre = Σ_b e_b − Σ_j db_latent_j W_j

No dense gradient exists: each row of dW is cleared of its part along the row of W (which the renormalisation would
undo), given to Adam, and used up while it is in cache. Shapes: B rows, D d_model, F latents, K active.
"""

import torch
from torch import Tensor

from olmoscope.kernels.dispatch import kernels_for
from olmoscope.kernels.interface import Kernels, Residual, SortedPairs
from olmoscope.sae.topk import TopK
from olmoscope.train.adam import Adam, bias_moments, update_bias


class Step:
    """An SAE with the state of its optimiser, and what is counted on the device while it trains.

    Args:
        kernels: those of the SAE's device, unless a test wants others.
    """

    def __init__(self, sae: TopK, adam: Adam, kernels: Kernels | None = None) -> None:
        self.sae = sae
        self.adam = adam
        self.kernels = kernels or kernels_for(sae.W_dec_FD.device)
        self.count = 0
        self.tokens = 0
        self.moments = {"W": adam.dictionary_moments(sae.W_dec_FD), "b_latent": bias_moments(sae.b_latent_F),
                        "b_pre": bias_moments(sae.b_pre_D)}
        device = sae.W_dec_FD.device
        self.last_fired_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        """Tokens seen when each latent last fired."""
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        """Over the rows since `take_sums`: of the loss, and of L0. Kept on the device: reading them waits for it."""

    @torch.no_grad()
    def __call__(self, x_BD: Tensor, lr: float) -> None:
        """Train on one batch of activations `[B, D]`, any float dtype, on the SAE's device."""
        sae, kernels, moments = self.sae, self.kernels, self.moments
        x_BD = x_BD.to(sae.W_dec_FD.dtype).contiguous()
        u_BD, statistics = sae.center(x_BD)
        values_BK, indices_BK = kernels.encode_topk(u_BD, sae.W_enc_FD, sae.b_latent_F, sae.k)
        mean_B1, std_B1 = (None, None) if statistics is None else (statistics.mean_B1, statistics.std_B1)
        residual = kernels.residual(x_BD, values_BK, indices_BK, sae.W_dec_FD, sae.b_pre_D, mean_B1, std_B1)
        pairs = kernels.sort_pairs(values_BK, residual.dz_BK, indices_BK, sae.d_sae)
        self._count(residual, pairs)
        adam = self.adam.at(self.count, lr)
        db_latent_F, b_pull_D = kernels.update_dictionary(sae.W_dec_FD, moments["W"], pairs, residual.e_BD, u_BD, adam)
        update_bias(sae.b_latent_F, db_latent_F, moments["b_latent"], adam)
        update_bias(sae.b_pre_D, residual.e_BD.sum(dim=0) - b_pull_D, moments["b_pre"], adam)

    def dead_share(self, window: int) -> float:
        """Share of latents that did not fire in the last `window` tokens; 0 before that many were seen."""
        return float((self.tokens - self.last_fired_F >= window).double().mean())

    def take_sums(self) -> tuple[float, float]:
        """Sum over rows of loss and of L0 since the last call; waits for the device."""
        loss, l0 = self.sums.tolist()
        self.sums.zero_()
        return loss, l0

    def _count(self, residual: Residual, pairs: SortedPairs) -> None:
        self.count += 1
        self.tokens += len(residual.loss_B)
        self.sums[0] += residual.loss_B.sum()
        self.sums[1] += pairs.offsets[-1]
        self.last_fired_F.masked_fill_(pairs.offsets.diff() > 0, self.tokens)
