"""What any dictionary of a language model's activations offers, whatever its kind and origin: `SparseCoder`.

A coder reads rows of one site and writes rows of one. In a sparse autoencoder (SAE) the two are the same site; in a
transcoder they differ, with the same maths for every activation rule:

    u = n(x) − b_in        z = rule(u W_encᵀ)        y = z W_dec + b_out + x W_skipᵀ

n is the row normalisation (normalize.py). An SAE gives n⁻¹(y), the reconstruction of x; a transcoder gives y. Gradients
flow through `encode` and `decode` (autograd.py) if any are needed; otherwise nothing is kept for them.

Shapes: N rows, D_in width read, D_out width written, F latents, K places of a code; `...` any leading dimensions.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Self, cast

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.kernels.dispatch import kernels_for
from olmoscope.kernels.interface import Kernels
from olmoscope.sae.autograd import activations, decoded
from olmoscope.sae.check import check_codes, check_rows, check_shapes, check_sites
from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.normalize import Normalize, RowStatistics, normalize_rows, restore_rows
from olmoscope.sae.source import Source
from olmoscope.site import Site

KERNEL_DTYPES = (torch.float32, torch.float64)
"""The dtypes that the kernels of every device take; in any other dtype, plain torch computes."""

_AS_B_IN = cast(Tensor, None)
"""A placeholder for `b_in` until `__post_init__` replaces it."""


@dataclass(eq=False, repr=False)
class SparseCoder(ABC):
    """Parameters of one dictionary and what they compute; the kinds differ in which latents become active.

    Attributes:
        W_enc: encoder `[F, D_in]`, one row per latent; in a tied SAE, the same tensor as `W_dec`.
        W_dec: decoder `[F, D_out]`, one row per latent: the direction that it writes.
        b_in: `[D_in]`, subtracted from the (normalised) rows before encoding.
        normalize: how rows are normalised before encoding; an SAE's reconstruction undoes it.
        b_out: `[D_out]`, added after decoding. By default the same tensor as `b_in`, as in an SAE.
        W_skip: `[D_out, D_in]`, maps the rows directly to the output; None for no skip. Transcoders only.
        transcoder: whether it writes another site than it reads.
        reads, writes: the sites; empty if they are unknown.
        source: what its files say about it, e.g. `source.model_name`; None if it was not loaded from files.

    Example:
        >>> import olmoscope, torch
        >>> sae = olmoscope.load("olmoscope-demo/runs/layer_07/width_4096/topk_32_raw_untied")
        >>> x = torch.randn(2, 5, sae.d_in, requires_grad=True)  # or [D], or [B, D]
        >>> codes = sae.encode(x)
        >>> codes.values.shape, codes.to_dense().shape, sae.decode(codes).shape
        (torch.Size([2, 5, 32]), torch.Size([2, 5, 4096]), torch.Size([2, 5, 256]))
        >>> codes.values.sum().backward()
        >>> x.grad.shape
        torch.Size([2, 5, 256])
    """

    W_enc: Tensor
    W_dec: Tensor
    b_in: Tensor
    normalize: Normalize
    _: KW_ONLY
    b_out: Tensor = _AS_B_IN
    W_skip: Tensor | None = None
    transcoder: bool = False
    reads: tuple[Site, ...] = ()
    writes: tuple[Site, ...] = ()
    source: Source | None = None

    def __post_init__(self) -> None:
        if self.b_out is _AS_B_IN:
            self.b_out = self.b_in
        kind = type(self).__name__
        check_shapes(kind, {name: value for name, value in vars(self).items() if isinstance(value, Tensor)},
                     self.transcoder)
        check_sites(kind, self.reads, self.writes, self.transcoder)

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the rows read."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the rows written."""
        return self.W_dec.shape[1]

    @property
    def d_model(self) -> int:
        """`d_in`, under its usual name for an SAE."""
        return self.d_in

    @property
    def tied(self) -> bool:
        """Whether encoder and decoder are one matrix."""
        return self.W_enc is self.W_dec

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, and of the results of `encode` and `decode`."""
        return self.W_enc.dtype

    def __repr__(self) -> str:
        ends = f"{self.d_in} to {self.d_out}" if self.transcoder else f"{self.d_in}"
        return f"{type(self).__name__}(width {ends}, {self.d_sae} latents, normalize {self.normalize})"

    def center(self, x_ND: Tensor) -> tuple[Tensor, RowStatistics | None]:
        """Rows as the encoder sees them, u `[N, D_in]`: in the parameters' dtype, normalised, minus `b_in`; and what
        the normalisation removed."""
        normal_ND, statistics = normalize_rows(x_ND.to(self.dtype), self.normalize)
        return normal_ND - self.b_in, statistics

    def encode(self, x: Tensor) -> SparseCodes:
        """The active latents of activations.

        Args:
            x: `[..., D_in]` of any float dtype, on the coder's device.

        Returns:
            Codes `[..., K]` in the parameters' dtype. K is k in a TopK coder, else the largest number of active latents
            in any of these rows. Gradients flow from the values to x and to the parameters, through the active latents
            only: the choice of latents has no gradient, so a threshold or a gate's bias gets none.

        Raises:
            UserError: x is not a tensor, its dtype is not a float dtype, or its width or device differs.
        """
        check_rows(x, self.d_in, self.device)
        x_ND = x.reshape(-1, self.d_in)
        u_ND, statistics = self.center(x_ND)
        values_NK, indices_NK = activations(self.kernels, self._choose, u_ND.contiguous(), self.W_enc, *self._affine())
        shape = (*x.shape[:-1], values_NK.shape[1])
        return SparseCodes(values_NK.view(shape), indices_NK.view(shape), self.d_sae,
                           None if self.transcoder else statistics, None if self.W_skip is None else x_ND)

    def decode(self, codes: SparseCodes) -> Tensor:
        """The rows that codes represent, `[..., D_out]`, in the model's own space and in the parameters' dtype.

        Args:
            codes: from `encode`, perhaps with other values (`dataclasses.replace`). Codes made by hand work only for a
                coder that needs nothing else from the rows: an SAE that does not normalise, a transcoder without skip.

        Returns:
            The rows; gradients flow to `codes.values` (even where a value is 0) and to the parameters.

        Raises:
            UserError: these are not codes, they belong to another dictionary or device, or they were made by hand and
                lack what this coder needs from the rows.
        """
        check_codes(codes, self.d_sae, self.device, "none" if self.transcoder else self.normalize,
                    self.W_skip is not None)
        shape = codes.values.shape
        rows = (shape[:-1].numel(), shape[-1])
        values_NK, indices_NK = codes.values.reshape(rows).to(self.dtype), codes.indices.reshape(rows)
        y_ND = decoded(self.kernels, values_NK, indices_NK, self.W_dec) + self.b_out
        if self.W_skip is not None:
            y_ND = y_ND + cast(Tensor, codes._rows).to(self.dtype) @ self.W_skip.T
        return restore_rows(y_ND, codes._statistics).view(*shape[:-1], self.d_out)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, SparseCodes]:
        """`decode(encode(x))`, `[..., D_out]` in the parameters' dtype, and the codes that it comes from."""
        codes = self.encode(x)
        return self.decode(codes), codes

    def at(self, reads: Sequence[Site | str | int], writes: Sequence[Site | str | int] | None = None) -> Self:
        """The same coder with its sites set; it shares the tensors.

        Args:
            reads: sites or their texts, `["layers.7"]`.
            writes: the same; None for the sites that it reads.

        Raises:
            UserError: a text does not name a site.
        """
        sites = {"reads": tuple(map(Site.parse, reads)),
                 "writes": tuple(map(Site.parse, reads if writes is None else writes))}
        return self.from_state_dict(self.state_dict(), **self._settings() | sites)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same coder on another device, in another dtype, or both; tensors that need no change are shared.

        Raises:
            UserError: the dtype is not a float dtype.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"to({dtype}): a coder's parameters have a float dtype; choose one")
        moved = {name: tensor.detach().to(device, dtype).requires_grad_(tensor.requires_grad)
                 for name, tensor in self.state_dict().items()}
        return self.from_state_dict(moved, **self._settings())

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters by name, each once, not copied: `W` if tied, else `W_enc` and `W_dec`; the latents' own
        parameters; `b_pre` if `b_in` is `b_out`, else both; `W_skip` if there is one."""
        own = {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}
        matrices = [own.pop(name) for name in ("W_enc", "W_dec")]
        ends = [own.pop(name) for name in ("b_in", "b_out")]
        skip = {name: own.pop(name) for name in ("W_skip",) if name in own}
        return ({"W": matrices[0]} if self.tied else dict(zip(("W_enc", "W_dec"), matrices, strict=True))) | own | (
            {"b_pre": ends[0]} if ends[0] is ends[1] else dict(zip(("b_in", "b_out"), ends, strict=True))) | skip

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], **settings: Any) -> Self:
        """A coder of this kind around tensors, named as in `state_dict`.

        Args:
            settings: the fields that are not tensors: `normalize`, `k` of a TopK, `transcoder` if it is one.
        """
        tensors: dict[str, Any] = dict(state)
        for one, both in (("W", ("W_enc", "W_dec")), ("b_pre", ("b_in", "b_out"))):
            if one in tensors:
                tensors |= dict.fromkeys(both, tensors.pop(one))
        return cls(**tensors, **settings)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy parameters into this coder, from `state_dict` of a coder of the same kind and size.

        Raises:
            UserError: the names or shapes differ; then nothing is copied.
        """
        mine = self.state_dict()
        if mine.keys() != state.keys():
            raise UserError(f"load_state_dict: this {type(self).__name__} holds {', '.join(mine)}, but the state has "
                            f"{', '.join(state) or 'no tensors'}")
        for name, tensor in mine.items():
            if tensor.shape != state[name].shape:
                raise UserError(f"load_state_dict: {name} is {list(state[name].shape)}, but this coder's is "
                                f"{list(tensor.shape)}: load it into a coder of its own size")
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(state[name])

    @property
    def kernels(self) -> Kernels:
        """The kernels for the coder's device, or plain torch for a dtype that they do not take."""
        if self.dtype in KERNEL_DTYPES:
            return kernels_for(self.device)
        from olmoscope.kernels import reference

        return cast(Kernels, reference)

    def _settings(self) -> dict[str, Any]:
        """The fields that are not tensors."""
        return {field.name: value for field in fields(self)
                if not isinstance(value := getattr(self, field.name), Tensor)}

    @abstractmethod
    def _choose(self, u_ND: Tensor) -> tuple[Tensor, Tensor]:
        """values_NK and indices_NK of rows from `center`, without any gradient."""

    @abstractmethod
    def _affine(self) -> tuple[Tensor, Tensor | None]:
        """bias_F and scale_F (None: ones): an active latent's value is scale · (u · W_enc) + bias."""
