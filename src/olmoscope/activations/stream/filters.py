"""Which rows training leaves out: special tokens, first positions, rows of outlying norm. Decided before training
starts, from what the store says of each row, so that the number of steps is known and batches stay full.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from olmoscope.activations.store.format import norm_name
from olmoscope.activations.store.reader import Store
from olmoscope.errors import UserError
from olmoscope.recipe.schema import Filter

MEDIAN_ROWS = 2**20
"""Rows that the median norm is taken over, at most: a random sample, whose median is within 0.1% of the quantile."""


@dataclass(frozen=True)
class RowFacts:
    """What a filter looks at, one entry a row of a segment."""

    token_id: np.ndarray
    position: np.ndarray
    """In the sequence, from 0."""
    norms: dict[int, np.ndarray]
    """Of each layer; empty where nothing asks for them."""


@dataclass(frozen=True)
class Kept:
    """The rows that training sees."""

    masks: list[np.ndarray] | None
    """Of each segment, bool: whether a row stays. None if all do."""
    rows: int
    of: int
    dropped: dict[str, float]
    """For each reason asked for, the share of all rows that it leaves out; a row may have several."""

    @property
    def dropped_share(self) -> float:
        return 1 - self.rows / self.of

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {share:.2%}" for reason, share in self.dropped.items())
        return f"{self.rows:,} of {self.of:,} rows, {self.dropped_share:.2%} left out ({reasons or 'no filter'})"


def keep(filter_: Filter, facts: Iterable[RowFacts], special_ids: list[int], largest_norms: dict[int, float],
         rows: int) -> Kept:
    """Apply a filter to all segments.

    Args:
        largest_norms: of each layer, where the filter looks at norms.
        rows: of all segments.

    Raises:
        UserError: nothing is left.
    """
    if filter_ == Filter():
        return Kept(None, rows, rows, {})
    masks = []
    counts: dict[str, int] = {}
    for segment in facts:
        dropped = {}
        if filter_.special_tokens:
            dropped["special tokens"] = np.isin(segment.token_id, special_ids)
        if filter_.first_positions:
            dropped[f"first {filter_.first_positions} positions"] = segment.position < filter_.first_positions
        if filter_.max_norm is not None:
            over = [segment.norms[layer] > largest for layer, largest in largest_norms.items()]
            dropped[f"norm over {filter_.max_norm:g} x median"] = np.logical_or.reduce(over)
        for reason, drop_R in dropped.items():
            counts[reason] = counts.get(reason, 0) + int(drop_R.sum())
        masks.append(~np.logical_or.reduce(list(dropped.values())))
    kept = Kept(masks, sum(int(mask.sum()) for mask in masks), rows,
                {reason: count / rows for reason, count in counts.items()})
    if not kept.rows:
        raise UserError(f"train.filter leaves no row to train on: {kept}")
    return kept


def keep_of_store(filter_: Filter, store: Store) -> Kept:
    """Apply a filter to a store; reads rows/ only, 16 bytes and 4 for each layer a row.

    Raises:
        UserError: damaged files, or nothing is left.
    """
    layers = store.manifest.layers if filter_.max_norm is not None else []
    largest = {}
    if filter_.max_norm is not None:
        share = min(1.0, MEDIAN_ROWS / store.rows)
        samples = [{layer: facts.norms[layer][: int(np.ceil(share * len(facts.token_id)))] for layer in layers}
                   for facts in _facts(store, layers)]
        largest = {layer: filter_.max_norm * float(np.median(np.concatenate([sample[layer] for sample in samples])))
                   for layer in layers}
    return keep(filter_, _facts(store, layers), store.manifest.special_token_ids, largest, store.rows)


def _facts(store: Store, layers: list[int]) -> Iterator[RowFacts]:
    for segment in range(store.manifest.segments):
        rows = store.read_rows(segment)
        yield RowFacts(rows["token_id"].numpy(), rows["position"].numpy(),
                       {layer: rows[norm_name(layer)].numpy() for layer in layers})
