"""One observed pass of a model: what goes into and out of the modules of some layers, and which of them, by name, are
attention and MLP. sites.py draws its conclusions from it.

Shapes: B sequences, T positions, D width of a module's rows.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from olmoscope.errors import UserError
from olmoscope.model.outputs import first_of
from olmoscope.seeds import generator

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mamba", "mixer", "temporal_block",
             "conv", "multi_head_attention", "norm_attn_norm.attn")
"""What transformers' decoder layers call their attention, or the module in its place; a layer has one of them."""
MLP = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "mlp_block", "fc1,fc2")
"""What they call their MLP, or the mixture of experts in its place. If the MLP is not a single module, this names its
first and its last, separated by a comma."""
Role = Literal["attention", "mlp"]
ROLES: dict[Role, tuple[str, ...]] = {"attention": ATTENTION, "mlp": MLP}
SEQUENCES, TOKENS = 2, 12
"""How many sequences are tried, and their length in tokens."""


@dataclass(frozen=True)
class Branch:
    """The attention or the MLP of a layer: one module, or the first and the last of several."""

    name: str
    first: nn.Module
    last: nn.Module

    def modules(self) -> set[nn.Module]:
        return {*self.first.modules(), *self.last.modules()}


@dataclass
class Seen:
    """A layer, and what went into and out of its modules in one pass, `[B, T, D]` in the model's dtype."""

    layer: nn.Module
    attention: Branch
    mlp: Branch
    order: list[nn.Module] = field(default_factory=list)
    """Modules inside the layer that had rows and ran once, in the order in which they finished."""
    given: dict[nn.Module, Tensor] = field(default_factory=dict)
    gave: dict[nn.Module, Tensor] = field(default_factory=dict)
    flat: set[tuple[nn.Module, str]] = field(default_factory=set)
    """(module, `given` or `gave`) for rows that had the shape `[B * T, D]`."""
    kept: list[tuple[nn.Module, str, Tensor, int]] = field(default_factory=list)
    """The model's own tensors, and their versions when they were seen."""
    overwritten: set[tuple[nn.Module, str]] = field(default_factory=set)
    """(module, `given` or `gave`) for tensors that the model changed in place afterwards."""
    x_BTD: Tensor | None = None
    y_BTD: Tensor | None = None
    parallel: bool = False

    def keep(self, module: nn.Module, what: Literal["given", "gave"], rows: Tensor) -> bool:
        """Record a module's rows; False if the tensor does not hold rows."""
        assert self.x_BTD is not None  # the layer began before its modules
        shape = self.x_BTD.shape[:-1]
        flat = rows.dim() == 2 and len(rows) == shape.numel()
        if not flat and (rows.dim() != 3 or rows.shape[:-1] != shape):
            return False
        self.kept.append((module, what, rows, rows._version))
        if flat:
            self.flat.add((module, what))
        # a copy: some layers add to a tensor in place
        (self.given if what == "given" else self.gave)[module] = rows.reshape(*shape, -1).clone()
        return True

    def finish(self) -> None:
        """Draw the conclusions at the end of the pass."""
        runs = Counter(self.order)  # a norm or a dropout that runs twice cannot be a place
        self.order = [module for module in self.order if runs[module] == 1]
        self.overwritten = {(module, what) for module, what, rows, version in self.kept if rows._version != version}
        self.kept.clear()

    def outside(self) -> list[nn.Module]:
        """The modules of `order` that are not inside attention or MLP; those two themselves are included."""
        inside = (self.attention.modules() | self.mlp.modules()) - {
            self.attention.first, self.attention.last, self.mlp.first, self.mlp.last}
        return [module for module in self.order if module not in inside]


@torch.no_grad()
def see(module: nn.Module, layers: nn.ModuleList, numbers: list[int], name: str, vocabulary: int,
         named: Mapping[Role, str]) -> dict[int, Seen]:
    """Run the model once, and keep what went into and out of the modules of some layers."""
    seen = {number: Seen(layers[number], *_branches(layers[number], number, name, named)) for number in numbers}
    handles = []

    def watch(one: Seen) -> None:
        def enter(module: nn.Module, arguments: Any, settings: Any) -> None:
            x_BTD = first_tensor(arguments, settings)
            one.x_BTD = None if x_BTD is None else x_BTD.clone()

        def leave(module: nn.Module, arguments: Any, output: Any) -> None:
            y_BTD = first_of(output)
            one.y_BTD = y_BTD.clone() if isinstance(y_BTD, Tensor) else None

        def part(module: nn.Module, arguments: Any, settings: Any, output: Any) -> None:
            given, gave = first_tensor(arguments, settings), first_of(output)
            if (given is not None and isinstance(gave, Tensor) and one.x_BTD is not None
                    and one.keep(module, "given", given) and one.keep(module, "gave", gave)):
                one.order.append(module)

        handles.append(one.layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(one.layer.register_forward_hook(leave))
        for below in one.layer.modules():
            if below is not one.layer:
                handles.append(below.register_forward_hook(part, with_kwargs=True))

    for one in seen.values():
        watch(one)
    ids = generator(2, "tokens of a probe").integers(min(10, vocabulary // 2), max(2, vocabulary // 2),
                                                     (SEQUENCES, TOKENS))
    try:
        module(input_ids=torch.from_numpy(ids).to(next(module.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for one in seen.values():
        one.finish()
    return seen


def _branches(layer: nn.Module, number: int, name: str, named: Mapping[Role, str]) -> tuple[Branch, Branch]:
    """The attention and the MLP of a layer.

    Raises:
        UserError: no module, or several, have a known name; or the module that the recipe names does not exist.
    """
    has = ", ".join(child for child, _ in layer.named_children())

    def one(role: Role) -> Branch:
        paths = named.get(role)
        if paths is None:
            here = [known for known in ROLES[role] if _has(layer, known)]
            if len(here) != 1:
                raise UserError(f"cannot tell which module of layer {number} of {name} is its {role} (its modules: "
                                f"{has}); name it with --set model.modules.{role}=NAME, or use the residual stream, "
                                f"layers.{number}")
            paths, = here
        elif not _has(layer, paths):
            raise UserError(f"model.modules.{role}: layer {number} of {name} has no module {paths!r}; it has {has}")
        first, *_, last = [layer.get_submodule(path) for path in paths.split(",")] * 2
        return Branch(paths, first, last)

    return one("attention"), one("mlp")


def _has(layer: nn.Module, paths: str) -> bool:
    known = {path for path, _ in layer.named_modules() if path}
    return all(path in known for path in paths.split(","))


def first_tensor(arguments: Any, settings: Mapping[str, Any]) -> Tensor | None:
    """The rows among a module's arguments: the first positional one, or one of `ROWS`."""
    value = arguments[0] if arguments else next((settings[key] for key in ROWS if key in settings), None)
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


ROWS = ("hidden_states", "x", "input", "hidden_state")
"""What modules call their rows if they are passed by name."""
