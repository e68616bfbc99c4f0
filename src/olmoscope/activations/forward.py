"""A token segment through the model: its batches as they were planned, padding removed."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from olmoscope.model.capture import read_residual_stream
from olmoscope.model.load import LoadedModel
from olmoscope.recipe import Recipe
from olmoscope.tokens.chunks import positions
from olmoscope.tokens.segments import TokenSegment


def forward(model: LoadedModel, tokens: TokenSegment, recipe: Recipe) -> Iterator[tuple[slice, dict[int, Tensor]]]:
    """Run a segment's batches.

    Yields:
        Which rows of the segment a batch is, and for each layer their activations `[R, d_model]`, padding removed.
    """
    layers = recipe.activations.layers
    apart = recipe.tokens.documents == "apart"
    for first, last in pairwise(tokens.batch_starts):
        starts = tokens.sequence_starts[first : last + 1]
        lengths = np.diff(starts)
        real_BT = np.arange(lengths.max()) < lengths[:, None]
        token_ids_BT = np.zeros(real_BT.shape, dtype=np.int64)
        token_ids_BT[real_BT] = tokens.token_ids[starts[0] : starts[-1]]
        positions_BT = np.zeros(real_BT.shape, dtype=np.int64)
        if apart:
            positions_BT[real_BT] = np.concatenate([
                positions(tokens.document_ids[start:end], "apart")
                for start, end in pairwise(starts)])
        outputs = read_residual_stream(model.module, model.layers, layers,
                                       torch.from_numpy(token_ids_BT).to(model.device),
                                       torch.from_numpy(positions_BT).to(model.device) if apart else None)
        keep_BT = torch.from_numpy(real_BT).to(model.device)
        yield slice(int(starts[0]), int(starts[-1])), {layer: outputs[layer][keep_BT] for layer in layers}
