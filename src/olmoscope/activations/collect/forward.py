"""The batches of a token segment, and the activations of a batch. Padding is added before the model and removed after
it.

Shapes: B sequences of a batch, T tokens of the longest of them, R tokens without padding, N with padding, D width of a
site.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.model.capture import read_sites
from olmoscope.model.load import LoadedModel
from olmoscope.model.probe import does_not_run
from olmoscope.site import Site
from olmoscope.tokens.chunks import positions
from olmoscope.tokens.segments import TokenSegment


@dataclass(frozen=True)
class Batch:
    """What the model reads in one forward pass."""

    rows: slice
    """Its rows in the token segment."""
    token_ids_BT: Tensor
    """int64; 0 in padding."""
    positions_BT: Tensor | None
    """Position ids, int64; None unless documents are kept apart."""
    real_R: Tensor
    """The indices of the tokens of the flattened batch that are not padding, int64."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; the copy to a GPU does not wait for the work queued there."""
        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        return Batch(self.rows, move(self.token_ids_BT),
                     None if self.positions_BT is None else move(self.positions_BT), move(self.real_R))


def batches(tokens: TokenSegment, apart: bool) -> Iterator[Batch]:
    """The batches of a segment, as the token stage planned them.

    Args:
        apart: whether documents are kept apart.
    """
    for first, last in pairwise(tokens.batch_starts):
        yield batch_of(tokens, first, last, apart)


def batch_of(tokens: TokenSegment, first: int, last: int, apart: bool) -> Batch:
    """The sequences `first` to `last - 1` of a segment, as a batch."""
    starts = tokens.sequence_starts[first : last + 1]
    lengths = np.diff(starts)
    real_BT = np.arange(lengths.max()) < lengths[:, None]
    token_ids_BT = np.zeros(real_BT.shape, dtype=np.int64)
    token_ids_BT[real_BT] = tokens.token_ids[starts[0] : starts[-1]]
    positions_BT = np.zeros(real_BT.shape, dtype=np.int64)
    if apart:
        positions_BT[real_BT] = np.concatenate([
            positions(tokens.document_ids[start:end], "apart") for start, end in pairwise(starts)])
    return Batch(slice(int(starts[0]), int(starts[-1])), torch.from_numpy(token_ids_BT),
                 torch.from_numpy(positions_BT) if apart else None, torch.from_numpy(np.flatnonzero(real_BT)))


def site_rows(model: LoadedModel, sites: Sequence[Site], batch: Batch) -> Iterator[tuple[Site, Tensor]]:
    """Run the model on a batch that is on its device.

    Yields:
        Each site with its rows `[R, D]`, without padding. The sites come one at a time, so that not all rows are in
        memory twice.

    Raises:
        UserError: the model fails, which some models do only with certain lengths and dtypes.
    """
    try:
        outputs = read_sites(model.module, [model.sites.places[site] for site in sites], batch.token_ids_BT,
                             batch.positions_BT)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{model.name} does not fit into the GPU's memory with batches of "
                        f"{batch.token_ids_BT.numel():,} tokens; lower tokens.batch_tokens") from error
    except RuntimeError as error:
        raise does_not_run(model.name, next(model.module.parameters()).dtype, error) from error
    for site in sites:
        output_ND = outputs.pop(site).flatten(0, 1)
        padded = len(batch.real_R) < len(output_ND)
        yield site, output_ND.index_select(0, batch.real_R) if padded else output_ND
