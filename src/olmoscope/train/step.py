"""One training step of a tied TopK SAE: forward, gradients by hand, Adam, unit norm; all sparse but one product.

Loss: NMSE = mean over rows of ‖x̂ − x‖² / ‖x‖² in raw space (the reference recipe). With e = dL/dx̂ (times the row's
std in a layer-norm SAE), u the centred input and z the codes:

    dz_bj = e_b · W_j  where z_bj > 0          dW_j = Σ_b z_bj e_b + dz_bj u_b
    db_latent_j = Σ_b dz_bj                    db_pre = Σ_b e_b − Σ_j db_latent_j W_j

No dense gradient exists: each chunk of dW is cleared of its part along the row (which the renormalisation would undo),
given to Adam and renormalised before the next chunk is made. Shapes: B rows, D d_model, F latents, K active.
"""

import torch
from torch import Tensor

from olmoscope.kernels import reference as kernels
from olmoscope.sae.rows import RowStatistics, restore_rows
from olmoscope.sae.tied_topk import TiedTopK
from olmoscope.train.adam import Adam, Moments


class Step:
    """An SAE with the state of its optimiser, and what is counted on the device while it trains."""

    def __init__(self, sae: TiedTopK, adam: Adam) -> None:
        self.sae = sae
        self.adam = adam
        self.count = 0
        self.tokens = 0
        self.moments = {"W": Moments.zeros_like(sae.W_FD), "b_latent": Moments.zeros_like(sae.b_latent_F),
                        "b_pre": Moments.zeros_like(sae.b_pre_D)}
        device = sae.W_FD.device
        self.last_fired_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        """Tokens seen when each latent last fired."""
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        """Over the rows since `take_sums`: of the loss, and of L0. Kept on the device: reading them waits for it."""

    @torch.no_grad()
    def __call__(self, x_BD: Tensor, lr: float) -> None:
        """Train on one batch of activations `[B, D]`, any float dtype, on the SAE's device."""
        sae = self.sae
        x_BD = x_BD.to(sae.W_FD.dtype)
        u_BD, statistics = sae.center(x_BD)
        values_BK, indices_BK = kernels.encode_topk(u_BD, sae.W_FD, sae.b_latent_F, sae.k)
        normal_BD = kernels.decode(values_BK, indices_BK, sae.W_FD).add_(sae.b_pre_D)
        e_BD = self._loss_gradient(x_BD, normal_BD, statistics)
        dz_BK = kernels.code_gradient(e_BD, values_BK, indices_BK, sae.W_FD)
        self._count_fired(values_BK, indices_BK)
        self._update(kernels.sort_pairs(values_BK, dz_BK, indices_BK, sae.d_sae), e_BD, u_BD, lr)

    def dead_share(self, window: int) -> float:
        """Share of latents that did not fire in the last `window` tokens; 0 before that many were seen."""
        return float((self.tokens - self.last_fired_F >= window).double().mean())

    def take_sums(self) -> tuple[float, float]:
        """Sum over rows of loss and of L0 since the last call; waits for the device."""
        loss, l0 = self.sums.tolist()
        self.sums.zero_()
        return loss, l0

    def _loss_gradient(self, x_BD: Tensor, normal_BD: Tensor, statistics: RowStatistics | None) -> Tensor:
        error_BD = restore_rows(normal_BD, statistics).sub_(x_BD)
        # A row of zeros has no NMSE; the floor keeps it from turning the parameters into NaN.
        power_B1 = x_BD.square().sum(dim=1, keepdim=True).clamp_min_(torch.finfo(x_BD.dtype).tiny)
        loss_B1 = error_BD.square().sum(dim=1, keepdim=True).div_(power_B1)
        self.sums[0] += loss_B1.sum(dtype=torch.float64)
        scale_B1 = 2 / (len(x_BD) * power_B1)
        if statistics is not None:
            scale_B1 = scale_B1 * statistics.std_B1
        return error_BD.mul_(scale_B1)

    def _count_fired(self, values_BK: Tensor, indices_BK: Tensor) -> None:
        self.tokens += len(values_BK)
        active_BK = values_BK > 0
        self.sums[1] += active_BK.sum()
        self.last_fired_F.scatter_reduce_(0, indices_BK.flatten(), active_BK.flatten() * self.tokens, "amax")

    def _update(self, pairs: kernels.SortedPairs, e_BD: Tensor, u_BD: Tensor, lr: float) -> None:
        sae, adam = self.sae, self.adam
        self.count += 1
        db_latent_F = kernels.bias_gradient(pairs)
        db_pre_D = e_BD.sum(dim=0)
        for chunk, dW_CD in kernels.dictionary_gradients(pairs, e_BD, u_BD):
            W_CD = sae.W_FD[chunk]
            db_pre_D.addmv_(W_CD.T, db_latent_F[chunk], alpha=-1)
            dW_CD.addcmul_(W_CD, torch.linalg.vecdot(dW_CD, W_CD).unsqueeze(1), value=-1)
            adam.update_(W_CD, dW_CD, self.moments["W"][chunk], lr, self.count)
            W_CD.div_(W_CD.norm(dim=1, keepdim=True))
        adam.update_(sae.b_latent_F, db_latent_F, self.moments["b_latent"], lr, self.count)
        adam.update_(sae.b_pre_D, db_pre_D, self.moments["b_pre"], lr, self.count)
