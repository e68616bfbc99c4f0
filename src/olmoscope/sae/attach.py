"""Coders in a running model: read its activations, or replace them with the coders' own. For research code.

This works on any loaded causal LM of transformers, with or without its head, by forward hooks that are removed when the
block ends, however it ends.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from olmoscope.errors import UserError
from olmoscope.model.capture import replaced, watched
from olmoscope.model.layer_pass import Role
from olmoscope.model.layers import find_layers
from olmoscope.model.sites import Place, Sites, find_sites
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.taps import Mode, Taps
from olmoscope.site import Site

_LOOKING = ContextVar("looking", default=False)
"""Whether a pass only looks for sites: coders attached earlier then do nothing."""


@contextlib.contextmanager
def attach(model: nn.Module, coder: SparseCoder | Sequence[SparseCoder], mode: Mode = "read", *,
           modules: Mapping[Role, str] | None = None) -> Iterator[Taps]:
    """Attach coders to a model while a with block runs: each forward pass goes through them.

    Args:
        model: a causal LM of transformers, or its decoder alone; in any dtype, training or not. Generating with a cache
            works too; then the taps hold only the last token.
        coder: one coder, or several, each on the device of its layers. A coder further up reads what those below have
            put there. No two may write the same site.
        mode:
            `read`: nothing changes.
            `replace`: the model continues with the reconstruction at the sites that a coder writes.
            `replace_keep_error`: it continues with reconstruction + error, where the error is a constant. So its logits
            stay the same, to the last bit at a layer's output, and gradients reach everything below only through the
            codes: use `taps.codes.values.grad` and `taps.errors[site].grad` for attribution. Source: Marks et al.
            2024, arXiv:2403.19647; `use_error_term` in SAELens.
        modules: names of the attention and the MLP module in a layer, if they are unusual:
            `{"attention": "attn", "mlp": "ffn"}`.

    Yields:
        `taps[site]`, the activations `[B, T, D]` of the last forward pass, in the model's dtype, before anything was
        replaced; `taps.codes`, the codes `[B, T, K]`; `taps.reconstructions[site]` and `taps.errors[site]`, `[B, T, D]`
        in the coder's dtype. A transcoder's are those of the site that it writes. All of it remains after the block.

    Raises:
        UserError: a coder does not know its sites; the model does not have a site, or has another width or device;
            two coders write one site; or a crosscoder is to replace activations, but has not read all its sites when
            the model reaches the first.

    Example:
        >>> import olmoscope, torch
        >>> from importlib.resources import files
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(files("olmoscope") / "model" / "tiny")
        >>> sae = olmoscope.load("olmoscope-demo/runs/layer_07/width_4096/topk_32_raw_untied")
        >>> tokens = torch.tensor([[11, 12, 13, 14]])
        >>> with olmoscope.attach(model, sae, mode="replace_keep_error") as taps:
        ...     model(tokens).logits[0, -1].max().backward()
        >>> taps["layers.7"].shape, taps.codes.values.shape, taps.codes.values.grad.shape
        (torch.Size([1, 4, 256]), torch.Size([1, 4, 32]), torch.Size([1, 4, 32]))
    """
    coders = [coder] if isinstance(coder, SparseCoder) else list(coder)
    _check(coders, mode)
    found = _find(model, coders, modules)
    taps = Taps(coders, found.widths, mode)
    written = set() if mode == "read" else {site for one in coders for site in one.writes}
    with contextlib.ExitStack() as hooks:
        for site, place in found.places.items():
            if site in written:
                hooks.enter_context(replaced(place, partial(_put, taps, site)))
            else:
                hooks.enter_context(watched(place, partial(_see, taps)))
        yield taps


def _see(taps: Taps, place: Place, x_BTD: Tensor) -> None:
    if not _LOOKING.get():
        taps.reach(place.site, x_BTD)


def _put(taps: Taps, site: Site, x_BTD: Tensor) -> Tensor:
    return x_BTD if _LOOKING.get() else taps.reach(site, x_BTD)


def _check(coders: Sequence[Any], mode: str) -> None:
    """Refuse coders that cannot be attached, or cannot be attached together.

    Raises:
        UserError: see `attach`.
    """
    if mode not in get_args(Mode):
        raise UserError(f"attach: mode is {mode!r}; it must be one of {', '.join(get_args(Mode))}")
    if not coders:
        raise UserError("attach: there is no coder to attach; give one, or a list of them")
    written: set[Site] = set()
    for coder in coders:
        if not isinstance(coder, SparseCoder):
            raise UserError(f"attach: a coder cannot be {type(coder).__name__}; load one with olmoscope.load(ADDRESS)")
        if not coder.reads or not coder.writes:
            raise UserError("attach: this coder does not know which site it reads; name it with "
                            "coder.at([\"layers.7\"]) or olmoscope.load(ADDRESS, site=...)")
        if twice := written & set(coder.writes):
            raise UserError(f"attach: two coders write {min(twice)}; attach them one after another, in two with blocks")
        written |= set(coder.writes)
        if mode != "read" and min(coder.writes) < max(coder.reads):
            raise UserError(f"attach: mode is {mode!r}, but this coder must read {max(coder.reads)} before it can "
                            f"write {min(coder.writes)}, which the model has already passed by then; use mode=\"read\"")


def _find(model: Any, coders: Sequence[SparseCoder], modules: Mapping[Role, str] | None) -> Sites:
    """Where the sites of coders are in a model.

    Raises:
        UserError: the model is not a causal LM, it has no such site, or the width or device differs.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise UserError(f"attach: the model is {type(model).__name__}; it must be a causal LM of transformers, or its "
                        "decoder")
    name, text = type(model).__name__, model.config.get_text_config()  # type: ignore[union-attr, operator]
    _, layers = find_layers(model, text.num_hidden_layers)
    sites = {site for coder in coders for site in (*coder.reads, *coder.writes)}
    for site in sites:
        if site.layer >= len(layers):
            raise UserError(f"attach: {name} has {len(layers)} layers, so there is no {site}: this coder is for "
                            "another model")
    with _looking(model):
        found = find_sites(model, layers, sites, name, text.hidden_size,
                           model.get_input_embeddings().num_embeddings, modules)  # type: ignore[operator]
    for coder in coders:
        for ends, width, verb in ((coder.reads, coder.d_in, "reads"), (coder.writes, coder.d_out, "writes")):
            there = sum(found.widths[site] for site in ends)
            if width != there:
                raise UserError(f"attach: this coder {verb} rows of width {width}, but {', '.join(map(str, ends))} of "
                                f"{name} has {there}: it is for another model or site")
            for site in ends:
                device = next(layers[max(site.layer, 0)].parameters()).device
                if device not in (coder.device, META):
                    raise UserError(f"attach: {site} of {name} is on {device}, but the coder is on {coder.device}: "
                                    f"move one of them, e.g. coder.to({str(device)!r})")
    return found


META = torch.device("meta")
"""The device of parameters that are elsewhere and loaded only when needed; it does not tell the rows' device."""


@contextlib.contextmanager
def _looking(model: nn.Module) -> Iterator[None]:
    """While the block runs, the model runs without dropout and without the coders that are attached to it."""
    training = [module for module in model.modules() if module.training]
    token = _LOOKING.set(True)
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
        _LOOKING.reset(token)
