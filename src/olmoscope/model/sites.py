"""Where the sites of a model are: which module gives or is given each, found by running it, and checked.

The attention and MLP modules of a layer are found by name (`ATTENTION`, `MLP`, or `model.modules` of the recipe). What
else matters is seen in one pass over a few tokens: which module's output is added to the residual stream (a post-norm,
where there is one), and which module reads the stream in between. A site is given only where the
layer's own sum holds:

    output of layer L  =  layers.L.mid + layers.L.mlp.out        layers.L.mid  =  input of layer L + layers.L.attn.out

In a layer that adds attention and MLP at once (parallel attention: GPT-NeoX, Phi, Cohere) there is no `mid`, and the
output is the sum of the three. Shapes: B sequences, T positions, D width of the site.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from olmoscope.errors import UserError
from olmoscope.seeds import generator
from olmoscope.site import EMBED, Site

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mamba", "mixer", "temporal_block")
"""What transformers' decoder layers call their attention, or what stands in its place; a layer has one of them."""
MLP = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "mlp_block")
"""What they call their MLP, or the mixture of experts in its place."""
Role = Literal["attention", "mlp"]
ROLES: dict[Role, tuple[str, ...]] = {"attention": ATTENTION, "mlp": MLP}
TOKENS = 16
"""Length of the sequence that is tried."""


@dataclass(frozen=True)
class Place:
    """Where a site is in a model."""

    site: Site
    kind: Literal["output", "input", "mid"]
    module: nn.Module
    """Whose output the site is, to a factor, or whose input; of `mid`, the module that reads it."""
    scale: float = 1.0
    """The site is this times the module's output: some architectures scale what they add."""
    layer: nn.Module | None = None
    """Of `mid`: the decoder layer, whose input is part of it."""
    adds: "Place | None" = None
    """Of `mid`: `attn.out`, by which the stream is changed."""


@dataclass(frozen=True)
class Sites:
    """The sites of one model, as far as they were asked for."""

    places: Mapping[Site, Place]
    widths: Mapping[Site, int]
    """D of each."""
    parallel: bool
    """Whether some layer of them adds attention and MLP at once."""


def find_sites(module: nn.Module, layers: nn.ModuleList, wanted: Iterable[Site], name: str, d_model: int,
               vocabulary: int, named: Mapping[Role, str] | None = None) -> Sites:
    """Find sites in a model, and check what their names promise.

    Args:
        module: a decoder without its head; only what reads token ids is needed of it.
        layers: its decoder layers, up to the deepest that is wanted.
        name: of the model, for messages.
        vocabulary: rows of its embedding.
        named: paths of modules in a layer, by `attention` and `mlp`, where the names are unusual.

    Raises:
        UserError: a layer has no such module, the sum of the layer does not hold, or the layer has no such site.
    """
    wanted = sorted(set(wanted))
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
        seen = _see(module, layers, sorted({site.layer for site in inner}), name, vocabulary, named or {})
        scale = float(getattr(module.config.get_text_config(), "residual_multiplier", 1.0))  # type: ignore[union-attr, operator]
        for number, layer in seen.items():
            found, alone = _places(layer, number, name, scale)
            parallel |= alone
            for site in (site for site in inner if site.layer == number):
                if site not in found:
                    raise UserError(f"{name} has no {site}: " + (
                        "its layers add attention and MLP to the residual stream at once, so there is nothing between "
                        "them" if site.part == "mid" else f"{layer.attention_name} and {layer.mlp_name} of layer "
                        f"{number} do not work on rows of one vector a token there"))
                places[site] = found[site]
                widths[site] = layer.width(found[site])
    return Sites(places, widths, parallel)


@dataclass
class _Seen:
    """A layer, and what went in and out of its modules in one pass, `[B, T, D]` float tensors of the model's dtype."""

    layer: nn.Module
    attention: nn.Module
    attention_name: str
    mlp: nn.Module
    mlp_name: str
    order: list[nn.Module]
    """Modules below the layer in the order in which they ended."""
    given: dict[nn.Module, Tensor]
    gave: dict[nn.Module, Tensor]
    x_BTD: Tensor | None = None
    y_BTD: Tensor | None = None

    def width(self, place: Place) -> int:
        return (self.given if place.kind != "output" else self.gave)[place.module].shape[-1]


