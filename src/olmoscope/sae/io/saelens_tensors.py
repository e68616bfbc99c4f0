"""The tensors of an SAE in SAELens' format: which tensors each kind of SAE has, and which coder it becomes here.

Settings that our coders cannot express are folded into the weights (`rescale_acts_by_decoder_norm`,
`expected_average_only_in`); so is what SAELens cannot express, a `b_in` that differs from `b_out`. To support another
kind, add an entry to `KINDS` with a function that builds it. Source: sae-lens 6.54.12, `sae_lens/saes/*_sae.py` and
`transcoder.py`.

Shapes: D d_model, D_in and D_out widths read and written, F latents.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.model_errors import damage
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.io.assemble import fold_decoder_norms, fold_scale
from olmoscope.sae.io.headers import not_finite
from olmoscope.sae.io.outgoing import encoder_bias
from olmoscope.sae.io.saelens_settings import CONFIG, weights_dtype
from olmoscope.sae.normalize import Normalize
from olmoscope.sae.threshold import Gated, JumpReLU
from olmoscope.sae.topk import TopK

WEIGHTS = "sae_weights.safetensors"

_BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
"""Architectures of checkpoints of SAELens' trainer; for inference it writes them as `jumprelu`."""


@dataclass(frozen=True)
class _Parts:
    """The parts of an SAE: matrices with one latent per row, and the tensors as they were read."""

    W_enc_FD: Tensor
    W_dec_FD: Tensor
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    normalize: Normalize
    where: Path
    transcoder: bool

    @property
    def b_in(self) -> Tensor:
        """The bias that the encoder subtracts."""
        if not self.config.get("apply_b_dec_to_input", True):
            return self.W_enc_FD.new_zeros(self.W_enc_FD.shape[1])
        return self.tensors["b_dec"]

    @property
    def ends(self) -> dict[str, Any]:
        """The bias that is added after decoding, if the encoder does not subtract it; and a transcoder's own parts."""
        if not self.transcoder:
            return {} if self.config.get("apply_b_dec_to_input", True) else {"b_out": self.tensors["b_dec"]}
        return {"b_out": self.tensors["b_dec"], "W_skip": self.tensors.get("W_skip"), "transcoder": True}


def _topk(parts: _Parts) -> TopK:
    k, latents = parts.config.get("k"), len(parts.W_dec_FD)
    if not isinstance(k, int) or not 0 < k <= latents:
        raise UserError(f"{parts.where}: k must be a number from 1 to {latents}, not {k!r} (for a missing k SAELens "
                        "would silently use 100)")
    return TopK(parts.W_enc_FD, parts.W_dec_FD, parts.b_in, parts.normalize, parts.tensors["b_enc"], k, **parts.ends)


def _abs_topk(parts: _Parts) -> TopK:
    """The k latents of largest |p|: the k largest of twice as many latents, where latent F + j is latent j with the
    opposite sign."""
    halves, b_enc_F = _topk(parts), parts.tensors["b_enc"]
    return TopK(torch.cat([halves.W_enc, -halves.W_enc]), torch.cat([halves.W_dec, -halves.W_dec]), halves.b_in,
                parts.normalize, torch.cat([b_enc_F, -b_enc_F]), halves.k, **parts.ends)


def _jumprelu(parts: _Parts, threshold_F: Tensor) -> JumpReLU:
    return JumpReLU(parts.W_enc_FD, parts.W_dec_FD, parts.b_in, parts.normalize, parts.tensors["b_enc"], threshold_F,
                    **parts.ends)


def _gated(parts: _Parts) -> Gated:
    tensors = parts.tensors
    return Gated(parts.W_enc_FD, parts.W_dec_FD, parts.b_in, parts.normalize, tensors["b_gate"], tensors["b_mag"],
                 tensors["r_mag"], **parts.ends)


