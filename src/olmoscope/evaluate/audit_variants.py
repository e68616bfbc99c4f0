"""Other ways to read a coder: what it would be if one convention had been misread.

Each variant changes one thing: the scale or normalisation of the rows, the activation rule, the orientation of a
matrix, the bias that the encoder subtracts. These mistakes have been made with public SAEs. The variant that undoes a
mistake reconstructs better than the SAE as it was read. Shapes: F latents, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.normalize import Normalize
from olmoscope.sae.threshold import Gated, JumpReLU
from olmoscope.sae.topk import TopK

Cause = Literal["site", "scale", "normalisation", "ReLU", "rule", "weights", "bias"]

SCALES = tuple(2.0**power for power in (-10, -6, -4, -2, -1, 1, 2, 4, 6, 10))
"""Factors by which rows are multiplied in turn, besides the one that gives them a mean norm of √D."""
KS = (8, 16, 32, 64, 128, 256, 512)
"""Values of k to try if a coder has many more active latents."""

_NORMALIZED: dict[Normalize, str] = {"none": "rows as they are", "layer_norm": "layer-normalised rows",
                                     "constant_norm_rescale": "rows scaled to norm √D each"}


@dataclass(frozen=True)
class Variant:
    """A coder read in another way.

    Attributes:
        cause: the convention that was misread, if this reading is right.
        what: the other reading, in words.
        do: what to do if this reading is right, as a clause.
    """

    cause: Cause
    what: str
    do: str
    coder: SparseCoder


def variants(coder: SparseCoder, mean_norm: float, l0: float) -> Iterator[Variant]:
    """All variants of a coder that reads one site.

    Args:
        mean_norm: mean norm of the rows read.
        l0: its mean number of active latents, as read.
    """
    yield from _scales(coder, mean_norm)
    yield from _normalisations(coder)
    yield from _rules(coder, l0)
    yield from _orientations(coder)
    if not coder.transcoder:
        yield from _biases(coder)


def scaled(coder: SparseCoder, scale: float) -> SparseCoder:
    """The coder that multiplies its rows by a number first and divides by it at the end:
    (a x − b) W_encᵀ = (x − b / a) (a W_enc)ᵀ."""
    return replace(coder, W_enc=coder.W_enc * scale, W_dec=coder.W_dec / scale, b_in=coder.b_in / scale,
                   b_out=coder.b_out / scale)


def without_relu(coder: JumpReLU | TopK) -> SparseCoder:
    """Latents of either sign: the k largest |p|, or all |p| over the threshold. Each latent becomes two, p and −p."""
    W_enc, W_dec = torch.cat([coder.W_enc, -coder.W_enc]), torch.cat([coder.W_dec, -coder.W_dec])
    b_latent = torch.cat([coder.b_latent, -coder.b_latent])
    if isinstance(coder, JumpReLU):
        return replace(coder, W_enc=W_enc, W_dec=W_dec, b_latent=b_latent, threshold=coder.threshold.repeat(2))
    return replace(coder, W_enc=W_enc, W_dec=W_dec, b_latent=b_latent)


def misread(W_FD: Tensor) -> Tensor:
    """The matrix `[F, D]` that results if its numbers are in the file as `[D, F]`."""
    return W_FD.reshape(W_FD.shape[1], W_FD.shape[0]).T.contiguous()


def _scales(coder: SparseCoder, mean_norm: float) -> Iterator[Variant]:
    if coder.normalize != "none":
        return  # normalisation undoes any factor
    to_root = coder.d_in**0.5 / mean_norm
    for scale in sorted({*SCALES, to_root}):
        words = " (mean norm √D)" if scale == to_root else ""
        yield Variant("scale", f"rows multiplied by {scale:.4g}{words}",
                      "the scale of its training rows is not folded into its weights: multiply W_enc by it, divide "
                      "W_dec and b_dec by it, or state the normalisation in its settings", scaled(coder, scale))


def _normalisations(coder: SparseCoder) -> Iterator[Variant]:
    for normalize, words in _NORMALIZED.items():
        if coder.normalize not in (normalize, "centred"):
            yield Variant("normalisation", words, "state this normalisation in its settings (SAELens: "
                          f"normalize_activations: {normalize})", replace(coder, normalize=normalize))


def _rules(coder: SparseCoder, l0: float) -> Iterator[Variant]:
    if isinstance(coder, Gated | GroupMax):
        return
    assert isinstance(coder, JumpReLU | TopK)
    yield Variant("ReLU", "negative pre-activations count too",
                  "it was trained without a ReLU, and the negative half of its codes is lost: read it with latents of "
                  "either sign (SAELens: AbsTopK)", without_relu(coder))
    if isinstance(coder, JumpReLU):
        for k in KS:
            if k <= l0 / 2:
                yield Variant("rule", f"only the {k} largest latents of a row are active (TopK)",
                              "its settings lack the activation rule or its thresholds: state TopK and k, or add the "
                              "thresholds", TopK(coder.W_enc, coder.W_dec, coder.b_in, coder.normalize, coder.b_latent,
                                                 k, b_out=coder.b_out, W_skip=coder.W_skip,
                                                 transcoder=coder.transcoder))


def _orientations(coder: SparseCoder) -> Iterator[Variant]:
    W_enc, W_dec = misread(coder.W_enc), misread(coder.W_dec)
    for what, changed in (("W_dec", replace(coder, W_dec=W_dec)), ("W_enc", replace(coder, W_enc=W_enc)),
                          ("W_enc and W_dec", replace(coder, W_enc=W_enc, W_dec=W_dec))):
        yield Variant("weights", f"{what} transposed", f"write {what} in the other orientation, as its format demands",
                      changed)


def _biases(coder: SparseCoder) -> Iterator[Variant]:
    if coder.b_in.any():
        yield Variant("bias", "b_dec is not subtracted before encoding",
                      "its settings should say so (SAELens: apply_b_dec_to_input: false)",
                      replace(coder, b_in=torch.zeros_like(coder.b_in), b_out=coder.b_out))
    elif coder.b_out.any():
        yield Variant("bias", "b_dec is subtracted before encoding",
                      "its settings should say so (SAELens: apply_b_dec_to_input: true)",
                      replace(coder, b_in=coder.b_out))
