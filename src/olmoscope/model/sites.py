"""Where the sites of a model are: which module outputs or reads each, found by running the model, and checked.

The attention and MLP modules of a layer are found by name (`ATTENTION`, `MLP`, or `model.modules` of the recipe). One
pass over a few tokens shows the rest: which module's output is added to the residual stream (a post-norm, if there is
one), and which module reads the stream in between. A site is offered only if its sum holds:

    layers.L.mid = input of layer L + layers.L.attn.out        layers.L = layers.L.mid + layers.L.mlp.out

If only the first holds (two modules side by side in place of the MLP), the sites of attention and `mid` are offered,
and those of the MLP are not. In a layer that adds attention and MLP at once (parallel attention: GPT-NeoX, Phi,
Cohere) there is no `mid`, and the output is the sum of the three. docs/sites.md has the table and the families.

Shapes: B sequences, T positions, D width of the site.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor, nn

from olmoscope.errors import UserError
from olmoscope.model.layer_pass import Branch, Role, Seen, see
from olmoscope.site import EMBED, Site

SCALES = ("residual_multiplier", "residual_scale")
"""Names of the factor by which a layer multiplies what it adds to the stream (Granite, MiniCPM3)."""
FAINT = 0.1
"""A sum proves nothing if rounding exceeds this share of what is added."""


@dataclass(frozen=True)
class Place:
    """Where a site is in a model."""

    site: Site
    kind: Literal["output", "input", "mid"]
    module: nn.Module
    """The site is this module's output, up to a factor, or its input; for `mid`, the module that reads it."""
    scale: float = 1.0
    """The site is this times the module's output: some architectures scale what they add."""
    layer: nn.Module | None = None
    """The decoder layer that the site is inside; None for a site that is not inside a layer."""
    adds: "Place | None" = None
    """For `mid`: `attn.out`, through which the stream is changed."""
    flat: bool = False
    """Whether the module's rows have the shape `[B * T, D]`."""
    overwritten: bool = False
    """Whether the model later changes the tensor in place, so that a copy must be kept."""


@dataclass(frozen=True)
class Sites:
    """The requested sites of a model."""

    places: Mapping[Site, Place]
    widths: Mapping[Site, int]
    """D of each."""
    parallel: bool
    """Whether a layer with one of the sites adds attention and MLP at once."""


def find_sites(module: nn.Module, layers: nn.ModuleList, wanted: Iterable[Site], name: str, d_model: int,
               vocabulary: int, named: Mapping[Role, str] | None = None) -> Sites:
    """Find sites in a model, and check what their names promise.

    Args:
        module: a decoder without its head, to run on token ids.
        layers: its decoder layers, up to the deepest one wanted.
        name: the model's name, for messages.
        vocabulary: number of rows of its embedding.
        named: paths of the modules `attention` and `mlp` in a layer, if their names are unusual.

    Raises:
        UserError: a layer has no such module, the sum of the layer does not hold, or the layer has no such site.
    """
    wanted = sorted(set(wanted))
    for site in wanted:
        if site.model:
            raise UserError(f"{site} is in another model, which the recipe calls {site.model}; {name} alone does not "
                            "have it")
    places: dict[Site, Place] = {}
    widths = {site: d_model for site in wanted}
    for site in wanted:
        if site == EMBED:
            places[site] = Place(site, "input", layers[0])
        elif site.is_layer_output:
            places[site] = Place(site, "output", layers[site.layer])
    inner = [site for site in wanted if site not in places]
    parallel = False
    if inner:
        seen = see(module, layers, sorted({site.layer for site in inner}), name, vocabulary, named or {})
        for number, one in seen.items():
            found = _places(one, number, name)
            parallel |= one.parallel
            for site in (site for site in inner if site.layer == number):
                if site not in found:
                    raise UserError(f"{name} has no {site}: {_why_not(one, site)}")
                places[site] = found[site]
                widths[site] = _width(one, found[site])
    return Sites(places, widths, parallel)


