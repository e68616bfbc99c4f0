"""Reading an SAE in SAELens' format, ours or anybody's: cfg.json and sae_weights.safetensors in a folder.

Source: sae-lens 6.54.12, `sae_lens/saes/*_sae.py` and `sae_lens/loading/pretrained_sae_loaders.py`. Read are its
`topk`, `standard` (ReLU), `jumprelu`, `gated`, and the `batchtopk` and `matryoshka_batchtopk` that its trainer keeps as
checkpoints, in the layouts before and since version 6. What ours cannot express directly is folded into the weights
(`apply_b_dec_to_input: false`, `rescale_acts_by_decoder_norm`); what a folder does not say is refused, not guessed.
The settings are in saelens_settings.py.

Shapes: D d_model, F latents.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.model_errors import damage
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.rows import Normalize
from olmoscope.sae.saelens_settings import read_settings, row_normalisation, weights_dtype
from olmoscope.sae.threshold import Gated, JumpReLU
from olmoscope.sae.topk import TopK

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"

_TENSORS = {
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"),
    "batchtopk": ("W_enc", "b_enc", "W_dec", "b_dec", "topk_threshold"),
    "matryoshka_batchtopk": ("W_enc", "b_enc", "W_dec", "b_dec", "topk_threshold"),
}
"""The tensors of each architecture that is read: neither more nor fewer."""

_BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")


@dataclass(frozen=True)
class SAELensFolder:
    """An SAE and what its folder says of it."""

    sae: SparseCoder
    architecture: str
    metadata: dict[str, Any]
    """Of cfg.json; before version 6 the settings stood among the others."""


def read_saelens_folder(folder: Path) -> SAELensFolder:
    """Read an SAE, float32, on the CPU.

    Raises:
        UserError: missing or damaged files, or an SAE of a kind that is not read.
    """
    config, metadata = read_settings(folder / CONFIG)
    architecture = config["architecture"]
    if architecture not in _TENSORS:
        raise UserError(f"{folder / CONFIG}: architecture {architecture!r} is not one that is read; those are "
                        f"{', '.join(_TENSORS)}")
    normalize = row_normalisation(config, metadata, folder / CONFIG)
    tensors = _read_weights(folder / WEIGHTS, architecture, config)
    if config.get("rescale_acts_by_decoder_norm", architecture in _BATCH_TOPK) and architecture in ("topk",
                                                                                                   *_BATCH_TOPK):
        _fold_decoder_norms(tensors)
    if not config.get("apply_b_dec_to_input", True):
        _fold_missing_centring(tensors)
    return SAELensFolder(_build(architecture, config, tensors, normalize, folder), architecture, metadata)


def _build(architecture: str, config: dict[str, Any], tensors: dict[str, Tensor], normalize: Normalize,
           folder: Path) -> SparseCoder:
    W_dec_FD, b_dec_D = tensors["W_dec"], tensors["b_dec"]
    transposed_FD = tensors["W_enc"].T
    tied = transposed_FD.shape == W_dec_FD.shape and torch.equal(transposed_FD, W_dec_FD)
    W_enc_FD = W_dec_FD if tied else transposed_FD.contiguous()
    if architecture == "topk":
        k = config.get("k")
        if not isinstance(k, int) or not 0 < k <= len(W_dec_FD):
            raise UserError(f"{folder / CONFIG}: k must be a number from 1 to {len(W_dec_FD)}, not {k!r} (for a "
                            "missing one SAELens would silently take 100)")
        return TopK(W_enc_FD, W_dec_FD, b_dec_D, normalize, tensors["b_enc"], k)
    if architecture == "gated":
        return Gated(W_enc_FD, W_dec_FD, b_dec_D, normalize, tensors["b_gate"], tensors["b_mag"], tensors["r_mag"])
    b_latent_F = tensors["b_enc"]
    threshold_F = tensors.get("threshold", torch.zeros_like(b_latent_F))
    if architecture in _BATCH_TOPK:
        threshold_F = tensors["topk_threshold"].expand_as(b_latent_F).contiguous()
    return JumpReLU(W_enc_FD, W_dec_FD, b_dec_D, normalize, b_latent_F, threshold_F)


def _read_weights(path: Path, architecture: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors, rounded to the dtype that the config names, in float32; each of the shape that it must have."""
    dtype = weights_dtype(config, path.parent / CONFIG)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).to(dtype).float() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except SafetensorError as error:
        raise UserError(damage(path) or f"{path} is damaged ({error})") from error
    if "log_threshold" in tensors:  # how SAELens kept it once
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if "scaling_factor" in tensors:
        if not torch.allclose(tensors["scaling_factor"], torch.ones(())):  # SAELens drops it where it is 1
            raise UserError(f"{path}: scaling_factor: activations are scaled after encoding, which SAELens itself "
                            "dropped in version 6; fold the factor into W_dec and save it again")
        del tensors["scaling_factor"]
    wanted = set(_TENSORS[architecture])
    if set(tensors) != wanted:
        raise UserError(f"{path} holds {', '.join(sorted(tensors))}; a {architecture} SAE has "
                        f"{', '.join(sorted(wanted))}")
    F, D = tensors["W_dec"].shape
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,), "topk_threshold": ()}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes.get(name, (F,)):
            raise UserError(f"{path}: {name} has shape {list(tensor.shape)}, not {list(shapes.get(name, (F,)))}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or inf")
    if (config.get("d_in"), config.get("d_sae")) != (D, F):
        raise UserError(f"{path} is of d_in {D}, d_sae {F}; {CONFIG} says {config.get('d_in')}, {config.get('d_sae')}")
    return tensors


def _fold_decoder_norms(tensors: dict[str, Tensor]) -> None:
    """Pre-activations times the norm of the decoder's rows, activations divided by it: as weights. The codes stay."""
    norms_F = tensors["W_dec"].norm(dim=1)
    tensors["W_enc"] = tensors["W_enc"] * norms_F
    tensors["b_enc"] = tensors["b_enc"] * norms_F
    tensors["W_dec"] = tensors["W_dec"] / norms_F.clamp_min(torch.finfo(norms_F.dtype).tiny)[:, None]


def _fold_missing_centring(tensors: dict[str, Tensor]) -> None:
    """The encoder saw rows without `b_dec` subtracted; ours subtracts it, so each bias gets it back."""
    back_F = tensors["b_dec"].double() @ tensors["W_enc"].double()
    for name, scale_F in (("b_enc", None), ("b_gate", None), ("b_mag", tensors.get("r_mag"))):
        if name in tensors:
            share_F = back_F if scale_F is None else back_F * scale_F.double().exp()
            tensors[name] = (tensors[name].double() + share_F).float()