def _relu(parts: _Parts) -> JumpReLU:
    return _jumprelu(parts, torch.zeros_like(parts.tensors["b_enc"]))


def _thresholds(parts: _Parts) -> JumpReLU:
    return _jumprelu(parts, parts.tensors["threshold"])


def _batch_topk(parts: _Parts) -> JumpReLU:
    return _jumprelu(parts, parts.tensors["topk_threshold"].expand_as(parts.tensors["b_enc"]).contiguous())


@dataclass(frozen=True)
class _Kind:
    """The exact set of tensors of a kind of SAE, and the function that builds an SAE from them."""

    tensors: tuple[str, ...]
    build: Callable[[_Parts], SparseCoder]


_COMMON = ("W_enc", "b_enc", "W_dec", "b_dec")

KINDS = {
    "topk": _Kind(_COMMON, _topk),
    "abstopk": _Kind(_COMMON, _abs_topk),
    "standard": _Kind(_COMMON, _relu),
    "jumprelu": _Kind((*_COMMON, "threshold"), _thresholds),
    "gated": _Kind(("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"), _gated),
    "batchtopk": _Kind((*_COMMON, "topk_threshold"), _batch_topk),
    "matryoshka_batchtopk": _Kind((*_COMMON, "topk_threshold"), _batch_topk),
    "transcoder": _Kind(_COMMON, _relu),
    "skip_transcoder": _Kind((*_COMMON, "W_skip"), _relu),
    "jumprelu_transcoder": _Kind((*_COMMON, "threshold"), _thresholds),
    "jumprelu_skip_transcoder": _Kind((*_COMMON, "threshold", "W_skip"), _thresholds),
}
"""Each `architecture` that is supported."""


def raw_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder as they are in the file.

    Raises:
        OSError, SafetensorError: missing or damaged.
    """
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (the file is no mapping)


def rescales(config: Mapping[str, Any]) -> bool:
    """Whether pre-activations are multiplied by the norm of the decoder row before latents are chosen."""
    kind = config["architecture"]
    return kind in ("topk", "abstopk", *_BATCH_TOPK) and bool(config.get("rescale_acts_by_decoder_norm",
                                                                         kind in _BATCH_TOPK))


def read_coder(folder: Path, config: Mapping[str, Any], normalize: Normalize, transcoder: bool = False,
               scale: float = 1.0) -> SparseCoder:
    """The SAE or transcoder of a folder, float32, on the CPU.

    Args:
        config: its settings, of an architecture in `KINDS`.
        normalize: how it normalises rows.
        transcoder: it writes another site than it reads.
        scale: the factor on rows before encoding.

    Raises:
        UserError: the weights are missing or damaged, or the tensors contradict the settings.
    """
    architecture, centred = config["architecture"], config.get("apply_b_dec_to_input", True)
    if architecture.endswith("transcoder") and centred:
        raise UserError(f"{folder / CONFIG}: apply_b_dec_to_input must be false in a {architecture}: its b_dec belongs "
                        "to the rows that it writes")
    tensors = _read_weights(folder / WEIGHTS, architecture, config)
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    if rescales(config):
        fold_decoder_norms(tensors)
    fold_scale(tensors, scale, scale)
    W_enc_FD, W_dec_FD = tensors["W_enc"], tensors["W_dec"]
    if W_enc_FD.shape == W_dec_FD.shape and torch.equal(W_enc_FD, W_dec_FD):
        W_enc_FD = W_dec_FD
    return KINDS[architecture].build(_Parts(W_enc_FD, W_dec_FD, tensors, config, normalize, folder / CONFIG,
                                            transcoder))


def is_tied(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the encoder is the decoder transposed, value by value."""
    transposed_FD = tensors["W_enc"].T
    return transposed_FD.shape == tensors["W_dec"].shape and torch.equal(transposed_FD, tensors["W_dec"])


