"""The auxiliary loss that gives dead latents a gradient (AuxK; Gao et al. 2024, arXiv:2406.04093, section 3.3).

With r = x − x̂ of the main loss, held fixed, and z′ = ReLU(TopK_k_aux) over the dead latents' pre-activations alone:

    weight · mean over rows of ‖r − r̂‖² / ‖x‖²        r̂ = σ z′ W_dec, without bias; σ: the row's std, or 1

that is, the NMSE that would be left if the dead latents added their part. As with the main loss, encoder, decoder and
`b_latent` get gradients from it, and so does `b_pre` through the encoder. In a layer-norm SAE, r is divided by σ first,
so the computation uses normalised rows. The kernels return the loss for target r; multiplied by the row's main loss
‖r‖² / ‖x‖², it is the loss above in raw space.

`AuxiliaryLoss.lift` revives the latents that the loss does not revive.

The list of dead latents is renewed only every `REFRESH_STEPS` steps: its length determines the sizes of tensors, so
reading it waits for the device.

Shapes: B rows, D d_model, F latents, K active latents, M dead latents, A = k_aux.
"""

import torch
from torch import Tensor

from olmoscope.kernels.interface import Kernels
from olmoscope.sae.normalize import EPS, RowStatistics
from olmoscope.sae.topk import TopK
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.gradients import Gradients

REFRESH_STEPS = 8

ROUNDING = 1e-12
"""A row whose main loss is under this has a residual of rounding errors only: there is nothing to learn from it."""


class AuxiliaryLoss:
    """The loss and its state, the list of dead latents."""

    def __init__(self, settings: SettledAuxiliary, sae: TopK, kernels: Kernels) -> None:
        self.settings, self.sae, self.kernels = settings, sae, kernels
        device = sae.W_dec.device
        self.dead_F = torch.zeros(sae.d_sae, dtype=torch.bool, device=device)
        """Which latents were dead when `look` was last called."""
        self.dead_M = torch.zeros(0, dtype=torch.int64, device=device)
        """The same, as a list."""

    def look(self, tokens: int, last_fired_F: Tensor) -> None:
        """Find the dead latents: those that did not fire in the last `dead_window` tokens."""
        torch.ge(tokens - last_fired_F, self.settings.dead_window, out=self.dead_F)
        self.list_dead()

    def list_dead(self) -> None:
        """Rebuild the list from `dead_F`; waits for the device."""
        self.dead_M = self.dead_F.nonzero().squeeze(1)

    def gradients(self, y_BD: Tensor, u_BD: Tensor, statistics: RowStatistics | None, e_BD: Tensor,
                  loss_B: Tensor) -> tuple[Tensor, Gradients] | None:
        """The loss of each row (without the weight), `[B]`, and its gradients; None if no latent is dead or the weight
        is 0.

        Args:
            y_BD: the rows to be reconstructed, in raw space.
            u_BD: the rows as the encoder sees them.
            e_BD, loss_B: the main loss's `Residual`.
        """
        if not len(self.dead_M) or not self.settings.weight:
            return None
        sae, kernels = self.sae, self.kernels
        k = min(self.settings.k, len(self.dead_M))
        values_BA, places_BA = kernels.encode_topk(u_BD, sae.W_enc[self.dead_M], sae.b_latent[self.dead_M], k)
        indices_BA = self.dead_M[places_BA]
        r_BD, learn_B1 = residual_to_learn(y_BD, statistics, e_BD, loss_B)
        values_BA *= learn_B1
        found = kernels.residual(r_BD, values_BA, indices_BA, sae.W_dec, torch.zeros_like(sae.b_out), None, None)
        share_B1 = (self.settings.weight * loss_B).to(y_BD.dtype).unsqueeze(1)
        return found.loss_B * loss_B, Gradients(values_BA, found.dz_BK * share_B1, indices_BA,
                                                found.e_BD.mul_(share_B1), u_BD)

    def lift(self, values_BK: Tensor) -> None:
        """Raise the biases of dead latents a little, so that latents that the loss does not revive fire in the end.

        A latent without a gradient can only be chosen again if its pre-activation rises. A latent that then barely
        reaches the k-th activation costs little error, and once it has fired, the main loss trains it. Related: the
        pre-activation loss of Conerly et al. 2025 (transformer-circuits.pub, January update), whose gradient also has a
        constant sign.

        Args:
            values_BK: the batch's activations. The step is a share of their mean over active latents.
        """
        if not self.settings.lift:
            return
        active_BK = values_BK > 0
        mean = values_BK.sum() / active_BK.sum().clamp_min(1)
        share = self.settings.lift * len(values_BK) / self.settings.dead_window
        self.sae.b_latent.add_(self.dead_F * (mean * share))


def residual_to_learn(y_BD: Tensor, statistics: RowStatistics | None, e_BD: Tensor,
                      loss_B: Tensor) -> tuple[Tensor, Tensor]:
    """r in normalised space, `[B, D]`, and which rows to learn from, `[B, 1]`.

    r is computed from e = dL/dx̂ · σ = −2 σ² r / (B ‖x‖²), which is already known, so nothing is decoded again.
    """
    power_B1 = y_BD.square().sum(dim=1, keepdim=True)
    learn_B1 = loss_B.unsqueeze(1) > ROUNDING
    std_B1 = torch.ones_like(power_B1) if statistics is None else statistics.std_B1
    learn_B1 = learn_B1 & (std_B1 > EPS)  # a constant row divided by its std would be noise
    scale_B1 = torch.where(learn_B1, -0.5 * len(y_BD) * power_B1 / std_B1.square(), 0)
    return e_BD * scale_B1, learn_B1
