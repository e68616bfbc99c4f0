"""The TopK sparse autoencoder, tied or untied: parameters, encode, decode.

    z = ReLU(TopK_k((n(x) − b_in) W_encᵀ + b_latent))        x̂ = n⁻¹(z W_dec + b_out)

Rows of `W_dec [F, D]` have unit norm; n is the row normalisation (rows.py). In a tied SAE one matrix is encoder and
decoder. Source: Gao et al. 2024, arXiv:2406.04093, for TopK; tied weights as in the reference release and in
Cunningham et al. 2023, arXiv:2309.08600. Shapes: N rows, D d_model, F latents, K active.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.rows import Normalize
from olmoscope.seeds import generator


@dataclass(eq=False, repr=False)
class TopK(SparseCoder):
    """The k largest pre-activations of each row.

    Attributes:
        W_dec: as ours are trained, of unit norm.
        b_latent: `[F]`, bias of each latent.
        k: how many latents of a row are active at most.
    """

    b_latent: Tensor
    k: int

    def _choose(self, u_ND: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.encode_topk(u_ND, self.W_enc.detach(), self.b_latent.detach(), self.k)

    def _affine(self) -> tuple[Tensor, None]:
        return self.b_latent, None


def initialize(d_model: int, d_sae: int, k: int, normalize: Normalize, mean_D: Tensor, seed: int, name: str = "", *,
               tied: bool = True) -> TopK:
    """A fresh SAE: random unit rows, no latent bias, `b_in` (which is `b_out`) at the mean of the (normalised) data.

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
    return TopK(W_FD if tied else W_FD.clone(), W_FD, b_in=mean_D.float().clone(), normalize=normalize,
                b_latent=torch.zeros(d_sae, device=device), k=k)
