"""The TopK sparse autoencoder, tied or untied: parameters, encode, decode.

    z = ReLU(TopK_k((n(x) − b_in) W_encᵀ + b_latent))        x̂ = n⁻¹(z W_dec + b_out)

Rows of `W_dec [F, D]` have unit norm; n is the row normalisation (normalize.py). In a tied SAE one matrix is encoder
and decoder. Source: Gao et al. 2024, arXiv:2406.04093, for TopK; tied weights as in the reference release and in
Cunningham et al. 2023, arXiv:2309.08600. Shapes: N rows, D d_model, F latents, K active.
"""

from dataclasses import dataclass

from torch import Tensor

from olmoscope.sae.coder import SparseCoder


@dataclass(eq=False, repr=False)
class TopK(SparseCoder):
    """The k largest pre-activations of each row.

    Attributes:
        W_dec: `[F, D]`; its rows have unit norm if we trained it.
        b_latent: `[F]`, bias of each latent.
        k: the most latents that are active in a row.
    """

    b_latent: Tensor
    k: int

    def _choose(self, u_ND: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.encode_topk(u_ND, self.W_enc.detach(), self.b_latent.detach(), self.k)

    def _affine(self) -> tuple[Tensor, None]:
        return self.b_latent, None
