"""SAEs whose latents are switched each by a rule of its own and not by rank: ReLU, JumpReLU, gated.

    p = (n(x) − b_pre) W_encᵀ        x̂ = n⁻¹(z W_dec + b_pre)

    JumpReLU  z = p + b_latent where that is over the latent's threshold, else 0. ReLU has thresholds of 0; a BatchTopK
              SAE, once trained, is a JumpReLU (Rajamanoharan et al. 2024, arXiv:2407.14435).
    Gated     z = ReLU(p · exp(r_mag) + b_mag) where p + b_gate > 0, else 0 (Rajamanoharan et al. 2024,
              arXiv:2404.16014).

Any number of latents may be active, so codes have as many places as the most active row needs. Dense pre-activations
exist for a few rows at a time. Shapes: B rows, C rows of a chunk, D d_model, F latents, K places of a code.
"""

from abc import abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.interface import SparseAutoencoder
from olmoscope.sae.rows import Normalize

DENSE_AT_ONCE = 2**24
"""Most elements of dense pre-activations held at a time."""


@dataclass
class _Thresholded(SparseAutoencoder):
    """What the kinds have in common: all but what a latent makes of its pre-activation."""

    W_enc_FD: Tensor
    W_dec_FD: Tensor
    b_pre_D: Tensor
    normalize: Normalize

    @abstractmethod
    def activations(self, p_CF: Tensor) -> Tensor:
        """z `[C, F]`, not negative, from pre-activations without any bias."""

    def to(self, device: torch.device | str) -> Self:
        """The same SAE on another device."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        tensors: dict[str, Any] = {name: value.to(device) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def _encode(self, u_BD: Tensor) -> SparseCodes:
        parts = []
        for u_CD in torch.split(u_BD, max(1, DENSE_AT_ONCE // self.d_sae)):
            z_CF = self.activations(u_CD @ self.W_enc_FD.T)
            active = max(1, int(z_CF.count_nonzero(dim=1).max()))
            parts.append(z_CF.topk(active, dim=1))
        places = max((part.values.shape[1] for part in parts), default=1)
        values_BK = self.W_enc_FD.new_zeros(len(u_BD), places)
        indices_BK = torch.zeros(len(u_BD), places, dtype=torch.int64, device=u_BD.device)
        start = 0
        for part in parts:
            rows, active = part.values.shape
            values_BK[start : start + rows, :active] = part.values
            indices_BK[start : start + rows, :active] = part.indices
            start += rows
        return SparseCodes(values_BK, indices_BK, self.d_sae)


@dataclass
class JumpReLU(_Thresholded):
    """A threshold a latent; all 0 is a ReLU."""

    b_latent_F: Tensor
    threshold_F: Tensor

    def activations(self, p_CF: Tensor) -> Tensor:
        p_CF = p_CF + self.b_latent_F
        return torch.where(p_CF > self.threshold_F, p_CF, 0).relu_()


@dataclass
class Gated(_Thresholded):
    """One product for the gate and, rescaled, for the magnitude."""

    b_gate_F: Tensor
    b_mag_F: Tensor
    r_mag_F: Tensor

    def activations(self, p_CF: Tensor) -> Tensor:
        return torch.where(p_CF + self.b_gate_F > 0, torch.relu(p_CF * self.r_mag_F.exp() + self.b_mag_F), 0)
