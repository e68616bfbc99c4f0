"""The way from the residual stream to logits: a model's final norm and unembedding, without its layers.

The norm is found by what it does: it is the module whose output the head reads, and what it does to some test rows
shows its kind. Shapes: D d_model, V vocabulary, C directions, T positions.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from olmoscope.errors import UserError
from olmoscope.model.config import read_config, width_and_depth
from olmoscope.model.cut import config_to_load
from olmoscope.model.layers import find_layers
from olmoscope.model.weights import read_weights
from olmoscope.model_source import pinned, revision_of
from olmoscope.recipe.schema import Model

Norm = Literal["RMS", "layer", "no"]
AGREES = 1e-3
"""Largest relative difference allowed between a norm and the formula it is identified with."""


class NoUnembedding(UserError):
    """Why a model's features have no promoted tokens; the rest of an index can still be made."""


@dataclass(frozen=True)
class Unembedding:
    """What a small change of the last residual stream does to the logits, up to a factor.

    The final norm divides a row by its RMS (RMS norm), or by its standard deviation after centring it (layer norm),
    then multiplies each channel by a weight (1 if it has none). The divisor depends on the row: for a direction without
    a row it is unknown, and left out; it is positive and the same for all tokens. The direction's effect on the divisor
    is left out too.
    """

    weight_D: Tensor
    """The norm's weight, float32."""
    norm: Norm
    """`layer`: the norm subtracts the row's mean. `no`: the head reads the residual stream itself."""
    U_VD: Tensor
    """Each row is a token's unembedding vector, float32."""
    tied: bool
    """Whether the unembedding is the embedding matrix."""
    revision: str

    def through_norm(self, directions_CD: Tensor) -> Tensor:
        """weight ⊙ direction, `[C, D]` float32; its product with U is what a direction does to the logits. The
        direction is centred first if the norm centres."""
        directions_CD = directions_CD.float()
        if self.norm == "layer":
            directions_CD = directions_CD - directions_CD.mean(dim=1, keepdim=True)
        return directions_CD * self.weight_D

    def to(self, device: torch.device) -> "Unembedding":
        return replace(self, weight_D=self.weight_D.to(device), U_VD=self.U_VD.to(device))

    def of_first(self, tokens: int) -> "Unembedding":
        """Only the first tokens: some models pad the matrix with rows that belong to no token."""
        return replace(self, U_VD=self.U_VD[:tokens])

    def __str__(self) -> str:
        matrix = f"{'tied' if self.tied else 'untied'} unembedding"
        if self.norm == "no":
            return f"{matrix}, no final norm; without later layers"
        return (f"{matrix}, final {self.norm} norm's weight folded in; without the norm's divisor of each row, and "
                "without later layers")


def load_unembedding(model: Model, device: torch.device) -> Unembedding:
    """Load the final norm and the unembedding of a causal LM; if it can be cut, most of its layers are not loaded.

    Raises:
        UserError: the model or some of its weights cannot be found.
        NoUnembedding: its logits are not a matrix times a norm of the last layer's output.
    """
    model = pinned(model)
    config = read_config(model)
    d_model, _ = width_and_depth(config, model)
    cut = config_to_load(model, config, 0)
    causal = read_weights(model, cut)
    _, layers = find_layers(causal, cut.get_text_config().num_hidden_layers)
    return unembedding_of(causal, layers, d_model, revision_of(model)).to(device)


def unembedding_of(causal: Any, layers: nn.ModuleList, d_model: int, revision: str) -> Unembedding:
    """The way to the logits of a loaded causal LM; this may convert its norm to float32.

    Raises:
        NoUnembedding: its logits are not a matrix times a norm of the last layer's output.
    """
    head, name = causal.get_output_embeddings(), type(causal).__name__
    if not isinstance(head, nn.Linear):
        raise NoUnembedding(f"{name} has no unembedding matrix")
    if head.in_features != d_model:
        raise NoUnembedding(f"the head of {name} does not read the residual stream: it reads {head.in_features} values "
                            f"of {d_model}")
    weight_D, norm = final_norm(causal, head, layers)
    embedding = causal.get_input_embeddings()
    tied = embedding is not None and embedding.weight.data_ptr() == head.weight.data_ptr()
    return Unembedding(weight_D, norm, head.weight.detach().float(), tied, revision)


@torch.no_grad()
def final_norm(causal: Any, head: nn.Module, layers: nn.ModuleList) -> tuple[Tensor, Norm]:
    """Weight `[D]` and kind of the norm between the last layer and the head.

    Raises:
        NoUnembedding: the head reads neither the last layer's output nor, up to a factor, that of a norm.
    """
    ran = _outputs(causal, head)
    name = type(causal).__name__
    if head not in ran:
        raise NoUnembedding(f"the unembedding matrix of {name} does not make its logits")
    given_TD = ran.pop(head)
    inside = set(layers.modules())
    for module, output_TD in ran.items():
        if output_TD.shape == given_TD.shape and not any(part is layers for part in module.modules()):
            scale = float((given_TD * output_TD).sum() / output_TD.square().sum().clamp_min(1e-30))
            if scale > 0 and _near(scale * output_TD, given_TD):
                break
    else:
        raise NoUnembedding(f"the head of {name} does not read the output of any module")
    if module in inside:
        return torch.full((given_TD.shape[1],), scale), "no"
    weight_D, norm = _measured(module, given_TD.shape[1], name)
    return scale * weight_D, norm


def _outputs(causal: Any, head: nn.Module) -> dict[nn.Module, Tensor]:
    """What modules output for a few tokens, in the order in which they finished, `[T, D]` each; for the head, its
    input."""
    ran: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) and output else output
        value = arguments[0] if module is head else hidden
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            ran.pop(module, None)
            ran[module] = value.detach().float().reshape(-1, value.shape[-1])

    handles = [module.register_forward_hook(keep) for module in causal.modules() if module is not causal]
    try:
        vocabulary = causal.get_input_embeddings().num_embeddings
        ids = torch.arange(8) * max(1, vocabulary // 16) % vocabulary
        causal(input_ids=ids[None].to(next(causal.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return ran


def _measured(module: nn.Module, d_model: int, name: str) -> tuple[Tensor, Norm]:
    """A norm's weight and kind, from its output for rows so large that its ε does not matter.

    The difference of its outputs for x and for −x is free of any bias.

    Raises:
        NoUnembedding: it is not a known norm.
    """
    generator = torch.Generator().manual_seed(0)
    signs_D = 1 - 2 * (torch.arange(d_model) % 2)
    x_2D = torch.stack([1000 * signs_D * (1 + 0.2 * torch.rand(d_model, generator=generator)),  # no value near the mean
                        1000 * torch.randn(d_model, generator=generator) + 500]).double()  # a mean: shows centring
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    module = module.float()
    odd_2D = (module(x_2D.float().to(device)) - module(-x_2D.float().to(device))).cpu().double() / 2
    for norm in ("RMS", "layer"):
        row_2D = x_2D - x_2D.mean(dim=1, keepdim=True) if norm == "layer" else x_2D
        row_2D = row_2D / row_2D.square().mean(dim=1, keepdim=True).sqrt()
        weight_D = odd_2D[0] / row_2D[0]
        if _near(weight_D * row_2D[1], odd_2D[1]):
            return weight_D.float(), norm
    raise NoUnembedding(f"the head of {name} reads the output of {type(module).__name__}, which is not a norm that "
                        "olmoscope knows")


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= AGREES * b.norm())
