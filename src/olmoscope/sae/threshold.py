"""SAEs whose latents are switched individually, not by rank: ReLU, JumpReLU, gated.

    p = (n(x) − b_in) W_encᵀ        x̂ = n⁻¹(z W_dec + b_out)

    JumpReLU  z = p + b_latent where that is over the latent's threshold, else 0 (Rajamanoharan et al. 2024,
              arXiv:2407.14435). ReLU has thresholds of 0; a BatchTopK SAE, once trained, is a JumpReLU.
    Gated     z = ReLU(p · exp(r_mag) + b_mag) where p + b_gate > 0, else 0 (Rajamanoharan et al. 2024,
              arXiv:2404.16014).

Any number of latents may be active, so codes have as many places as the most active row needs. Dense pre-activations
exist for a few rows at a time. Shapes: N rows, C rows of a chunk, D d_model, F latents, K places of a code.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.sae.coder import SparseCoder

DENSE_AT_ONCE = 2**24
"""The most elements of dense pre-activations held at a time."""


@dataclass(eq=False, repr=False)
class _Thresholded(SparseCoder):
    """What the kinds share: everything except a latent's function of its pre-activation."""

    @abstractmethod
    def activations(self, p_CF: Tensor) -> Tensor:
        """z `[C, F]`, not negative, from pre-activations without any bias."""

    def _choose(self, u_ND: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for u_CD in torch.split(u_ND, max(1, DENSE_AT_ONCE // self.d_sae)):
            z_CF = self.activations(u_CD @ self.W_enc.T)
            active = max(1, int(z_CF.count_nonzero(dim=1).max())) if len(z_CF) else 1
            parts.append(z_CF.topk(active, dim=1))
        places = max(part.values.shape[1] for part in parts)
        values_NK = self.W_enc.new_zeros(len(u_ND), places)
        indices_NK = torch.zeros(len(u_ND), places, dtype=torch.int64, device=u_ND.device)
        start = 0
        for part in parts:
            rows, active = part.values.shape
            values_NK[start : start + rows, :active] = part.values
            indices_NK[start : start + rows, :active] = part.indices
            start += rows
        return values_NK, indices_NK


@dataclass(eq=False, repr=False)
class JumpReLU(_Thresholded):
    """One threshold per latent; all 0 gives a ReLU.

    Attributes:
        b_latent: `[F]`, bias of each latent.
        threshold: `[F]`; it gets no gradient, because a step function has none.
    """

    b_latent: Tensor
    threshold: Tensor

    def activations(self, p_CF: Tensor) -> Tensor:
        p_CF = p_CF + self.b_latent
        return torch.where(p_CF > self.threshold, p_CF, 0).relu_()

    def _affine(self) -> tuple[Tensor, None]:
        return self.b_latent, None


@dataclass(eq=False, repr=False)
class Gated(_Thresholded):
    """One product for the gate and, rescaled, for the magnitude.

    Attributes:
        b_gate, b_mag, r_mag: `[F]` each; `b_gate` gets no gradient.
    """

    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor

    def activations(self, p_CF: Tensor) -> Tensor:
        return torch.where(p_CF + self.b_gate > 0, torch.relu(p_CF * self.r_mag.exp() + self.b_mag), 0)

    def _affine(self) -> tuple[Tensor, Tensor]:
        return self.b_mag, self.r_mag.exp()
