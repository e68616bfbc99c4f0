"""The whole language model, continued from any site, to measure what a reconstruction does to it.

Usually a layer's output is all that the layers above see. Then only those above run: the layers below compute nothing,
and the layer itself outputs the replacement. If that does not give the model's own result (because layers pass on
something else too), the whole model runs and the layer's output is replaced during the pass. A site inside a layer is
always replaced during the pass, and the layers below are skipped if that works. The LM head runs on a few tokens at a
time, since the logits of all would not fit. Shapes: B sequences, T positions, D d_model, C tokens of a chunk, V tokens
of the vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from olmoscope.errors import UserError
from olmoscope.model.capture import captured, given_positions, replaced
from olmoscope.model.config import check_config, read_config
from olmoscope.model.dtype import settle_model
from olmoscope.model.layer_pass import Role
from olmoscope.model.layers import find_layers
from olmoscope.model.outputs import with_hidden, without_tensors
from olmoscope.model.positions import most_positions
from olmoscope.model.probe import OTHER_SHAPE, REFUSALS, Probe, difference, does_not_run, probe
from olmoscope.model.sites import Place, Sites, find_sites
from olmoscope.model.weights import read_weights
from olmoscope.model_source import pinned, revision_of
from olmoscope.recipe.schema import Model
from olmoscope.seeds import generator
from olmoscope.site import Site, deepest

TRIED_TOKENS = 12


@dataclass(frozen=True)
class Reading:
    """One pass of a model over some tokens."""

    token_ids_BT: Tensor
    positions_BT: Tensor | None
    hidden_BTD: Tensor
    """The last hidden state, in the model's dtype, like all others."""
    at: dict[Site, Tensor]
    """The vectors at the sites wanted, `[B, T, D]`."""
    below: dict[Site, Tensor]
    """The residual stream below each site that is inside a layer."""


@dataclass(frozen=True)
class CausalLM:
    """A causal LM with all its layers and its head."""

    module: nn.Module
    body: nn.Module
    """The model without its head."""
    layers: nn.ModuleList
    layers_path: str
    """Path of the layers in the module, e.g. `model.layers`."""
    name: str
    revision: str
    d_model: int
    vocabulary: int
    body_output: type[Any]
    """The type that the body returns, from transformers."""
    forms: list[Any]
    """Each layer's output, without its tensors."""
    skips: bool
    """Whether the layers below a replaced one need not run."""
    probe: Probe
    modules: Mapping[Role, str] = field(default_factory=dict)
    """The recipe's names for modules in a layer (`model.modules`)."""

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch.no_grad()
    def read(self, token_ids_BT: Tensor, positions_BT: Tensor | None, places: Sequence[Place]) -> Reading:
        """Run the model up to its head.

        Padding at the end of rows needs no mask: attention is causal. For `positions_BT` see `read_sites`.

        Args:
            places: the sites wanted, from `find`.
        """
        below = [self._below(place.site) for place in places]
        with captured(places) as found, captured([one for one in below if one is not None]) as lower:
            hidden_BTD = self._run(token_ids_BT, positions_BT)
        return Reading(token_ids_BT, positions_BT, hidden_BTD, dict(found), dict(lower))

    def go_on(self, place: Place, x_BTD: Tensor, reading: Reading) -> Tensor:
        """The last hidden state with `x_BTD` at a site; the original vectors give exactly `reading`'s. Gradients reach
        `x_BTD` if it requires them.

        Args:
            reading: a pass over the same tokens, with this place among those read.
        """
        layer = place.site.layer
        with contextlib.ExitStack() as stack:
            if self.skips and place.site.is_layer_output:
                stack.enter_context(_replaced_from_below(self.layers, layer, x_BTD, self.forms))
            else:
                if (below := self._below(place.site)) is not None:
                    stack.enter_context(_replaced_from_below(self.layers, layer - 1, reading.below[below.site],
                                                             self.forms))
                stack.enter_context(replaced(place, lambda _: x_BTD))
            return self._run(reading.token_ids_BT, reading.positions_BT)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Logits `[C, V]` of last hidden states, by the model's own forward, which may cap or scale them. Gradients
        reach the states if they require them."""
        return _logits(self.module, self.body, self.body_output, hidden_CD)

    def find(self, sites: Iterable[Site]) -> Sites:
        """Where sites are in this model.

        Raises:
            UserError: the model has no such site.
        """
        return find_sites(self.body, self.layers, sites, self.name, self.d_model, self.vocabulary, self.modules)

    def _below(self, site: Site) -> Place | None:
        """The output of the layer below a site inside a layer; None if the model cannot be continued from there."""
        if not self.skips or site.is_layer_output or site.layer < 1:
            return None
        return Place(Site(site.layer - 1), "output", self.layers[site.layer - 1])

    def _run(self, token_ids_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
        hidden: Tensor = self.body(input_ids=token_ids_BT, use_cache=False, **given_positions(positions_BT))[0]
        return hidden


def load_causal_lm(model: Model, device: torch.device, sites: Sequence[Site] = ()) -> CausalLM:
    """Load a whole causal LM for inference, and test what is assumed of it.

    Args:
        sites: the sites that it must have.

    Raises:
        UserError: the model or some of its weights cannot be found, there is no such layer or site, the width or depth
            is not the recipe's, its layers' outputs cannot be replaced, or its head cannot be run by itself.
    """
    model = pinned(settle_model(model, device))
    config = read_config(model)
    check_config(config, model, deepest(sites))
    text = config.get_text_config()
    module = read_weights(model, config).to(device).requires_grad_(False)
    path, layers = find_layers(module, text.num_hidden_layers)
    tried = try_causal_lm(module, path, layers, model.name, revision_of(model), text.hidden_size,
                          module.config.get_text_config().vocab_size)
    loaded = replace(tried, modules=model.modules)
    loaded.find(sites)
    return loaded


@torch.no_grad()
def try_causal_lm(module: Any, path: str, layers: nn.ModuleList, name: str, revision: str, d_model: int,
                  vocabulary: int) -> CausalLM:
    """Find out how to replace the outputs of a model's layers and how to run its head by itself.

    The body is the module that can be replaced by its own output without a change in the model's logits: the module
    that transformers calls the base model, or the decoder in it, or the one that holds the layers.

    Args:
        path: the path of the layers in the model.

    Raises:
        UserError: one of the two does not work.
    """
    most = module.get_input_embeddings().num_embeddings
    device = next(module.parameters()).device
    ids_1T = torch.from_numpy(generator(1, "tokens of a probe").integers(min(10, most // 2), max(2, most // 2),
                                                                         (1, TRIED_TOKENS))).to(device)
    dtype = next(module.parameters()).dtype
    try:
        wanted_TV = module(input_ids=ids_1T, use_cache=False).logits[0].float()
    except REFUSALS as error:
        raise does_not_run(name, dtype, error) from error
    tolerance = OTHER_SHAPE[dtype]
    bodies = (module.base_model, module.get_decoder(), module.get_submodule(path.rpartition(".")[0]))
    for body in (body for body in dict.fromkeys(bodies) if body is not module):
        with _forms_of(layers) as forms:
            output = body(input_ids=ids_1T, use_cache=False)
        if len(forms) < len(layers):
            raise UserError(f"{name}: only {len(forms)} of its {len(layers)} decoder layers run; olmoscope cannot read "
                            "this architecture")
        if _difference_of(partial(_logits, module, body, type(output)), output[0][0], wanted_TV) <= tolerance:
            probed = probe(body, layers, name, d_model, most, most_positions(module.config))
            return _with_splice(CausalLM(module, body, layers, path, name, revision, d_model, vocabulary, type(output),
                                         [forms[number] for number in range(len(layers))], True, probed),
                                ids_1T, tolerance)
    raise UserError(f"{name}: its LM head cannot run by itself ({type(module).__name__}), so olmoscope cannot measure "
                    "what an SAE does to its predictions")


def _logits(module: nn.Module, body: nn.Module, body_output: type[Any], hidden_CD: Tensor) -> Tensor:
    """The module's logits `[C, V]` if its body outputs the given last hidden states."""
    def give(*arguments: Any, **settings: Any) -> Any:
        return body_output(last_hidden_state=hidden_CD[None])

    with _forward_of(body, give):
        nothing = torch.zeros(1, len(hidden_CD), dtype=torch.int64, device=hidden_CD.device)
        logits: Tensor = module(input_ids=nothing, use_cache=False).logits[0]
    return logits


