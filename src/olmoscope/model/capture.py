"""Read and replace the vectors at the sites of a model, with forward hooks.

We use hooks, not `output_hidden_states`: transformers replaces the last hidden state with the one after the final norm,
so `hidden_states[L + 1]` is the output of layer L for every layer but the last.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from olmoscope.model.layer_pass import ROWS, first_tensor
from olmoscope.model.outputs import first_of, hidden_of, with_hidden
from olmoscope.model.sites import Place
from olmoscope.site import Site


class _Deepest(BaseException):
    """Ends a forward pass after the last site wanted. It is not an error, so no error handler may catch it."""


@contextlib.contextmanager
def captured(places: Sequence[Place], *, stop: bool = False) -> Iterator[dict[Site, Tensor]]:
    """Collect the vectors at some sites while the block runs.

    Args:
        stop: end a forward pass once it has reached all sites (with `_Deepest`, which the caller catches).

    Yields:
        A mapping from each site to its vectors `[batch, T, D]`, which each forward pass fills (and overwrites).
    """
    found: dict[Site, Tensor] = {}

    def keep(place: Place, x_BTD: Tensor) -> None:
        found[place.site] = x_BTD
        if stop and len(found) == len(places):
            raise _Deepest

    with contextlib.ExitStack() as hooks:
        for place in places:
            hooks.enter_context(watched(place, keep))
        yield found


@contextlib.contextmanager
def watched(place: Place, keep: Callable[[Place, Tensor], None]) -> Iterator[None]:
    """Call `keep` with the vectors at a site whenever a forward pass reaches it."""
    with contextlib.ExitStack() as hooks:
        rows = _Rows(place, hooks)

        def output(module: nn.Module, arguments: Any, output: Any) -> None:
            x_BTD = rows.of_output(output)
            keep(place, x_BTD if place.scale == 1 else place.scale * x_BTD)

        def given(module: nn.Module, arguments: Any, settings: Any) -> None:
            keep(place, rows.of_input(arguments, settings))

        hooks.callback((place.module.register_forward_hook(output) if place.kind == "output"
                        else place.module.register_forward_pre_hook(given, with_kwargs=True)).remove)
        yield


class _Rows:
    """Reads the rows of a place as `[B, T, D]`, and puts new rows there in the module's own shape."""

    def __init__(self, place: Place, hooks: contextlib.ExitStack) -> None:
        """
        Args:
            hooks: removes the hooks that this adds.
        """
        self.place = place
        self.shape: tuple[int, ...] = ()
        if place.flat:  # only the layer's input shows how many rows make a sequence
            assert place.layer is not None

            def enter(module: nn.Module, arguments: Any, settings: Any) -> None:
                x_BTD = first_tensor(arguments, settings)
                assert x_BTD is not None  # seen when the site was found
                self.shape = x_BTD.shape[:-1]

            hooks.callback(place.layer.register_forward_pre_hook(enter, with_kwargs=True).remove)

    def of_output(self, output: Any) -> Tensor:
        return self._read(first_of(output)) if self.place.flat else self._read(hidden_of(output))

    def of_input(self, arguments: Any, settings: Any) -> Tensor:
        x = first_tensor(arguments, settings)
        assert x is not None  # seen when the site was found
        return self._read(x)

    def put(self, x_BTD: Tensor) -> Tensor:
        """Rows in the shape that the module uses."""
        x = x_BTD.flatten(0, -2) if self.place.flat else x_BTD
        return x.clone() if self.place.overwritten else x  # the model must not change the caller's rows

    def _read(self, x: Tensor) -> Tensor:
        x_BTD = x.view(*self.shape, -1) if self.place.flat else x
        return x_BTD.clone() if self.place.overwritten else x_BTD


