"""How far SAELens' encode and decode differ from ours on given rows, and which rows to compare them on.

Two correct implementations differ by rounding: they sum the same float32 products in another order. The error of a sum
of D products is about √D · 2⁻²⁴ of ‖u‖‖W_j‖ if nothing averages out, 4e-6 at D = 4096. So differences are given as
shares of the row's own scale, and `TOLERANCE` is 1e-5. A wrong k, bias, normalisation or transposition causes a
difference of 1e-2 or more.

If two pre-activations at the k-th place are equal up to rounding, either may be kept. So codes are compared value by
value where both are active. The value of a latent that is active in only one code must be at the other code's
threshold, within the tolerance (its k-th value; 0 if fewer than k are active; a JumpReLU's own threshold). Decoding is
compared on the same codes, SAELens'.

Shapes: B rows, D width read, D_out width written, F latents, K active.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK

TOLERANCE = 1e-5

DENSE_AT_ONCE = 2**24
"""Most elements of a dense code in memory at a time: SAELens makes dense codes of all rows that it gets."""

ROWS = 256
"""Number of random rows for a check without real ones."""

CONSTANTS = (0.0, 1.0, -3.0, 0.1, 1000.0)
"""Values of constant rows. Layer norm divides by their standard deviation, which is 0."""


@dataclass(frozen=True)
class Agreement:
    """Largest differences over rows, as shares of each row's scale; infinite if a code is not finite or not top-k."""

    encode: float
    decode: float
    most_active: int
    """Largest number of active latents in a row of SAELens' code."""

    @property
    def good(self) -> bool:
        return max(self.encode, self.decode) <= TOLERANCE

    def __str__(self) -> str:
        return f"encode {self.encode:.1e}, decode {self.decode:.1e} of the row's scale (at most {TOLERANCE:.0e})"


@torch.no_grad()
def compare(ours: TopK | JumpReLU, theirs: Any, x_BD: Tensor) -> Agreement:
    """Compare our SAE with SAELens' `theirs` on rows of any float dtype, both on the CPU."""
    encode, decode, most_active = 0.0, 0.0, 0
    norm, decoder_norm = (float(W_FD.norm(dim=1).max()) for W_FD in (ours.W_enc, ours.W_dec))
    for rows_BD in chunks(x_BD, ours.d_sae):
        z_BF, xhat_BD = reconstruct(theirs, rows_BD)
        u_BD, statistics = ours.center(rows_BD)
        scale_B = u_BD.norm(dim=1) * norm + ours.b_latent.abs().max()
        if ours.transcoder:  # its bias includes b_in, so a small pre-activation may be the difference of large numbers
            scale_B = scale_B + ours.b_in.norm() * norm
        ours_codes = ours.encode(rows_BD)
        ours_BF = ours_codes.to_dense()
        off_B = (code_difference(ours_BF, z_BF, ours.k) if isinstance(ours, TopK) else
                 threshold_difference(ours_BF, z_BF, ours.threshold))
        encode = max(encode, _share(off_B, scale_B))
        places = ours.k if isinstance(ours, TopK) else max(1, int(z_BF.count_nonzero(dim=1).max()))
        values_BK, indices_BK = torch.topk(z_BF, places, dim=1)
        scale_B = values_BK.abs().sum(dim=1) * decoder_norm + ours.b_out.norm()
        if ours.W_skip is not None:
            scale_B = scale_B + rows_BD.float().norm(dim=1) * ours.W_skip.norm()
        if statistics is not None and not ours.transcoder:
            scale_B = scale_B * statistics.std_B1[:, 0] + statistics.mean_B1[:, 0].abs() * ours.d_model**0.5
        difference_BD = ours.decode(replace(ours_codes, values=values_BK, indices=indices_BK)) - xhat_BD
        decode = max(decode, _share(difference_BD.norm(dim=1), scale_B))
        most_active = max(most_active, int(torch.count_nonzero(z_BF, dim=1).max()))
    return Agreement(encode, decode, most_active)


