"""Scales of sites, folded into a coder's weights.

Training multiplies the rows of each site that is read by the site's scale a (train/ends.py). With the scale folded in,
the coder takes rows as they are:

    (a x − b) W_encᵀ  =  (x − b / a) (a W_enc)ᵀ        (a x) W_skipᵀ  =  x (a W_skip)ᵀ

An SAE's or a crosscoder's output for a site is in that site's scale, so its decoder and b_out are divided by a.
"""

from collections.abc import Sequence

import torch

from olmoscope.sae.topk import TopK


def fold_scales(coder: TopK, scales: Sequence[float], widths: Sequence[int]) -> TopK:
    """A coder of unscaled rows, from a coder of scaled rows; if all scales are 1, the coder itself.

    Args:
        scales: the factor of the rows of each site that is read.
        widths: width of each site's rows.
    """
    if all(scale == 1 for scale in scales):
        return coder
    a_D = torch.cat([torch.full((width,), scale, dtype=torch.float64)
                     for scale, width in zip(scales, widths, strict=True)]).to(coder.device)

    def times(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.double() * a_D).to(tensor.dtype)

    def over(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.double() / a_D).to(tensor.dtype)

    state = coder.state_dict()
    folded = {"W_enc": times(coder.W_enc), "b_latent": state["b_latent"]}
    if coder.transcoder:
        folded |= {"W_dec": coder.W_dec, "b_in": over(coder.b_in), "b_out": coder.b_out}
        if coder.W_skip is not None:
            folded["W_skip"] = times(coder.W_skip)
    else:
        folded |= {"W_dec": over(coder.W_dec), "b_pre": over(coder.b_in)}
    return type(coder).from_state_dict(folded, k=coder.k, normalize=coder.normalize, transcoder=coder.transcoder)