def _difference_of(logits: Callable[[Tensor], Tensor], hidden_TD: Tensor, wanted_TV: Tensor) -> float:
    """How far the head's logits are from the model's own; infinite if the head rejects its input."""
    try:
        found_TV = logits(hidden_TD).float()
    except REFUSALS:
        return float("inf")
    return float(difference(found_TV, wanted_TV).max()) if found_TV.shape == wanted_TV.shape else float("inf")


def _with_splice(model: CausalLM, ids_1T: Tensor, tolerance: float) -> CausalLM:
    """The same model, with the fastest way of replacing a layer's output that works."""
    last = len(model.layers) - 1
    tried = [Place(Site(layer), "output", model.layers[layer]) for layer in sorted({0, last // 2, last})]
    reading = model.read(ids_1T, None, tried)
    hidden_1TD = reading.hidden_BTD

    def works(one: CausalLM) -> bool:
        try:
            same = [one.go_on(place, reading.at[place.site], reading) for place in tried]
            zero = one.go_on(tried[-1], torch.zeros_like(reading.at[tried[-1].site]), reading)
        except REFUSALS:
            return False
        return (all(difference(found[0].float(), hidden_1TD[0].float()).max() <= tolerance for found in same)
                and bool((zero != hidden_1TD).any()))

    for skips in (True, False):
        if works(one := replace(model, skips=skips)):
            return one
    raise UserError(f"{model.name}: the output of a decoder layer cannot be replaced ({type(model.module).__name__}), "
                    "so what an SAE does to its predictions cannot be measured")


@contextlib.contextmanager
def _forms_of(layers: nn.ModuleList) -> Iterator[dict[int, Any]]:
    """Record the form of each layer's output while the block runs."""
    forms: dict[int, Any] = {}

    def hook(number: int) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            forms[number] = without_tensors(output)
        return keep

    handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        yield forms
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _replaced_from_below(layers: nn.ModuleList, layer: int, x_BTD: Tensor, forms: list[Any]) -> Iterator[None]:
    """While the block runs, layers up to `layer` compute nothing and the last of them outputs `x_BTD`."""
    with contextlib.ExitStack() as stack:
        for index in range(layer + 1):
            def give(*arguments: Any, form: Any = forms[index], **settings: Any) -> Any:
                return with_hidden(form, x_BTD)

            stack.enter_context(_forward_of(layers[index], give))
        yield


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward while the block runs."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own
