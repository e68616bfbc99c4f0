"""What a sparse coder refuses: each mistake gets one line that says what is wrong, where, and what to do.

Shapes: D_in width read, D_out width written, F latents, K places of a code.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.normalize import Normalize
from olmoscope.site import Site


def check_shapes(kind: str, parameters: Mapping[str, Tensor], transcoder: bool) -> None:
    """Refuse parameters that do not fit together.

    Args:
        kind: the name of the coder's class.
        parameters: the tensors by the names of its fields, at least `W_enc` and `W_dec`.

    Raises:
        UserError: a parameter does not fit; it names the first.
    """
    W_enc, W_dec = parameters["W_enc"], parameters["W_dec"]
    (F, D_out), D_in = W_dec.shape, W_enc.shape[1]
    if not transcoder and D_in != D_out:
        raise UserError(f"{kind}: W_enc reads rows of width {D_in}, but W_dec writes {D_out}: an SAE has one width; "
                        "pass transcoder=True if this is a transcoder")
    if not transcoder and "W_skip" in parameters:
        raise UserError(f"{kind}: only a transcoder has a W_skip; pass transcoder=True if this is one")
    shapes = {"W_enc": (F, D_in), "W_dec": (F, D_out), "b_in": (D_in,), "b_out": (D_out,), "W_skip": (D_out, D_in)}
    for name, tensor in parameters.items():
        if tuple(tensor.shape) != shapes.get(name, (F,)):
            raise UserError(f"{kind}: {name} is {list(tensor.shape)}; with W_enc {list(W_enc.shape)} and W_dec "
                            f"{list(W_dec.shape)} it must be {list(shapes.get(name, (F,)))}")


def check_sites(kind: str, reads: tuple[Site, ...], writes: tuple[Site, ...], transcoder: bool) -> None:
    """Refuse a transcoder's sites in a coder that is not one.

    Raises:
        UserError: an SAE does not write where it reads.
    """
    if not transcoder and reads != writes:
        raise UserError(f"{kind} reads {_said(reads)} and writes {_said(writes)}: an SAE's sites are the same; pass "
                        "transcoder=True if this is a transcoder")


def check_rows(x: Any, width: int, device: torch.device) -> None:
    """Refuse what cannot be encoded.

    Args:
        width: width of the rows that the coder reads.
        device: the coder's device.

    Raises:
        UserError: x is not a tensor, its dtype is not a float dtype, or its width or device differs.
    """
    _check_tensor("encode", "x", x)
    if not x.is_floating_point():
        raise UserError(f"encode: x has dtype {x.dtype}, but activations have a float dtype: pass x.float() if these "
                        "are activations (token ids must go through the language model first)")
    if x.dim() == 0 or x.shape[-1] != width:
        raise UserError(f"encode: x is {list(x.shape)}; this coder reads rows of width {width}, along the last "
                        "dimension: give it activations of the site that it was trained on")
    _check_device("encode", "x", x, device)


def check_codes(codes: Any, latents: int, device: torch.device, restores: Normalize, skips: bool) -> None:
    """Refuse what cannot be decoded.

    Args:
        latents: how many latents the coder has.
        device: the coder's device.
        restores: the normalisation that decoding undoes.
        skips: whether decoding needs the rows themselves.

    Raises:
        UserError: these are not codes, they belong to another dictionary or device, or they lack what this coder needs
            from the rows.
    """
    if not isinstance(codes, SparseCodes):
        raise UserError(f"decode takes the SparseCodes that encode gives, not {type(codes).__name__}: wrap values and "
                        "indices, SparseCodes(values, indices, d_sae)")
    values, indices = codes.values, codes.indices
    for name, tensor in (("codes.values", values), ("codes.indices", indices)):
        _check_tensor("decode", name, tensor)
        _check_device("decode", name, tensor, device)
    if codes.d_sae != latents:
        raise UserError(f"decode: the codes have {codes.d_sae} latents, but this coder has {latents}: decode them with "
                        "the coder that made them")
    if values.dim() == 0 or values.shape != indices.shape or indices.dtype != torch.int64:
        raise UserError(f"decode: codes.values is {list(values.shape)}, codes.indices {list(indices.shape)} of "
                        f"{indices.dtype}: both must have the shape [..., K], and indices the dtype torch.int64")
    _check_rows_of_codes(restores != "none", f"the scale of each row, which a {restores} SAE restores",
                         None if codes._statistics is None else codes._statistics.mean_B1, values)
    _check_rows_of_codes(skips, "the rows that W_skip reads", codes._rows, values)


def _check_rows_of_codes(needed: bool, what: str, kept: Tensor | None, values: Tensor) -> None:
    """Refuse codes that lack what is needed from the rows, or hold it for other rows."""
    if not needed:
        return
    if kept is None:
        raise UserError(f"decode: codes made by hand do not hold {what}: change codes that encode returned, "
                        "dataclasses.replace(coder.encode(x), values=..., indices=...)")
    if len(kept) != (rows := values.shape[:-1].numel()):
        raise UserError(f"decode: codes.values has {rows} rows, but encode was given {len(kept)}: keep the leading "
                        "dimensions as they were, or encode only the rows that you want")


def _check_tensor(where: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        hint = f"torch.from_numpy({name})" if type(value).__module__ == "numpy" else f"torch.as_tensor({name})"
        raise UserError(f"{where}: {name} is not a torch tensor but {type(value).__name__}: pass {hint}")


def _check_device(where: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise UserError(f"{where}: {name} is on {tensor.device}, but the coder is on {device}: move one of them, e.g. "
                        f"coder.to({str(tensor.device)!r})")


def _said(sites: tuple[Site, ...]) -> str:
    return ", ".join(map(str, sites)) or "unnamed sites"
