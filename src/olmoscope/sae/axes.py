"""Principal axes of the rows, folded into an SAE's weights.

Training may rotate rows by an orthogonal matrix Q (train/axes.py), and then makes an SAE of rotated rows. A rotation
changes no product and no norm, so the SAE of unrotated rows has the same codes:

    (x Q − b) W_encᵀ  =  (x − b Qᵀ) (W_enc Qᵀ)ᵀ        z W_dec Qᵀ  =  z (W_dec Qᵀ)

Shapes: D width of the rows.
"""

from torch import Tensor

from olmoscope.sae.topk import TopK

TURNED = ("W", "W_enc", "W_dec", "b_pre")
"""The parameters of an SAE that are rows."""


def fold_axes(sae: TopK, axes_DD: Tensor | None) -> TopK:
    """An SAE of unrotated rows, from an SAE of rotated rows; the SAE itself if there are no axes."""
    if axes_DD is None:
        return sae
    back_DD = axes_DD.double().T
    state = {name: (tensor.double() @ back_DD).to(tensor.dtype) if name in TURNED else tensor
             for name, tensor in sae.state_dict().items()}
    return type(sae).from_state_dict(state, k=sae.k, normalize=sae.normalize)