@torch.no_grad()
def _see(module: nn.Module, layers: nn.ModuleList, numbers: list[int], name: str, vocabulary: int,
         named: Mapping[Role, str]) -> dict[int, _Seen]:
    """Run the model once, and keep what went in and out of the modules of some layers."""
    seen = {number: _modules(layers[number], number, name, named) for number in numbers}
    handles = []

    def keep(one: _Seen, part: nn.Module) -> None:
        def hook(module: nn.Module, arguments: Any, settings: Any, output: Any) -> None:
            given, gave = first_tensor(arguments, settings), first_tensor(
                output if isinstance(output, tuple | list) else (output,), {})
            if given is None or gave is None:
                return
            if module is one.layer:
                one.y_BTD = gave
                return
            one.order.append(module)
            one.given[module], one.gave[module] = given, gave

        handles.append(part.register_forward_hook(hook, with_kwargs=True))

    def keep_input(one: _Seen) -> None:
        def hook(module: nn.Module, arguments: Any, settings: Any) -> None:
            one.x_BTD = first_tensor(arguments, settings)

        handles.append(one.layer.register_forward_pre_hook(hook, with_kwargs=True))

    for one in seen.values():
        keep_input(one)
        for part in one.layer.modules():
            keep(one, part)
    ids = generator(2, "tokens of a probe").integers(min(10, vocabulary // 2), max(2, vocabulary // 2), (1, TOKENS))
    try:
        module(input_ids=torch.from_numpy(ids).to(next(module.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _modules(layer: nn.Module, number: int, name: str, named: Mapping[Role, str]) -> _Seen:
    paths: dict[Role, str] = {}
    for role, known in ROLES.items():
        if role in named:
            if not _has(layer, named[role]):
                raise UserError(f"model.modules.{role}: layer {number} of {name} has no module {named[role]!r}; it has "
                                f"{', '.join(child for child, _ in layer.named_children())}")
            paths[role] = named[role]
            continue
        here = [child for child in known if _has(layer, child)]
        if len(here) != 1:
            raise UserError(f"cannot tell which module of layer {number} of {name} is its {role} (its modules: "
                            f"{', '.join(child for child, _ in layer.named_children())}); name it with "
                            f"--set model.modules.{role}=NAME, or take the residual stream, layers.{number}")
        paths[role] = here[0]
    return _Seen(layer, layer.get_submodule(paths["attention"]), paths["attention"],
                 layer.get_submodule(paths["mlp"]), paths["mlp"], [], {}, {})


def _has(layer: nn.Module, path: str) -> bool:
    try:
        return isinstance(layer.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def _places(one: _Seen, number: int, name: str, scale: float) -> tuple[dict[Site, Place], bool]:
    """The inner sites of a layer, and whether it is parallel.

    Args:
        scale: by which the architecture multiplies what it adds to the residual stream.

    Raises:
        UserError: the sum of the layer does not hold.
    """
    if one.x_BTD is None or one.y_BTD is None or one.attention not in one.gave or one.mlp not in one.gave:
        raise UserError(f"{name}: layer {number} does not run {one.attention_name} and {one.mlp_name} as modules; only "
                        f"the residual stream can be read, layers.{number}")
    attention, mlp = _added(one, one.attention), _added(one, one.mlp)
    places = {}
    for part, module in (("attn.in", one.attention), ("mlp.in", one.mlp), ("attn.z", _projection(one))):
        if module is not None and one.given[module].shape[:-1] == one.x_BTD.shape[:-1]:
            places[Site(number, part)] = Place(Site(number, part), "input", module)
    a_BTD, m_BTD = scale * one.gave[attention], scale * one.gave[mlp]
    adds = Place(Site(number, "attn.out"), "output", attention, scale)
    places |= {adds.site: adds, Site(number, "mlp.out"): Place(Site(number, "mlp.out"), "output", mlp, scale)}
    children = set(one.layer.children())
    for reader in one.order[one.order.index(attention) + 1 :]:
        mid_BTD = one.given[reader]
        if reader in children and _adds_up(mid_BTD, one.x_BTD, a_BTD) and _adds_up(one.y_BTD, mid_BTD, m_BTD):
            mid = Place(Site(number, "mid"), "mid", reader, layer=one.layer, adds=adds)
            return places | {mid.site: mid}, False
    if _adds_up(one.y_BTD, one.x_BTD, a_BTD + m_BTD):
        return places, True
    raise UserError(f"{name}: layer {number} is not the sum of its input, {one.attention_name} and {one.mlp_name}; "
                    f"only the residual stream can be read, layers.{number}")


def _added(one: _Seen, module: nn.Module) -> nn.Module:
    """The module whose output is added to the residual stream: the given one, or the last of those after it in the
    layer that are given its output as it is (a post-norm)."""
    while True:
        after = one.order[one.order.index(module) + 1 :]
        following = next((other for other in after if other in set(one.layer.children()) and other is not one.mlp
                          and other is not one.attention and _same(one.given[other], one.gave[module])), None)
        if following is None:
            return module
        module = following


def _projection(one: _Seen) -> nn.Module | None:
    """The matrix in the attention whose output is the attention's output."""
    inside = [module for module in one.order if module in set(one.attention.modules()) and module is not one.attention
              and not list(module.children()) and any(parameter.dim() == 2 for parameter in module.parameters())]
    return next((module for module in reversed(inside) if _same(one.gave[module], one.gave[one.attention])), None)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _adds_up(sum_BTD: Tensor, x_BTD: Tensor, part_BTD: Tensor) -> bool:
    """Whether sum = x + part in every row, to the rounding of the sum."""
    if not sum_BTD.shape == x_BTD.shape == part_BTD.shape:
        return False
    s, x, p = (tensor.double() for tensor in (sum_BTD, x_BTD, part_BTD))
    allowed_BT = torch.finfo(sum_BTD.dtype).eps * s.norm(dim=-1) + 1e-3 * p.norm(dim=-1)
    return bool(((s - x - p).norm(dim=-1) <= allowed_BT).all())


def first_tensor(arguments: Any, settings: Mapping[str, Any]) -> Tensor | None:
    """The rows among a module's arguments (or outputs): the first positional one, or `hidden_states`."""
    value = arguments[0] if arguments else settings.get("hidden_states", settings.get("x"))
    return value if isinstance(value, Tensor) and value.is_floating_point() else None