@torch.no_grad()
def compare_silent(ours: TopK | JumpReLU, theirs: Any, x_BD: Tensor) -> Agreement:
    """Compare on rows whose pre-activations are all negative: the ReLU after the top-k must silence every latent.

    With the trained biases there may be no such row (the dictionary's directions surround the origin). So the biases of
    both SAEs are lowered while this function runs, until the condition holds for all rows.
    """
    u_BD, _ = ours.center(x_BD)
    shift = float(u_BD.norm(dim=1).max() * ours.W_enc.norm(dim=1).max() + ours.b_latent.abs().max()) + 1
    before_F = theirs.b_enc.data
    theirs.b_enc.data = before_F - shift
    try:
        lowered = replace(ours, b_latent=ours.b_latent - shift)
        return compare(lowered, theirs, x_BD)
    finally:
        theirs.b_enc.data = before_F


def reconstruct(theirs: Any, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """SAELens' dense codes `[B, F]` and its reconstruction (or its transcoder's output) `[B, D_out]`, float32.

    Rows are decoded right after they are encoded: a layer-norm SAE keeps their statistics in between. A transcoder
    applies its skip only in its forward pass, which accepts only rows of the weights' dtype.
    """
    if hasattr(theirs, "W_skip"):
        y_BD, z_BF = theirs.forward_with_activations(x_BD.to(theirs.dtype))
        return z_BF, y_BD
    z_BF = theirs.encode(x_BD)
    return z_BF, theirs.decode(z_BF)


def code_difference(a_BF: Tensor, b_BF: Tensor, k: int) -> Tensor:
    """Largest difference between the two top-k codes of each row, `[B]`, ignoring ties at the threshold.

    It is infinite for a row with more than k active latents in either code, or with a value that is not finite.
    """
    difference_B = _difference(a_BF, b_BF, *(torch.topk(z_BF, k, dim=1).values[:, -1:].clamp_min(0)
                                             for z_BF in (a_BF, b_BF)))
    too_many_B = torch.maximum(a_BF.count_nonzero(dim=1), b_BF.count_nonzero(dim=1)) > k
    return difference_B.masked_fill(too_many_B, torch.inf)


def threshold_difference(a_BF: Tensor, b_BF: Tensor, threshold_F: Tensor) -> Tensor:
    """The same for codes of a JumpReLU: a latent at its threshold may fall on either side of it."""
    return _difference(a_BF, b_BF, threshold_F, threshold_F)


def _difference(a_BF: Tensor, b_BF: Tensor, a_threshold: Tensor, b_threshold: Tensor) -> Tensor:
    difference_BF = (a_BF - b_BF).abs()
    for one_BF, other_BF, threshold in ((a_BF, b_BF, b_threshold), (b_BF, a_BF, a_threshold)):
        alone_BF = (one_BF != 0) & (other_BF == 0)
        difference_BF = torch.where(alone_BF, (one_BF.abs() - threshold).clamp_min(0), difference_BF)
    difference_B = difference_BF.max(dim=1).values
    return difference_B.masked_fill(difference_B.isnan(), torch.inf)


def chunks(x_BD: Tensor, d_sae: int) -> Iterator[Tensor]:
    """Chunks of rows, small enough for dense codes."""
    size = max(1, DENSE_AT_ONCE // d_sae)
    for start in range(0, len(x_BD), size):
        yield x_BD[start : start + size]


def random_rows(sae: TopK | JumpReLU, seed: int = 0) -> Tensor:
    """Stand-ins for real rows, `[ROWS, D]`: the SAE's own mean, plus noise and directions of its dictionary.

    An SAE of raw rows knows the mean of its data (its bias). A layer-norm SAE knows the mean of normalised rows, which
    is good enough. For a transcoder, the dictionary of its input is its encoder.
    """
    generator = torch.Generator().manual_seed(seed)
    noise_BD = torch.randn(ROWS, sae.d_in, generator=generator)
    latents = torch.randint(sae.d_sae, (ROWS, 4), generator=generator)
    mean_D, W_FD = (sae.b_in, sae.W_enc) if sae.transcoder else (sae.b_out, sae.W_dec)
    return mean_D + 0.1 * noise_BD + W_FD[latents].sum(dim=1)


def constant_rows(width: int) -> Tensor:
    """`[len(CONSTANTS), D]`."""
    return torch.tensor(CONSTANTS)[:, None].expand(-1, width).contiguous()


def _share(difference_B: Tensor, scale_B: Tensor) -> float:
    share_B = difference_B / scale_B.clamp_min(torch.finfo(torch.float32).tiny)
    return float(share_B.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
