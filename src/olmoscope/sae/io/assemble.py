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
    return Opened(
        coder(reading, tensors).at(reading.reads, reading.writes), title(place), reading.model_name,
        reading.model_revision, reading.architecture, path, "file" if path.is_file() else "folder",
        identity(place, reading), reading.bos, reading.context_size, reading.dtype, dict(reading.metadata),
        unread=reading.unread)


def title(place: Place) -> str:
    """What tables call an SAE."""
    return place.path.resolve().name if isinstance(place, Here) else place.name


def identity(place: Place, reading: Reading) -> str:
    """A hash of its files, and of what its address alone says."""
    of_files = {name: sha256(place.fetch(name)) for name in reading.files}
    said = (sorted(of_files.items()), reading.scale, reading.scale_out, reading.k)
    return f"sha256:{hashlib.sha256(repr(said).encode()).hexdigest()[:40]}"


def coder(reading: Reading, tensors: Mapping[str, Tensor]) -> SparseCoder:
    """The coder, float32, on the CPU; its sites are not said yet."""
    W_enc_FD, W_dec_FO = (tensors["W"],) * 2 if "W" in tensors else (tensors["W_enc"], tensors["W_dec"])
    if W_enc_FD.shape == W_dec_FO.shape and torch.equal(W_enc_FD, W_dec_FO):
        W_enc_FD = W_dec_FO
    b_enc_F = tensors.get("b_enc")
    b_dec_O = tensors.get("b_dec", W_dec_FO.new_zeros(reading.d_out))
    if reading.by_decoder_norm and reading.rule != "gated":
        norms_F = W_dec_FO.double().norm(dim=1)
        if reading.rule in ("topk", "groupmax", "abstopk"):  # which compare latents: codes of unit decoder rows
            W_enc_FD, b_enc_F = _by_rows(W_enc_FD, norms_F), _by_rows(_present(b_enc_F, W_dec_FO), norms_F)
            W_dec_FO = _by_rows(W_dec_FO, 1 / norms_F.clamp_min(torch.finfo(torch.float32).tiny))
        elif "threshold" in tensors:
            tensors = dict(tensors) | {"threshold": _by_rows(tensors["threshold"].expand(reading.d_sae), 1 / norms_F)}
    if reading.scale != 1:
        W_enc_FD = (W_enc_FD.double() * reading.scale).float()
    b_in_D = b_dec_O if reading.centred else W_enc_FD.new_zeros(reading.d_in)
    if reading.centred and reading.scale != 1:
        b_in_D = (b_in_D.double() / reading.scale).float()
    if reading.scale_out != 1:
        W_dec_FO, b_dec_O = ((tensor.double() / reading.scale_out).float() for tensor in (W_dec_FO, b_dec_O))
        if reading.centred and reading.scale == reading.scale_out:
            b_in_D = b_dec_O
    ends: dict[str, Any] = {"b_out": b_dec_O} if b_in_D is not b_dec_O else {}
    if reading.transcoder:
        ends |= {"b_out": b_dec_O, "W_skip": tensors.get("W_skip"), "transcoder": True}
    common = (W_enc_FD, W_dec_FO, b_in_D, reading.normalize)
    if reading.rule == "gated":
        return Gated(*common, tensors["b_gate"], tensors["b_mag"], tensors["r_mag"], **ends)
    b_enc_F = _present(b_enc_F, W_dec_FO)
    if reading.rule == "abstopk":
        both = (torch.cat([W_enc_FD, -W_enc_FD]), torch.cat([W_dec_FO, -W_dec_FO]), *common[2:])
        return TopK(*both, torch.cat([b_enc_F, -b_enc_F]), _k(reading), **ends)
    if reading.rule in ("topk", "groupmax"):
        return (TopK if reading.rule == "topk" else GroupMax)(*common, b_enc_F, _k(reading), **ends)
    threshold_F = tensors.get("threshold", torch.zeros(())).expand(reading.d_sae).contiguous()
    return JumpReLU(*common, b_enc_F, threshold_F, **ends)


def _present(b_F: Tensor | None, W_FO: Tensor) -> Tensor:
    """A bias, or zeros where the files have none."""
    return W_FO.new_zeros(len(W_FO)) if b_F is None else b_F


def _by_rows(tensor: Tensor, factor_F: Tensor) -> Tensor:
    factors = factor_F if tensor.dim() == 1 else factor_F[:, None]
    return (tensor.double() * factors).float()


def _k(reading: Reading) -> int:
    assert reading.k is not None
    return reading.k
