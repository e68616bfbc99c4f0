"""The TopK sparse autoencoder, tied or untied: parameters, encode, decode.

    z = ReLU(TopK_k((n(x) − b_pre) W_encᵀ + b_latent))        x̂ = n⁻¹(z W_dec + b_pre)

Rows of `W_dec [F, D]` have unit norm; n is the row normalisation (rows.py). In a tied SAE one matrix is encoder and
decoder. Source: Gao et al. 2024, arXiv:2406.04093, for TopK; tied weights as in the reference release and in
Cunningham et al. 2023, arXiv:2309.08600. Shapes: B rows, D d_model, F latents, K active.
"""

import zlib
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from olmoscope.kernels.dispatch import kernels_for
from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.interface import SparseAutoencoder
from olmoscope.sae.rows import Normalize
from olmoscope.seeds import generator


@dataclass
class TopK(SparseAutoencoder):
    """Parameters of one SAE and what they compute.

    Attributes:
        W_enc_FD: encoder, one latent a row; the very same tensor as `W_dec_FD` where the weights are tied.
        W_dec_FD: decoder, one latent a row, of unit norm.
        b_latent_F: bias of each latent.
        b_pre_D: subtracted before encoding, added after decoding.
    """

    W_enc_FD: Tensor
    W_dec_FD: Tensor
    b_latent_F: Tensor
    b_pre_D: Tensor
    k: int
    normalize: Normalize

    @property
    def tied(self) -> bool:
        return self.W_enc_FD is self.W_dec_FD

    def parameters(self) -> dict[str, Tensor]:
        """By name, each once: `W` where tied, else `W_enc` and `W_dec`; `b_latent`, `b_pre`."""
        matrices = {"W": self.W_dec_FD} if self.tied else {"W_enc": self.W_enc_FD, "W_dec": self.W_dec_FD}
        return matrices | {"b_latent": self.b_latent_F, "b_pre": self.b_pre_D}

    @classmethod
    def of(cls, parameters: dict[str, Tensor], k: int, normalize: Normalize) -> Self:
        """An SAE of what `parameters` gave."""
        tied = "W" in parameters
        return cls(parameters["W" if tied else "W_enc"], parameters["W" if tied else "W_dec"], parameters["b_latent"],
                   parameters["b_pre"], k, normalize)

    def _encode(self, u_BD: Tensor) -> SparseCodes:
        kernels = kernels_for(self.W_enc_FD.device)
        values_BK, indices_BK = kernels.encode_topk(u_BD, self.W_enc_FD, self.b_latent_F, self.k)
        return SparseCodes(values_BK, indices_BK, self.d_sae)

    def to(self, device: torch.device | str) -> Self:
        """The same SAE on another device."""
        return self.of({name: tensor.to(device) for name, tensor in self.parameters().items()}, self.k, self.normalize)


def initialize(d_model: int, d_sae: int, k: int, normalize: Normalize, mean_D: Tensor, seed: int, name: str = "", *,
               tied: bool = True) -> TopK:
    """A fresh SAE: random unit rows, no latent bias, `b_pre` at the mean of the (normalised) data.

    Args:
        mean_D: mean of the rows as `normalize_rows` gives them.
        seed: with the same seed and name, the same rows on every machine and device.
        name: the SAE's id: SAEs of one seed start with independent rows, also where their shapes are equal. Were they
            the same, directions of different layers would be alike only for having begun so.
        tied: whether encoder and decoder are one matrix; else they start equal.
    """
    random = generator(seed, "rows of an SAE", zlib.crc32(name.encode()))
    W_FD = torch.from_numpy(random.standard_normal((d_sae, d_model), dtype=np.float32))
    W_FD /= W_FD.norm(dim=1, keepdim=True)
    device = mean_D.device
    W_FD = W_FD.to(device)
    return TopK(W_FD if tied else W_FD.clone(), W_FD, torch.zeros(d_sae, device=device), mean_D.float().clone(), k,
                normalize)
