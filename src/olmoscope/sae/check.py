"""What a sparse coder refuses: each mistake in one line that says what, where, and what to do.

Shapes: D_in width read, D_out width written, F latents, K places of a code.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.sae.codes import SparseCodes

if TYPE_CHECKING:
    from olmoscope.sae.coder import SparseCoder


def check_shapes(coder: "SparseCoder") -> None:
    """Refuse parameters that do not fit together.

    Raises:
        UserError: naming the first that does not.
    """
    kind = type(coder).__name__
    if not coder.transcoder and coder.d_in != coder.d_out:
        raise UserError(f"{kind}: W_enc reads rows of width {coder.d_in}, W_dec writes {coder.d_out}: an SAE's are of "
                        "one width; say transcoder=True if this is one")
    if not coder.transcoder and coder.W_skip is not None:
        raise UserError(f"{kind}: only a transcoder has a W_skip; say transcoder=True if this is one")
    if not coder.transcoder and coder.reads != coder.writes:
        raise UserError(f"{kind} reads {_sites(coder.reads)} and writes {_sites(coder.writes)}: an SAE's sites are the "
                        "same; say transcoder=True if this is one")
    F, D_in, D_out = coder.d_sae, coder.d_in, coder.d_out
    shapes = {"W_enc": (F, D_in), "W_dec": (F, D_out), "b_in": (D_in,), "b_out": (D_out,), "W_skip": (D_out, D_in)}
    for name, tensor in vars(coder).items():
        if isinstance(tensor, Tensor) and tuple(tensor.shape) != shapes.get(name, (F,)):
            raise UserError(f"{kind}: {name} is {list(tensor.shape)}; with W_enc {list(coder.W_enc.shape)} and W_dec "
                            f"{list(coder.W_dec.shape)} it must be {list(shapes.get(name, (F,)))}")


def check_rows(coder: "SparseCoder", x: Any) -> None:
    """Refuse what cannot be encoded.

    Raises:
        UserError: no tensor, not of a float dtype, of another width, on another device.
    """
    _check_tensor("encode", "x", x)
    if not x.is_floating_point():
        raise UserError(f"encode: x is of {x.dtype}; activations are of a float dtype: x.float() if these are some "
                        "(token ids must go through the language model first)")
    if x.dim() == 0 or x.shape[-1] != coder.d_in:
        raise UserError(f"encode: x is {list(x.shape)}; this coder reads rows of width {coder.d_in}, along the last "
                        "dimension: give it activations of the site that it was trained on")
    _check_device("encode", "x", x, coder)


def check_codes(coder: "SparseCoder", codes: Any) -> None:
    """Refuse what cannot be decoded.

    Raises:
        UserError: no codes, of another dictionary, on another device, or without what this coder needs of the rows.
    """
    if not isinstance(codes, SparseCodes):
        raise UserError(f"decode takes the SparseCodes that encode gives, not {type(codes).__name__}: wrap values and "
                        "indices, SparseCodes(values, indices, d_sae)")
    values, indices = codes.values, codes.indices
    for name, tensor in (("codes.values", values), ("codes.indices", indices)):
        _check_tensor("decode", name, tensor)
        _check_device("decode", name, tensor, coder)
    if codes.d_sae != coder.d_sae:
        raise UserError(f"decode: the codes are of {codes.d_sae} latents, this coder has {coder.d_sae}: decode them by "
                        "the coder that made them")
    if values.dim() == 0 or values.shape != indices.shape or indices.dtype != torch.int64:
        raise UserError(f"decode: codes.values is {list(values.shape)}, codes.indices {list(indices.shape)} of "
                        f"{indices.dtype}: they must be of one shape [..., K], indices of torch.int64")
    restores = coder.normalize != "none" and not coder.transcoder
    _check_rows_of_codes(restores, f"the scale of each row, which a {coder.normalize} SAE restores",
                         None if codes._statistics is None else codes._statistics.mean_B1, values)
    _check_rows_of_codes(coder.W_skip is not None, "the rows that W_skip reads", codes._rows, values)


def _check_rows_of_codes(needed: bool, what: str, kept: Tensor | None, values: Tensor) -> None:
    """Refuse codes that do not hold what is needed of the rows, or hold that of others."""
    if not needed:
        return
    if kept is None:
        raise UserError(f"decode: codes made by hand do not hold {what}: change those that encode gave, "
                        "dataclasses.replace(coder.encode(x), values=..., indices=...)")
    if len(kept) != (rows := values.shape[:-1].numel()):
        raise UserError(f"decode: codes.values are of {rows} rows, encode was given {len(kept)}: keep the leading "
                        "dimensions as they were, or encode the rows in question alone")


def _check_tensor(where: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        hint = f"torch.from_numpy({name})" if type(value).__module__ == "numpy" else f"torch.as_tensor({name})"
        raise UserError(f"{where}: {name} is no torch tensor but {type(value).__name__}: pass {hint}")


def _check_device(where: str, name: str, tensor: Tensor, coder: "SparseCoder") -> None:
    if tensor.device != coder.device:
        raise UserError(f"{where}: {name} is on {tensor.device}, the coder on {coder.device}: move one of them, e.g. "
                        f"coder.to({str(tensor.device)!r})")


def _sites(sites: tuple[Any, ...]) -> str:
    return ", ".join(map(str, sites)) or "sites that are not said"