def inner_sites(module: nn.Module, layers: nn.ModuleList, numbers: Iterable[int], name: str, vocabulary: int,
                named: Mapping[Role, str] | None = None) -> Sites:
    """All sites inside some layers; for the arguments, see `find_sites`.

    Raises:
        UserError: a layer has none.
    """
    seen = see(module, layers, sorted(numbers), name, vocabulary, named or {})
    places = {site: (place, one) for number, one in seen.items() for site, place in _places(one, number, name).items()}
    return Sites({site: place for site, (place, _) in places.items()},
                 {site: _width(one, place) for site, (place, one) in places.items()},
                 any(one.parallel for one in seen.values()))


def _places(one: Seen, number: int, name: str) -> dict[Site, Place]:
    """The inner sites of a layer whose sums hold; also records in `one` whether the layer is parallel.

    Raises:
        UserError: no sum holds.
    """
    only = f"only the residual stream can be read, layers.{number}"
    ran = set(one.order)
    if one.x_BTD is None or one.y_BTD is None or not {one.attention.last, one.mlp.last} <= ran:
        raise UserError(f"{name}: layer {number} does not run {one.attention.name} and {one.mlp.name} as modules, once "
                        f"each, on rows of one vector per token; {only}")
    attn, mlp, mid = (Site(number, part) for part in ("attn.out", "mlp.out", "mid"))
    scale = next((float(value) for name in SCALES if isinstance(value := getattr(one.layer, name, None), int | float)),
                 1.0)
    places: dict[Site, Place] = {}
    outside = one.outside()
    for a in _may_add(one, one.attention):
        a_BTD = scale * one.gave[a]
        adds = _place(one, attn, "output", a, scale)
        reader = next((module for module in outside[_after(outside, one.attention) :]
                       if _adds_up(one.given[module], one.x_BTD, a_BTD)), None)
        if reader is not None:
            places |= {attn: adds, mid: _place(one, mid, "mid", reader, adds=adds)}
            m = next((m for m in _may_add(one, one.mlp)
                      if _adds_up(one.y_BTD, one.given[reader], scale * one.gave[m])), None)
        else:
            m = next((m for m in _may_add(one, one.mlp) if _reads_input(one, outside)
                      and _adds_up(one.y_BTD, one.x_BTD, a_BTD, scale * one.gave[m])), None)
            one.parallel = m is not None
            places |= {attn: adds} if one.parallel else {}
        if reader is not None and m is None and any(_same(one.gave[module], one.y_BTD) for module in outside):
            break  # the layer ends in a norm over the stream itself (post-norm as in BERT)
        if m is not None:
            places[mlp] = _place(one, mlp, "output", m, scale)
        if places:
            z = _projection(one, a)
            inputs = {"attn.in": one.attention.first, "attn.z": z, "mlp.in": one.mlp.first if mlp in places else None}
            return places | {site: _place(one, site, "input", module) for part, module in inputs.items()
                             if module in ran and module is not None for site in [Site(number, part)]}
    raise UserError(f"{name}: layer {number} is not the sum of its input, {one.attention.name} and {one.mlp.name}; "
                    f"{only}")


def _place(one: Seen, site: Site, kind: Literal["output", "input", "mid"], module: nn.Module, scale: float = 1.0,
           adds: Place | None = None) -> Place:
    what: Literal["given", "gave"] = "gave" if kind == "output" else "given"
    return Place(site, kind, module, scale, one.layer, adds, (module, what) in one.flat,
                 (module, what) in one.overwritten)


def _width(one: Seen, place: Place) -> int:
    return (one.given if place.kind != "output" else one.gave)[place.module].shape[-1]