@contextlib.contextmanager
def replaced(place: Place, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, the model continues with other vectors at a site.

    Replacing `mid` changes what attention adds to the residual stream, so that the stream itself changes, and gives the
    module that reads it exactly the new vectors.

    Args:
        change: takes the vectors there, `[batch, T, D]`, and returns their replacement; equal vectors change nothing.
    """
    with contextlib.ExitStack() as hooks:
        for handle in _hooks(place, change, hooks):
            hooks.callback(handle.remove)
        yield


def _hooks(place: Place, change: Callable[[Tensor], Tensor], hooks: contextlib.ExitStack) -> list[Any]:
    rows = _Rows(place, hooks)

    def output(module: nn.Module, arguments: Any, output: Any) -> Any:
        x_BTD = rows.of_output(output)
        if place.scale == 1:
            return with_hidden(output, rows.put(change(x_BTD)))
        scaled_BTD = place.scale * x_BTD
        changed_BTD = change(scaled_BTD)
        # unchanged entries stay the same to the last bit, whatever the division rounds
        return with_hidden(output, rows.put(torch.where(changed_BTD == scaled_BTD, x_BTD, changed_BTD / place.scale)))

    def given(module: nn.Module, arguments: Any, settings: Any) -> Any:
        return with_first_tensor(arguments, settings, rows.put(change(rows.of_input(arguments, settings))))

    if place.kind == "output":
        return [place.module.register_forward_hook(output)]
    if place.kind == "input":
        return [place.module.register_forward_pre_hook(given, with_kwargs=True)]
    return _mid_hooks(place, change, rows, hooks)


def _mid_hooks(place: Place, change: Callable[[Tensor], Tensor], rows: _Rows,
               hooks: contextlib.ExitStack) -> list[Any]:
    assert place.layer is not None and place.adds is not None
    adds, scale = _Rows(place.adds, hooks), place.adds.scale
    seen: dict[str, Tensor] = {}

    def enter(module: nn.Module, arguments: Any, settings: Any) -> None:
        x_BTD = first_tensor(arguments, settings)
        assert x_BTD is not None  # seen when the site was found
        seen["x"] = x_BTD

    def add(module: nn.Module, arguments: Any, output: Any) -> Any:
        a_BTD = adds.of_output(output)
        mid_BTD = seen["x"] + (a_BTD if scale == 1 else scale * a_BTD)
        seen["mid"] = change(mid_BTD)
        return with_hidden(output, adds.put(a_BTD + (seen["mid"] - mid_BTD) / scale))

    def read(module: nn.Module, arguments: Any, settings: Any) -> Any:
        return with_first_tensor(arguments, settings, rows.put(seen["mid"]))

    return [place.layer.register_forward_pre_hook(enter, with_kwargs=True),
            place.adds.module.register_forward_hook(add),
            place.module.register_forward_pre_hook(read, with_kwargs=True)]


def with_first_tensor(arguments: Any, settings: Any, x: Tensor) -> tuple[Any, Any]:
    """A module's arguments with other rows in them; see `first_tensor`."""
    if arguments:
        return (x, *arguments[1:]), settings
    return arguments, {**settings, next(key for key in ROWS if key in settings): x}


def given_positions(positions_BT: Tensor | None) -> dict[str, Tensor]:
    """Position ids as an argument of a forward pass, if there are any: not every architecture takes them."""
    return {} if positions_BT is None else {"position_ids": positions_BT}


@torch.no_grad()
def read_sites(module: nn.Module, places: Sequence[Place], token_ids_BT: Tensor,
               positions_BT: Tensor | None = None) -> dict[Site, Tensor]:
    """The vectors at some sites, from one pass that ends at the last of them.

    Rows may be padded at their end, with any token: attention is causal, so nothing before sees the padding, and no
    mask is needed (a mask would rule out the fast attention kernels).

    Args:
        module: a decoder, on the device of the tokens.
        positions_BT: position ids; where they restart, documents are kept apart. transformers does so only
            without a mask and without a cache, which is how it is called here. None: documents share attention.

    Returns:
        For each site, its vectors `[batch, T, D]`, in the model's dtype.
    """
    with captured(places, stop=True) as found, contextlib.suppress(_Deepest):
        module(input_ids=token_ids_BT, use_cache=False, **given_positions(positions_BT))
    return found
