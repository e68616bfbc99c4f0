"""Steering: changing chosen features of the residual stream while a model runs, and generating with it.

An edit moves a row along the feature's decoder direction d: by `value` (add), or from the feature's activation z(x) to
`value` (clamp): x + value · d, x + (value − z(x)) · d. Everything else in x stays, including the part that the SAE does
not reconstruct. So an edit by zero, and a clamp to the present activation, change nothing, not even the last bit. If an
SAE normalises rows, d is in the units of the normalised row, and is multiplied by the divisor of the row.

Shapes: B rows, D d_model, F latents, K active latents, T positions, V tokens of the vocabulary.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from olmoscope.model.capture import replaced
from olmoscope.model.sites import Place
from olmoscope.sae.coder import SparseCoder
from olmoscope.seeds import generator


@dataclass(frozen=True)
class Edit:
    """A change of one feature, at every position."""

    feature: int
    mode: Literal["add", "clamp"]
    value: float
    """In units of the feature's activation; negative values are allowed."""


def activation_of(sae: SparseCoder, x_BD: Tensor, feature: int) -> Tensor:
    """The activation of one feature on each row, `[B]`; 0 where it is not active."""
    codes = sae.encode(x_BD)
    return torch.where(codes.indices == feature, codes.values, 0).sum(dim=1)


def steer_rows(sae: SparseCoder, x_BD: Tensor, edits: list[Edit]) -> Tensor:
    """Rows of the residual stream after edits, in their own dtype.

    Args:
        x_BD: the model's own rows; all clamps start from these, so the order of edits does not matter.
    """
    _, statistics = sae.center(x_BD)
    moved_BD = torch.zeros_like(x_BD, dtype=torch.float32)
    for edit in edits:
        amount_B1: Tensor | float = edit.value
        if edit.mode == "clamp":
            amount_B1 = (edit.value - activation_of(sae, x_BD, edit.feature).float())[:, None]
        moved_BD += amount_B1 * sae.W_dec[edit.feature].float()
    if statistics is not None:
        moved_BD *= statistics.std_B1.float()
    return (x_BD.float() + moved_BD).to(x_BD.dtype)


@contextlib.contextmanager
def steering(place: Place, sae: SparseCoder, edits: list[Edit]) -> Iterator[None]:
    """Steer the rows at a site, at every position, while the block runs; without edits nothing is changed."""
    if not edits:
        yield
        return
    with replaced(place, lambda x_BTD: steer_rows(sae, x_BTD.flatten(0, 1), edits).view_as(x_BTD)):
        yield


class Continuation:
    """A text that a model continues, token by token, steered or not.

    Each step draws one number between 0 and 1 and takes the token at which the cumulative probability (over tokens
    ordered by id) passes it. So two continuations with the same seed differ only where their probabilities do.
    """

    def __init__(self, model: nn.Module, place: Place, token_ids: list[int], *, temperature: float, seed: int,
                 sae: SparseCoder, edits: list[Edit]) -> None:
        """Prepare; nothing runs yet.

        Args:
            model: a causal LM of transformers.
            place: where the SAE's site is in the model.
            temperature: 0 takes the most likely token.
        """
        self.model, self.place, self.sae, self.edits = model, place, sae, edits
        self.temperature = temperature
        self.draws = generator(seed, "tokens of a continuation")
        self.waiting = token_ids
        self.cache: Any = None

    @torch.no_grad()
    def step(self) -> int:
        """Generate the next token."""
        device = next(self.model.parameters()).device
        with steering(self.place, self.sae, self.edits):
            output = self.model(input_ids=torch.tensor([self.waiting], device=device), past_key_values=self.cache,
                                use_cache=True)
        self.cache = output.past_key_values
        token = pick(output.logits[0, -1].double().cpu(), self.temperature, self.draws.random())
        self.waiting = [token]
        return token


def pick(logits_V: Tensor, temperature: float, draw: float) -> int:
    """The token that a draw in [0, 1) selects.

    Args:
        logits_V: float64, on the CPU.
        temperature: 0 takes the most likely token, the first among equals.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    reached_V = torch.softmax(logits_V / temperature, dim=0).cumsum(0).numpy()
    return min(int(np.searchsorted(reached_V, draw * reached_V[-1], side="right")), len(reached_V) - 1)