def _why_not(one: Seen, site: Site) -> str:
    """Why a layer that has other inner sites lacks one."""
    if site.part == "mid":
        return ("its layers add attention and MLP to the residual stream at once, so there is nothing between them")
    if site.part == "attn.z":
        return f"no matrix in {one.attention.name} of layer {site.layer} gives what {one.attention.name} gives"
    if site.part.startswith("mlp"):
        return (f"{one.mlp.name} of layer {site.layer} does not give all that the layer adds after attention, so "
                f"{Site(site.layer, 'mid')} + {Site(site.layer, 'mlp.out')} would not be layers.{site.layer}")
    return f"{one.attention.name} of layer {site.layer} does not read rows of one vector per token"


def _may_add(one: Seen, role: Branch) -> list[nn.Module]:
    """The modules whose output may be what a role adds to the stream, most likely first: the chain of modules that each
    read the output of the one before (such as a post-norm), from its end back to the role itself; then the last matrix
    inside the role, whose output the role may add to the stream by itself (BLOOM)."""
    found = [role.last]
    outside = one.outside()
    ours = {one.attention.first, one.attention.last, one.mlp.first, one.mlp.last}
    while True:
        after = outside[outside.index(found[-1]) + 1 :]
        following = next((other for other in after if other not in ours
                          and _same(one.given[other], one.gave[found[-1]])), None)
        if following is None:
            return [module for module in [*reversed(found), *_matrices(one, role)[-1:]]
                    if one.x_BTD is not None and one.gave[module].shape == one.x_BTD.shape]
        found.append(following)


def _after(outside: list[nn.Module], role: Branch) -> int:
    return outside.index(role.last) + 1


def _matrices(one: Seen, role: Branch) -> list[nn.Module]:
    """The matrices inside a role, in the order in which they ran."""
    inside = role.modules() - {role.last}
    return [module for module in one.order if module in inside and not list(module.children())
            and any(parameter.dim() == 2 for parameter in module.parameters())]


def _projection(one: Seen, adds: nn.Module) -> nn.Module | None:
    """The matrix inside attention whose output is attention's output, or what attention adds."""
    return next((module for module in reversed(_matrices(one, one.attention))
                 if module is adds or _same(one.gave[module], one.gave[one.attention.last])), None)


def _reads_input(one: Seen, outside: list[nn.Module]) -> bool:
    """Whether the MLP reads the layer's own input, directly or through norms, so what attention adds does not reach it.
    """
    if one.mlp.first not in one.given or one.x_BTD is None:
        return False
    rows = one.given[one.mlp.first]
    for module in reversed(outside[: outside.index(one.mlp.first)]):
        if _same(rows, one.x_BTD):
            break
        if module not in (one.attention.first, one.attention.last) and _same(rows, one.gave[module]):
            rows = one.given[module]
    return _same(rows, one.x_BTD)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _adds_up(sum_BTD: Tensor, x_BTD: Tensor, *parts: Tensor) -> bool:
    """Whether sum = x + parts: bit for bit in some order, or in every row up to the rounding of the sum, if that is at
    most a tenth (`FAINT`) of each part. A part that is zero, or below the rounding, would prove nothing."""
    if any(part_BTD.shape != sum_BTD.shape for part_BTD in (x_BTD, *parts)):
        return False
    without = [sum([x_BTD, *parts[:left_out], *parts[left_out + 1 :]], torch.zeros_like(x_BTD))
               for left_out in range(len(parts))]
    if any(torch.equal(sum_BTD, less_BTD) for less_BTD in without):
        return False
    if any(torch.equal(sum_BTD, sum(order[1:], order[0])) for order in permutations((x_BTD, *parts))):
        return True
    s, x, *p = (tensor.double() for tensor in (sum_BTD, x_BTD, *parts))
    off_BT = (s - sum(p, x)).norm(dim=-1)
    sizes = [tensor.norm(dim=-1) for tensor in (s, x, *p)]
    allowed_BT = 2 * torch.finfo(sum_BTD.dtype).eps * sum(sizes, torch.zeros_like(off_BT))
    return bool((off_BT <= allowed_BT).all()) and all(bool(off_BT.norm() <= FAINT * part.norm()) for part in p)
