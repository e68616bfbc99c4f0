"""A part: everything that the index has on some consecutive features, merged and counted from the sorted firings.

Shapes: C features of the part, P firings, F latents, A candidates kept, I intervals, T places, V vocabulary.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.store.tensors_file import write_tensors
from olmoscope.distributed.ranks import Ranks
from olmoscope.features.corpus import Corpus
from olmoscope.features.counting import count_companions, count_features
from olmoscope.features.directions import logit_extremes, nearest
from olmoscope.features.format import BINS, INTERVALS, LOWEST_OCTAVE, Options, part_path
from olmoscope.features.sorted_firings import SortedFirings
from olmoscope.features.sorting import merge_firings, transpose
from olmoscope.files import write_json
from olmoscope.kernels.compile import call
from olmoscope.model.unembed import Unembedding
from olmoscope.progress import bar
from olmoscope.seeds import generator

FIRINGS_OF_A_PART = 2**23
FEATURES_OF_A_PART = 8192
PIECES = 64
"""Number of pieces into which a part is divided for the threads."""


def plan_parts(counts_F: np.ndarray) -> list[int]:
    """The first feature of each part, then the number of features. Parts have up to 8192 features and 8M firings (a
    single feature may have more)."""
    starts, firings = [0], 0
    for feature, count in enumerate(counts_F.tolist()):
        if feature > starts[-1] and (firings + count > FIRINGS_OF_A_PART or feature - starts[-1] >= FEATURES_OF_A_PART):
            starts.append(feature)
            firings = 0
        firings += count
    return [*starts, len(counts_F)]


@dataclass(frozen=True)
class Facts:
    """Facts about the rows, the SAE and the model that all parts need."""

    facts_T4: np.ndarray
    """int32: the token, passage, bin of position and source of each place."""
    rows_V: np.ndarray
    """int32, the number of rows of each token."""
    rows: int
    position_rows_L: np.ndarray
    """int64, the number of rows in each bin of positions."""
    source_rows_X: np.ndarray
    """int64, the number of rows of each source."""
    starts_R1: np.ndarray
    """In the sample of rows, the latents of row r are `latents_P[starts_R1[r] : starts_R1[r + 1]]`."""
    latents_P: np.ndarray
    offsets_F1: np.ndarray
    """In the sample, the rows of latent f are `rows_P[offsets_F1[f] : offsets_F1[f + 1]]`."""
    rows_P: np.ndarray
    W_dec_FD: Tensor
    unit_FD: Tensor
    unembedding: Unembedding | None
    """None if there are no promoted tokens."""
    options: Options


def gather_facts(corpus: Corpus, sources: int, fired: SortedFirings, W_dec_FD: Tensor, unit_FD: Tensor,
                 unembedding: Unembedding | None, vocabulary: int, options: Options) -> Facts:
    """Collect the facts that all parts need.

    Args:
        sources: number of sources.
        vocabulary: number of token ids.
    """
    bins_T = position_bins(corpus.positions_T)
    kept_T = corpus.kept_T > 0
    sample = fired.sample()
    offsets_F1, rows_P = np.zeros(len(W_dec_FD) + 1, np.int64), np.empty(len(sample.latents_P), np.int32)
    transpose(sample.starts_R1, sample.latents_P, offsets_F1, rows_P)
    return Facts(
        facts_T4=np.stack([corpus.tokens_T, corpus.passages_T(), bins_T, corpus.sources_T], axis=1).astype(np.int32),
        rows_V=np.bincount(corpus.tokens_T[kept_T], minlength=vocabulary).astype(np.int32),
        rows=int(kept_T.sum()),
        position_rows_L=np.bincount(bins_T[kept_T]),
        source_rows_X=np.bincount(corpus.sources_T[kept_T], minlength=sources),
        starts_R1=sample.starts_R1, latents_P=sample.latents_P.view(np.uint32), offsets_F1=offsets_F1,
        rows_P=rows_P.view(np.uint32),
        W_dec_FD=W_dec_FD, unit_FD=unit_FD, unembedding=unembedding, options=options)


def position_bins(positions_T: np.ndarray) -> np.ndarray:
    """The bin of each position: bin 0 is position 0, bin b >= 1 is positions 2**(b - 1) to 2**b - 1."""
    return np.frexp(positions_T.astype(np.float64))[1].astype(np.int32)


def checksum_path(work: Path, part: int) -> Path:
    """The path of a part's checksum while the index is made. It is written after the part, so the part exists if it
    does."""
    return work / "parts" / f"part-{part:06d}.json"


def make_parts(index: Path, work: Path, parts: list[int], fired: SortedFirings, facts: Facts, ranks: Ranks) -> None:
    """Write every part of this rank's share that is not there yet; one is hashed and written while the next is counted.

    Args:
        parts: from `plan_parts`.

    Raises:
        UserError: the disk is full.
    """
    waiting: Future[None] | None = None
    own = list(enumerate(pairwise(parts)))[ranks.index :: ranks.count]
    features = sum(stop - first for _, (first, stop) in own)
    with bar("counting", features, "features") as advance, ThreadPoolExecutor(1) as writer:
        for part, (first, stop) in own:
            if not checksum_path(work, part).exists():
                tensors = part_tensors(first, stop, fired, facts)
                if waiting is not None:
                    waiting.result()
                waiting = writer.submit(_write_part, index, work, part, tensors)
            advance(stop - first)
        if waiting is not None:
            waiting.result()


def part_tensors(first: int, stop: int, fired: SortedFirings, facts: Facts) -> dict[str, np.ndarray]:
    """The content of the part for features `first` to `stop`; docs/formats.md describes it."""
    begins_G, offsets_GC1, places_Q, values_Q = fired.read(first, stop)
    offsets_C1 = offsets_GC1.sum(axis=0)
    places_P, values_P = np.empty_like(places_Q), np.empty_like(values_Q)
    call(merge_firings, begins_G, offsets_GC1, places_Q, values_Q, offsets_C1, places_P, values_P)
    del places_Q, values_Q
    tensors = {"firings.offsets": offsets_C1, "firings.places": places_P, "firings.values": values_P}
    tensors |= _counted(first, offsets_C1, places_P, values_P, facts)
    tensors |= _companions(first, stop, facts)
    lists = {"neighbours": nearest(facts.unit_FD, first, stop, facts.options.nearest)}
    if facts.unembedding is not None:
        lists["promoted"], lists["suppressed"] = logit_extremes(facts.W_dec_FD, facts.unembedding, first, stop,
                                                                facts.options.nearest)
    for name, ranked in lists.items():
        ids_CA = ranked.ids_CA.numpy()
        tensors |= _ragged(name, ids_CA >= 0, id=ids_CA, value=ranked.values_CA.numpy())
    return tensors


def _write_part(index: Path, work: Path, part: int, tensors: dict[str, np.ndarray]) -> None:
    path = part_path(index, part)
    digest = write_tensors(path, {name: torch.from_numpy(np.ascontiguousarray(array))
                                  for name, array in tensors.items()})
    write_json(checksum_path(work, part), {"sha256": digest, "bytes": path.stat().st_size})


def _counted(first: int, offsets_C1: np.ndarray, places_P: np.ndarray, values_P: np.ndarray, facts: Facts
             ) -> dict[str, np.ndarray]:
    """The results of `count_features`, as the tensors of a part."""
    count, options = len(offsets_C1) - 1, facts.options

    def table(width: int, dtype: type = np.int32, fill: int = 0) -> np.ndarray:
        return np.full((count, width), fill, dtype)

    largest_C, sum_C = np.zeros(count, np.float32), np.zeros(count, np.float64)
    histogram_CH, interval_rows_CI = table(BINS), table(INTERVALS)
    sources_CX, positions_CL = table(len(facts.source_rows_X)), table(len(facts.position_rows_L))
    top_CA, random_CA, token_CA = table(options.top, fill=-1), table(options.random, fill=-1), table(options.nearest,
                                                                                                 fill=-1)
    interval_CIA = np.full((count, INTERVALS, options.per_interval), -1, np.int32)
    token_rows_CA, token_lift_CA, token_mean_CA = table(options.nearest), table(options.nearest, np.float32), table(
        options.nearest, np.float32)
    seed = int(generator(options.seed, "examples of features").integers(2**62))
    call(count_features, _pieces(offsets_C1), first, seed, offsets_C1, places_P, values_P, facts.facts_T4,
         facts.rows_V, facts.rows, 127 + LOWEST_OCTAVE, largest_C, sum_C, histogram_CH, interval_rows_CI, sources_CX,
         positions_CL, top_CA, interval_CIA, random_CA, token_CA, token_rows_CA, token_lift_CA, token_mean_CA)
    tensors: dict[str, np.ndarray] = {"max": largest_C, "sum": sum_C, "interval_rows": interval_rows_CI,
                                      "source_rows": sources_CX, "position_rows": positions_CL}
    tensors |= _ragged("histogram", histogram_CH != 0, bin=np.broadcast_to(np.arange(BINS, dtype=np.int32),
                                                                           histogram_CH.shape), rows=histogram_CH)
    tensors |= _ragged("tokens", token_CA >= 0, id=token_CA, rows=token_rows_CA, lift=token_lift_CA,
                       mean=token_mean_CA)
    examples_CE = np.concatenate([top_CA, interval_CIA.reshape(count, -1), random_CA], axis=1)
    groups_E = np.repeat(np.arange(INTERVALS + 2, dtype=np.uint8),
                         [options.top, *[options.per_interval] * INTERVALS, options.random])
    return tensors | _ragged("examples", examples_CE >= 0, firing=examples_CE,
                             group=np.broadcast_to(groups_E, examples_CE.shape))


def _companions(first: int, stop: int, facts: Facts) -> dict[str, np.ndarray]:
    shape = (stop - first, facts.options.nearest)
    id_CA, rows_CA, lift_CA = np.full(shape, -1, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    call(count_companions, _pieces(facts.offsets_F1[first : stop + 1]), first, facts.starts_R1, facts.latents_P,
         facts.offsets_F1, facts.rows_P, id_CA, rows_CA, lift_CA)
    return _ragged("companions", id_CA >= 0, id=id_CA, rows=rows_CA, lift=lift_CA)


def _ragged(name: str, there: np.ndarray, **columns: np.ndarray) -> dict[str, np.ndarray]:
    """Tables `[C, A]` without empty places: each column in one array, and the offsets where each feature's entries
    begin."""
    offsets = np.concatenate([[0], np.cumsum(there.sum(axis=1))])
    return {f"{name}.offsets": offsets, **{f"{name}.{key}": table[there] for key, table in columns.items()}}


def _pieces(offsets_C1: np.ndarray) -> np.ndarray:
    """Bounds that divide the features into pieces with about the same number of firings."""
    wanted = offsets_C1[0] + (offsets_C1[-1] - offsets_C1[0]) * np.arange(PIECES + 1) // PIECES
    bounds = np.searchsorted(offsets_C1, wanted)
    bounds[0], bounds[-1] = 0, len(offsets_C1) - 1
    return np.asarray(bounds)
