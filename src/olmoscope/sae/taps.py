"""What coders see and compute in a forward pass while they are attached to a model (attach.py).

Shapes: B sequences, T positions, D width of a site, K places of a code.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.codes import SparseCodes
from olmoscope.site import Site

Mode = Literal["read", "replace", "replace_keep_error"]


class NotThere(UserError, KeyError):
    """Nothing is held for a site: no coder is attached there, or no forward pass has reached it yet."""

    __str__ = ValueError.__str__  # KeyError's shows the message in quotation marks


class AtSites(Mapping[Site | str | int, Tensor]):
    """Tensors by site, `[B, T, D]` each; a site may be given as its text, `layers.7`, or its layer's number."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = tuple(sites)
        self._tensors: dict[Site, Tensor] = {}

    def __getitem__(self, site: Site | str | int) -> Tensor:
        site = Site.parse(site)
        if site not in self._sites:
            raise NotThere(f"nothing is kept for {site}, only for {', '.join(map(str, self._sites))}")
        if site not in self._tensors:
            raise NotThere(f"no forward pass has reached {site} yet: run the model first, inside the with block")
        return self._tensors[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Taps(AtSites):
    """The activations of the last forward pass at the sites of the attached coders: `taps[site]`, before anything is
    replaced.

    Attributes:
        reconstructions: x̂ for each site written, in the coder's dtype.
        errors: x − x̂, likewise. If the error is kept and gradients are enabled, each is a leaf: after `backward()`,
            its `grad` is the gradient with respect to the error.
    """

    def __init__(self, coders: Sequence[SparseCoder], widths: Mapping[Site, int], mode: Mode) -> None:
        super().__init__(sorted(widths))
        written = sorted({site for coder in coders for site in coder.writes})
        self.reconstructions, self.errors = AtSites(written), AtSites(written)
        self._coders, self._widths, self._mode = tuple(coders), widths, mode
        self._codes: dict[int, SparseCodes] = {}
        self._parts: dict[int, dict[Site, Tensor]] = {}

    @property
    def codes(self) -> SparseCodes:
        """The codes `[B, T, K]` of the only coder attached.

        Raises:
            UserError: several are attached, or no forward pass has reached its sites yet.
        """
        if len(self._coders) > 1:
            raise UserError("several coders are attached: name the one whose codes you want, taps.codes_of(coder)")
        return self.codes_of(self._coders[0])

    def codes_of(self, coder: SparseCoder) -> SparseCodes:
        """The codes `[B, T, K]` of one of the coders attached.

        Raises:
            UserError: the coder is not attached, or no forward pass has reached its sites yet.
        """
        for number, one in enumerate(self._coders):
            if one is coder:
                if number not in self._codes:
                    raise NotThere(f"no forward pass has reached {coder.reads[-1]} yet: run the model first, inside "
                                   "the with block")
                return self._codes[number]
        raise UserError("codes_of: this coder is not attached; pass the same object that was given to attach")

    def reach(self, site: Site, x_BTD: Tensor) -> Tensor:
        """Run the attached coders when a forward pass reaches a site; return the vectors to use there."""
        self._tensors[site] = x_BTD
        put_BTD = x_BTD
        for number, coder in enumerate(self._coders):
            if site == max(coder.reads):
                self._encode(number, coder)
            for write in coder.writes:
                if site == max(write, *coder.reads):  # a crosscoder's first sites wait for its last
                    put_BTD = self._write(write, self._tensors[write], self._parts[number][write])
        return x_BTD if self._mode == "read" else put_BTD

    def _encode(self, number: int, coder: SparseCoder) -> None:
        read = [self._tensors[site] for site in coder.reads]
        codes = coder.encode(read[0] if len(read) == 1 else torch.cat(read, dim=-1))
        if torch.is_grad_enabled():
            if codes.values.requires_grad:
                codes.values.retain_grad()
            elif self._mode != "read":
                codes.values.requires_grad_()  # model and coder are frozen, but the logits still depend on the values
        self._codes[number] = codes
        parts = torch.split(coder.decode(codes), [self._widths[site] for site in coder.writes], dim=-1)
        self._parts[number] = dict(zip(coder.writes, parts, strict=True))

    def _write(self, site: Site, x_BTD: Tensor, reconstruction_BTD: Tensor) -> Tensor:
        """Keep a coder's reconstruction of a site and its error; return the vectors to use there in this mode."""
        error_BTD = x_BTD.to(reconstruction_BTD.dtype) - reconstruction_BTD
        keeps = self._mode == "replace_keep_error"
        if keeps and torch.is_grad_enabled():
            error_BTD = error_BTD.detach().requires_grad_()
        self.reconstructions._tensors[site], self.errors._tensors[site] = reconstruction_BTD, error_BTD
        if not keeps:
            return reconstruction_BTD.to(x_BTD.dtype)
        if not torch.is_grad_enabled():
            return x_BTD
        # x̂ + error has the value of x and the gradients of both terms. Written like this, the terms add exactly zero
        # to x, so that not even its last bit changes.
        nothing_BTD = (reconstruction_BTD - reconstruction_BTD.detach()) + (error_BTD - error_BTD.detach())
        return x_BTD.detach() + nothing_BTD.to(x_BTD.dtype)
