"""The rows that training leaves out: special tokens, first positions, rows of outlying norm. They are chosen before
training starts, from what the store records about each row, so that the number of steps is known and batches stay full.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from olmoscope.activations.store.format import norm_name
from olmoscope.activations.store.reader import Store
from olmoscope.errors import UserError
from olmoscope.recipe.schema import Filter
from olmoscope.site import Site

MEDIAN_ROWS = 2**20
"""The most rows from which the median norm is computed: a random sample, whose median is the true median to
within 0.1% in rank."""


@dataclass(frozen=True)
class RowFacts:
    """What a filter looks at. Arrays have one entry per row of a segment."""

    token_id: np.ndarray
    position: np.ndarray
    """The position in the sequence, counted from 0."""
    norms: dict[Site, np.ndarray]
    """The Euclidean norm of the row at each site; empty if no filter needs it."""


@dataclass(frozen=True)
class Kept:
    """The rows that training sees."""

    masks: list[np.ndarray] | None
    """For each segment, whether each row is kept (bool); None if all rows are kept."""
    rows: int
    """How many rows are kept."""
    of: int
    """How many rows there are."""
    dropped: dict[str, float]
    """The share of all rows that each condition of the filter leaves out. A row may meet several conditions."""

    @property
    def dropped_share(self) -> float:
        """The share of all rows that is left out."""
        return 1 - self.rows / self.of

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {share:.2%}" for reason, share in self.dropped.items())
        return f"{self.rows:,} of {self.of:,} rows, {self.dropped_share:.2%} left out ({reasons or 'no filter'})"


def keep(filter_: Filter, facts: Iterable[RowFacts], special_ids: list[int], largest_norms: dict[Site, float],
         rows: int) -> Kept:
    """Apply a filter to all segments.

    Args:
        facts: what is known about the rows of each segment.
        special_ids: the ids of the special tokens.
        largest_norms: for each site, the largest norm of a row that is kept; empty if the filter ignores norms.
        rows: the number of rows of all segments.

    Raises:
        UserError: no row is left.
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
            over = [segment.norms[site] > largest for site, largest in largest_norms.items()]
            dropped[f"norm over {filter_.max_norm:g} x median"] = np.logical_or.reduce(over)
        for reason, drop_R in dropped.items():
            counts[reason] = counts.get(reason, 0) + int(drop_R.sum())
        masks.append(~np.logical_or.reduce(list(dropped.values())))
    kept = Kept(masks, sum(int(mask.sum()) for mask in masks), rows,
                {reason: count / rows for reason, count in counts.items()})
    if not kept.rows:
        raise UserError(f"train.filter leaves no row to train on: {kept}")
    return kept


def keep_of_store(filter_: Filter, store: Store, sites: Sequence[Site]) -> Kept:
    """Apply a filter to a store. This reads only rows/: 16 bytes per row, and 4 more for each site.

    Args:
        sites: the sites at which norms are compared.

    Raises:
        UserError: a file is damaged, or no row is left.
    """
    sites = sites if filter_.max_norm is not None else ()
    largest = {}
    if filter_.max_norm is not None:
        share = min(1.0, MEDIAN_ROWS / store.rows)
        samples = [{site: facts.norms[site][: int(np.ceil(share * len(facts.token_id)))] for site in sites}
                   for facts in _facts(store, sites)]
        largest = {site: filter_.max_norm * float(np.median(np.concatenate([sample[site] for sample in samples])))
                   for site in sites}
    return keep(filter_, _facts(store, sites), store.manifest.special_token_ids, largest, store.rows)


def _facts(store: Store, sites: Sequence[Site]) -> Iterator[RowFacts]:
    for segment in range(store.manifest.segments):
        rows = store.read_rows(segment)
        yield RowFacts(rows["token_id"].numpy(), rows["position"].numpy(),
                       {site: rows[norm_name(site)].numpy() for site in sites})