def is_centred(sae: SparseCoder) -> bool:
    """Whether an SAE subtracts before encoding the bias that it adds after decoding, as SAELens does."""
    return not sae.transcoder and (sae.b_in is sae.b_out or torch.equal(sae.b_in, sae.b_out))


def tensors_of(sae: TopK | JumpReLU) -> dict[str, Tensor]:
    """SAELens' names for the parameters, float32; `W_enc` is a transposed view."""
    more = {}
    if isinstance(sae, JumpReLU) and (sae.threshold.any() or not sae.transcoder):  # else a ReLU transcoder
        more["threshold"] = sae.threshold.float()
    if sae.W_skip is not None:
        more["W_skip"] = sae.W_skip.float()
    b_enc_F = encoder_bias(sae, sae.b_out if is_centred(sae) else None)
    return {"W_enc": sae.W_enc.float().T, "b_enc": b_enc_F, "W_dec": sae.W_dec.float(),
            "b_dec": sae.b_out.float()} | more


def _read_weights(path: Path, architecture: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in float32, rounded to the dtype that the config names; their shapes are checked."""
    dtype = weights_dtype(config, path.parent / CONFIG)
    try:
        tensors = {name: tensor.to(dtype).float() for name, tensor in raw_tensors(path.parent).items()}
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: download the SAE's whole folder again") from error
    except SafetensorError as error:
        raise UserError(damage(path) or f"{path} is damaged ({error})") from error
    if "log_threshold" in tensors:  # SAELens' former name
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if "scaling_factor" in tensors:
        if not torch.allclose(tensors["scaling_factor"], torch.ones(())):  # SAELens drops it where it is 1
            raise UserError(f"{path}: scaling_factor: activations are scaled after encoding, which SAELens itself "
                            "dropped in version 6; fold the factor into W_dec and save it again")
        del tensors["scaling_factor"]
    check_tensors(str(path), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, config)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(not_finite(str(path), name))
    return tensors


def check_tensors(path: str, there: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    """Refuse tensors that contradict the settings.

    Args:
        there: the shape of each tensor, by name.

    Raises:
        UserError: a tensor contradicts the settings; the message names the first.
    """
    architecture = config["architecture"]
    wanted = set(KINDS[architecture].tensors)
    if set(there) != wanted:
        raise UserError(f"{path} holds {', '.join(sorted(there))}; a {architecture} SAE has "
                        f"{', '.join(sorted(wanted))}: correct architecture in {CONFIG}, or download both files again")
    F, D_out = (*there["W_dec"], 0, 0)[:2]
    D = (*there["W_enc"], 0)[0] if architecture.endswith("transcoder") else D_out
    shapes = {"W_enc": (D, F), "W_dec": (F, D_out), "b_dec": (D_out,), "W_skip": (D_out, D), "topk_threshold": ()}
    if D_out != F and there["W_dec"] == there["W_enc"] and not architecture.endswith("transcoder"):
        raise UserError(f"{path}: W_dec has shape {[F, D_out]}, as W_enc has, not {[D_out, F]}: save it transposed")
    for name, shape in there.items():
        if shape != shapes.get(name, (F,)):
            raise UserError(f"{path}: {name} has shape {list(shape)}, not {list(shapes.get(name, (F,)))}: download the "
                            "file again, or use the tool that wrote it")
    if (config.get("d_in"), config.get("d_sae")) != (D, F):
        lacking = [key for key in ("d_in", "d_sae") if config.get(key) is None]
        raise UserError(f"{path} has d_in {D}, d_sae {F}; {CONFIG} " + (
            f"lacks {' and '.join(lacking)}: download it again" if lacking
            else f"says {config['d_in']}, {config['d_sae']}: they are not of one SAE; download both again"))
    if architecture.endswith("transcoder") and config.get("d_out") != D_out:
        raise UserError(f"{path} has d_out {D_out}; {CONFIG} says {config.get('d_out')}: they are not of one SAE; "
                        "download both again")
