"""What collection and evaluation assume of a model, tested on this very model before it reads any text.

The test takes two or three passes over some random tokens. It compares rows of passes that have the same shape and
differ only in tokens that a row must not depend on, so that rounding can neither hide nor cause a difference.

Shapes: T positions, D d_model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from olmoscope.errors import UserError
from olmoscope.model.capture import read_sites
from olmoscope.model.sites import Place
from olmoscope.model_errors import first_line
from olmoscope.seeds import generator
from olmoscope.site import Site

TOKENS = 128
"""Length of each test sequence of two documents; on only a few tokens, some architectures run different code."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest ‖difference‖ / ‖row‖ that counts as equal. Experts sum in an order that depends on all rows of a batch."""
OTHER_SHAPE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""The same for the median over rows of passes of different shapes, whose products are rounded differently."""
REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError)
"""What an architecture raises if it does not take position ids, or cannot skip the layers below a given one."""


@dataclass(frozen=True)
class Probe:
    """What the test showed about a model."""

    documents_apart: bool
    """Whether restarted position ids give a document the same rows as the document alone."""

    def refuse_leak(self, name: str, documents: str) -> None:
        """Refuse `documents: apart` if the model cannot keep documents apart.

        Args:
            name: the model's name.
            documents: the recipe's `tokens.documents`.

        Raises:
            UserError: the documents see each other.
        """
        if documents == "apart" and not self.documents_apart:
            raise UserError(f"tokens.documents: apart does not work with {name}: with restarted position ids, "
                            "documents still see those before them; set tokens.documents=share")


@torch.no_grad()
def probe(module: nn.Module, layers: nn.ModuleList, name: str, d_model: int, vocabulary: int,
          positions: int | None) -> Probe:
    """Test a decoder, whole or cut off above a layer.

    Args:
        module: the decoder, without its head.
        name: the model's name, for messages.
        d_model: width of its rows.
        vocabulary: number of rows of its embedding.
        positions: the longest sequence that it accepts; None if there is no limit.

    Raises:
        UserError: its layers output something other than rows, or a row depends on later tokens.
    """
    device = next(module.parameters()).device
    length = min(TOKENS, positions or TOKENS)
    first = max(1, length // 2 - 3)
    ids = generator(0, "tokens of a probe").integers(min(10, vocabulary // 2), max(2, vocabulary // 2), (3, length))
    ids_3T = torch.from_numpy(ids).to(device)
    ids_3T[1, :first] = ids_3T[0, :first]  # differs from row 0 after the first document
    ids_3T[2, first:] = ids_3T[0, first:]  # differs from row 0 before the second
    last = Site(len(layers) - 1)
    place = Place(last, "output", layers[last.layer])

    def rows(token_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        found = read_sites(module, [place], token_ids, positions)
        if last not in found:
            raise UserError(f"{name}: decoder layer {last.layer} did not run; olmoscope cannot read this architecture")
        if found[last].shape != (*token_ids.shape, d_model):
            raise UserError(f"{name}: decoder layer {last.layer} gives {list(found[last].shape)}, not rows of width "
                            f"{d_model}; olmoscope cannot read this architecture")
        return found[last].float()

    dtype = next(module.parameters()).dtype
    try:
        here, later = rows(ids_3T[:2])[:, :first]
    except UserError:
        raise
    except REFUSALS as error:
        raise does_not_run(name, dtype, error) from error
    if difference(here, later).max() > TOLERANCE[dtype]:
        raise UserError(f"{name} is not causal: a row depends on the tokens after it; olmoscope reads causal language "
                        "models only")
    positions_2T = torch.cat([torch.arange(first), torch.arange(length - first)]).expand(2, -1).to(device)
    try:
        one, other = rows(ids_3T[[0, 2]], positions_2T)[:, first:]
        alone = rows(ids_3T[:1, first:])[0]
    except REFUSALS:
        return Probe(documents_apart=False)
    return Probe(documents_apart=bool(difference(one, other).max() <= TOLERANCE[dtype]
                                      and difference(one, alone).median() <= OTHER_SHAPE[dtype]))


def does_not_run(name: str, dtype: torch.dtype, error: Exception) -> UserError:
    """The error for a model whose passes fail."""
    hint = "; try model.dtype=float32 (--dtype float32)" if dtype != torch.float32 else ""
    return UserError(f"{name} does not run in {str(dtype).removeprefix('torch.')}: {first_line(error)}{hint}")


def difference(a_TD: Tensor, b_TD: Tensor) -> Tensor:
    """‖a − b‖ / ‖b‖ of each row."""
    size_T: Tensor = b_TD.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    difference_T: Tensor = (a_TD - b_TD).norm(dim=1)
    return difference_T / size_T
