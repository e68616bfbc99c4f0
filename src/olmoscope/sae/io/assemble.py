"""The coder of a reading and its tensors: what no coder expresses directly is folded into the weights, in float64.

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
        UserError: nothing says its site, or its numbers make no SAE.
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
    """The tensors of an SAE that needs no `by_decoder_norm`, `scale` and `scale_out`. Latents that are compared with
    each other have codes of unit decoder rows; else codes stay."""
    if "W" in tensors:
        tensors["W_enc"] = tensors["W_dec"] = tensors["W"]
    if reading.by_decoder_norm:
        norms_F = torch.linalg.vector_norm(tensors["W_dec"], dim=1, dtype=torch.float64)
        if reading.rule == "jumprelu":
            tensors["threshold"] = scaled(tensors["threshold"], 1 / norms_F)
        else:
            for name in ("W_enc", "b_enc"):
                tensors[name] = scaled(tensors[name], norms_F)
            tensors["W_dec"] = scaled(tensors["W_dec"], 1 / norms_F.clamp_min(torch.finfo(torch.float32).tiny))
    if reading.scale != 1:
        assert not reading.centred, "b_dec would be of another scale than the rows"
        tensors["W_enc"] = scaled(tensors["W_enc"], reading.scale)
    if reading.scale_out != 1:
        tensors |= {name: scaled(tensors[name], 1 / reading.scale_out) for name in ("W_dec", "b_dec")
                    if name in tensors}
    return tensors


def scaled(tensor: Tensor, factor: float | Tensor) -> Tensor:
    """A tensor times a number, or each row times its own, in float64 and some rows at a time.

    Args:
        factor: a number, or float64 `[F]`.
    """
    made = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    for start in range(0, len(tensor), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        by = factor if isinstance(factor, float) else factor[rows].view(-1, *[1] * (tensor.dim() - 1))
        made[rows] = tensor[rows].double() * by
    return made
