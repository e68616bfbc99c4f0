"""Build the coder from a `Reading` and its tensors. Scales and norms that a coder cannot express are folded into the
weights, in float64.

Shapes: D width read, O width written, F latents.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.files import sha256
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Here, Place
from olmoscope.sae.io.reading import Reading
from olmoscope.sae.threshold import Gated, JumpReLU
from olmoscope.sae.topk import TopK

_ROWS_AT_ONCE = 4096
"""Rows of a matrix that are held in float64 at a time."""


def opened(place: Place, reading: Reading, tensors: Mapping[str, Tensor]) -> Opened:
    """An SAE whose tensors are loaded.

    Args:
        tensors: float32, as `layout.load` names them.

    Raises:
        UserError: its site is not known.
    """
    if not reading.reads or not reading.writes:
        raise UserError(f"{place.where()} does not say which site it {'writes' if reading.reads else 'reads'}; give "
                        "--site")
    path = place.path if isinstance(place, Here) else place.fetch(reading.files[0]).parent
    files = {name: sha256(place.fetch(name)) for name in reading.files}
    return Opened(
        _coder(reading, tensors).at(reading.reads, reading.writes),
        path.resolve().name if isinstance(place, Here) else place.name, reading.model_name,
        reading.model_revision, reading.architecture, path, "file" if path.is_file() else "folder",
        _identity(files, reading), reading.bos, reading.context_size, reading.dtype, dict(reading.metadata),
        unread=reading.unread, files=files)


def _identity(files: Mapping[str, str], reading: Reading) -> str:
    """A hash of an SAE's files, and of the settings that may come from its address instead."""
    decisive = (sorted(files.items()), reading.scale, reading.scale_out, reading.k)
    return f"sha256:{hashlib.sha256(repr(decisive).encode()).hexdigest()[:40]}"


def _coder(reading: Reading, tensors: Mapping[str, Tensor]) -> SparseCoder:
    """The coder, float32, on the CPU, without its sites."""
    there = _folded(reading, dict(tensors))
    W_enc_FD, W_dec_FO = there["W_enc"], there["W_dec"]
    if W_enc_FD.shape == W_dec_FO.shape and torch.equal(W_enc_FD, W_dec_FO):
        W_enc_FD = W_dec_FO
    b_dec_O = there.get("b_dec", W_dec_FO.new_zeros(reading.d_out))
    common = (W_enc_FD, W_dec_FO, b_dec_O if reading.centred else W_enc_FD.new_zeros(reading.d_in), reading.normalize)
    ends: dict[str, Any] = {} if reading.centred else {"b_out": b_dec_O}
    if reading.transcoder:
        ends |= {"W_skip": there.get("W_skip"), "transcoder": True}
    if reading.rule == "gated":
        return Gated(*common, there["b_gate"], there["b_mag"], there["r_mag"], **ends)
    if reading.rule in ("topk", "groupmax"):
        assert reading.k is not None
        return (TopK if reading.rule == "topk" else GroupMax)(*common, there["b_enc"], reading.k, **ends)
    threshold_F = there.get("threshold", torch.zeros(())).expand(reading.d_sae).contiguous()
    return JumpReLU(*common, there["b_enc"], threshold_F, **ends)


def _folded(reading: Reading, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with `by_decoder_norm`, `unit_rows`, `scale` and `scale_out` folded in."""
    if "W" in tensors:
        tensors["W_enc"] = tensors["W_dec"] = tensors["W"]
    if reading.unit_rows:
        fold_decoder_norms(tensors)
    elif reading.by_decoder_norm:
        tensors["threshold"] = _scaled(tensors["threshold"], 1 / _decoder_norms(tensors))
    assert reading.scale == 1 or not reading.centred, "b_dec would have another scale than the rows"
    fold_scale(tensors, reading.scale, reading.scale_out)
    return tensors


def fold_decoder_norms(tensors: dict[str, Tensor]) -> None:
    """Multiply pre-activations, and so codes, by the norms of the decoder rows, and make these rows unit vectors.

    Args:
        tensors: `W_enc` [F, D], `b_enc` [F] and `W_dec` [F, O], replaced in place.
    """
    norms_F = _decoder_norms(tensors)
    for name in ("W_enc", "b_enc"):
        tensors[name] = _scaled(tensors[name], norms_F)
    tensors["W_dec"] = _scaled(tensors["W_dec"], 1 / norms_F.clamp_min(torch.finfo(torch.float32).tiny))


def fold_scale(tensors: dict[str, Tensor], scale: float, scale_out: float) -> None:
    """Multiply rows by `scale` before encoding, and divide what is decoded by `scale_out`. Codes and thresholds stay.

    Args:
        tensors: `W_enc`, `W_dec` and perhaps `b_dec`, replaced in place.
    """
    if scale != 1:
        tensors["W_enc"] = _scaled(tensors["W_enc"], scale)
    if scale_out != 1:
        tensors |= {name: _scaled(tensors[name], 1 / scale_out) for name in ("W_dec", "b_dec") if name in tensors}


def _decoder_norms(tensors: Mapping[str, Tensor]) -> Tensor:
    """The norm of each decoder row, `[F]`, float64."""
    norms_F: Tensor = torch.linalg.vector_norm(tensors["W_dec"], dim=1, dtype=torch.float64)
    return norms_F


def _scaled(tensor: Tensor, factor: float | Tensor) -> Tensor:
    """A tensor times a number, or each row times its own, computed in float64, some rows at a time.

    Args:
        factor: a number, or float64 `[F]`.
    """
    made = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    for start in range(0, len(tensor), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        by = factor if isinstance(factor, float) else factor[rows].view(-1, *[1] * (tensor.dim() - 1))
        made[rows] = tensor[rows].double() * by
    return made
