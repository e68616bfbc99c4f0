"""A model's activations at some sites after it has read a text: the rows of the texts' last tokens.

Shapes: N texts, B texts of a batch, T the longest of them, D width of a site.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from olmoscope.model.capture import captured, read_sites
from olmoscope.model.load import LoadedModel
from olmoscope.model.probe import OTHER_SHAPE, REFUSALS, difference
from olmoscope.site import Site
from olmoscope.tokens.batches import plan_batches

MAX_PADDING = 0.1


def last_rows(model: LoadedModel, token_ids: Sequence[np.ndarray], batch_tokens: int,
              advance: Callable[[float], None]) -> dict[Site, Tensor]:
    """The last row of each text, for each of the model's sites `[N, D]`, float32, on the model's device.

    Args:
        token_ids: the tokens of each text, at least one per text.
        batch_tokens: tokens in one pass of the model.
        advance: called with the number of tokens read.
    """
    lengths = np.array([len(ids) for ids in token_ids])
    parts: dict[Site, list[Tensor]] = {site: [] for site in model.sites.places}
    plan = plan_batches(lengths, batch_tokens, MAX_PADDING)
    for batch in plan:
        ids_BT = np.zeros((len(batch), lengths[batch].max()), dtype=np.int64)
        for row, number in enumerate(batch):
            ids_BT[row, : lengths[number]] = token_ids[number]
        last_B = torch.from_numpy(lengths[batch] - 1).to(model.device)
        found = read_sites(model.module, list(model.sites.places.values()), torch.from_numpy(ids_BT).to(model.device))
        for site, x_BTD in found.items():
            parts[site].append(x_BTD[torch.arange(len(batch), device=model.device), last_B].float())
        advance(float(lengths[batch].sum()))
    place_N = torch.from_numpy(np.argsort(np.concatenate(plan))).to(model.device)
    return {site: torch.cat(rows)[place_N] for site, rows in parts.items()}


def rows_after(model: LoadedModel, prompt: Sequence[int], ends: Sequence[int]) -> dict[Site, Tensor]:
    """The rows of single tokens that each follow the same prompt, for each of the model's sites `[N, D]`, float32.

    The prompt is read once and its keys and values are cached, if the architecture supports that and gives the same
    rows as for the whole texts, within rounding. Otherwise each text is read whole.
    """
    whole = last_rows(model, [np.array([*prompt, ends[0]])], len(prompt) + 1, lambda tokens: None)
    try:
        found = _after_cache(model, prompt, ends)
    except REFUSALS:
        found = {}
    tolerance = OTHER_SHAPE[next(model.module.parameters()).dtype]
    if found and all(difference(found[site][:1], rows).max() <= tolerance for site, rows in whole.items()):
        return found
    rest = [np.array([*prompt, end]) for end in ends]
    return last_rows(model, rest, 16384, lambda tokens: None)


@torch.no_grad()
def _after_cache(model: LoadedModel, prompt: Sequence[int], ends: Sequence[int]) -> dict[Site, Tensor]:
    def ids(tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, device=model.device)

    cache = model.module(input_ids=ids(prompt)[None], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(ends))
    with captured(list(model.sites.places.values())) as found:
        model.module(input_ids=ids(ends)[:, None], past_key_values=cache, use_cache=True)
    return {site: x_N1D[:, 0].float() for site, x_N1D in found.items()}
