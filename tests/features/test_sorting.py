"""The pass: sorting a segment's firings, merging runs, cutting into parts, drawing examples; for any firings."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoscope.features import parts as parts_module
from olmoscope.features.counting import _count_piece
from olmoscope.features.format import BINS, INTERVALS, LOWEST_OCTAVE, bin_edges
from olmoscope.features.parts import _pieces, plan_parts, position_bins
from olmoscope.features.sorted_firings import Firings, SortedFirings, _write_sorted, sorted_path
from olmoscope.features.sorting import merge_firings, transpose
from olmoscope.kernels.compile import call

LATENTS = 6


@st.composite
def texts(draw):
    """Segments of a text: for each, the latents and values of every encoded row, and the row at each place."""
    segments = []
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.integers(0, 6))
        codes = [draw(st.dictionaries(st.integers(0, LATENTS - 1), st.floats(2**-10, 100, width=32), max_size=LATENTS))
                 for _ in range(rows)]
        left_out = draw(st.integers(0, 3))
        row_at = draw(st.permutations([*range(rows), *[-1] * left_out]))
        segments.append((codes, row_at))
    return segments


def firings(codes):
    counts = [len(code) for code in codes]
    latents = np.array([key for code in codes for key in code], np.int32)
    return Firings(np.cumsum([0, *counts]).astype(np.int64), latents,
                   np.array([value for code in codes for value in code.values()], np.float32))


@settings(max_examples=60, deadline=None)
@given(texts(), st.lists(st.integers(0, LATENTS), max_size=3), st.floats(0.01, 1))
def test_runs_merge_to_the_transposed_codes(tmp_path_factory, segments, cuts, share):
    work = tmp_path_factory.mktemp("work")
    expected, sampled, first_place = {latent: [] for latent in range(LATENTS)}, [], 0
    for number, (codes, row_at) in enumerate(segments):
        rows = np.array(row_at, np.int64)
        _write_sorted(sorted_path(work, number), firings(codes), rows, first_place, LATENTS, share)
        for local, row in enumerate(row_at):
            if row >= 0:
                for latent, value in codes[row].items():
                    expected[latent].append((first_place + local, np.float32(value)))
        sampled += [sorted(code) for code in codes[: int(np.ceil(share * len(codes)))]]
        first_place += len(row_at)
    runs = SortedFirings(work, len(segments))
    assert runs.counts().tolist() == [len(expected[latent]) for latent in range(LATENTS)]
    bounds = sorted({0, *cuts, LATENTS})
    for first, stop in itertools.pairwise(bounds):
        begins, offsets, places, values = runs.read(first, stop)
        starts = offsets.sum(axis=0)
        merged_places, merged_values = np.empty_like(places), np.empty_like(values)
        call(merge_firings, begins, offsets, places, values, starts, merged_places, merged_values)
        for latent in range(first, stop):
            mine = slice(starts[latent - first], starts[latent - first + 1])
            assert list(zip(merged_places[mine].tolist(), merged_values[mine], strict=True)) == expected[latent]
    sample = runs.sample()
    rows = [sorted(sample.latents_P[start:end].tolist())
            for start, end in zip(sample.starts_R1[:-1], sample.starts_R1[1:], strict=True)]
    assert rows == sampled
    offsets, by_latent = np.zeros(LATENTS + 1, np.int64), np.empty(len(sample.latents_P), np.int32)
    transpose(sample.starts_R1, sample.latents_P, offsets, by_latent)
    for latent in range(LATENTS):
        assert by_latent[offsets[latent] : offsets[latent + 1]].tolist() == [
            row for row, latents in enumerate(sampled) if latent in latents]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 60), st.integers(1, 10))
def test_parts_cover_all_features_and_keep_to_their_size(counts, firings_of_a_part, features_of_a_part):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "FIRINGS_OF_A_PART", firings_of_a_part)
        patch.setattr(parts_module, "FEATURES_OF_A_PART", features_of_a_part)
        bounds = plan_parts(np.array(counts))
    assert bounds[0] == 0 and bounds[-1] == len(counts) and (np.diff(bounds) > 0).all()
    for first, stop in itertools.pairwise(bounds):
        size = sum(counts[first:stop])
        assert stop - first == 1 or (stop - first <= features_of_a_part and size <= firings_of_a_part)
    pieces = _pieces(np.cumsum([0, *counts]))
    assert pieces[0] == 0 and pieces[-1] == len(counts) and (np.diff(pieces) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.floats(2**-30, 2**30, width=32)), min_size=1,
                max_size=80), st.integers(0, 12), st.integers(0, 4))
def test_what_is_counted_of_a_feature(rows, kept, per_interval):
    """Equal to plain Python, with many equal tokens and passages, and lists shorter and longer than requested."""
    values = np.array([value for _, _, value in rows], np.float32)
    count = len(rows)
    facts = np.zeros((count, 4), np.int32)
    facts[:, 0] = [token for token, _, _ in rows]
    facts[:, 1] = np.sort([passage for _, passage, _ in rows])
    facts[:, 2] = position_bins(np.arange(count))
    table = {name: np.zeros((1, width), dtype) for name, width, dtype in (
        ("histogram", BINS, np.int32), ("interval_rows", INTERVALS, np.int32), ("sources", 1, np.int32),
        ("positions", 8, np.int32), ("top", kept, np.int32), ("random", kept, np.int32), ("token", kept, np.int32),
        ("token_rows", kept, np.int32), ("lift", kept, np.float32), ("mean", kept, np.float32))}
    for name in ("top", "random", "token"):
        table[name][:] = -1
    drawn = np.full((1, INTERVALS, per_interval), -1, np.int32)
    largest, total = np.zeros(1, np.float32), np.zeros(1)
    _count_piece(0, 1, 7, 3, np.array([0, count]), np.arange(count, dtype=np.int32), values, facts,
                 np.full(6, 1000, np.int32), 6000, 127 + LOWEST_OCTAVE, largest, total, table["histogram"],
                 table["interval_rows"], table["sources"], table["positions"], table["top"], drawn, table["random"],
                 table["token"], table["token_rows"], table["lift"], table["mean"])
    assert largest[0] == values.max() and total[0] == pytest.approx(values.astype(float).sum(), rel=1e-12)
    edges = bin_edges()
    inside = np.clip(values, edges[0], np.nextafter(edges[-1], 0))
    assert table["histogram"][0].tolist() == np.histogram(inside, edges)[0].tolist()
    peaks = {}
    for firing in range(count):
        passage = facts[firing, 1]
        if passage not in peaks or values[firing] > values[peaks[passage]]:
            peaks[passage] = firing
    expected = sorted(peaks.values(), key=lambda firing: (-values[firing], firing))[:kept]
    assert [firing for firing in table["top"][0].tolist() if firing >= 0] == expected
    random = [firing for firing in table["random"][0].tolist() if firing >= 0]
    assert random == sorted(set(random)) and len(random) == min(kept, count)
    part = np.clip(np.ceil(values.astype(float) * INTERVALS / float(largest[0])) - 1, 0, INTERVALS - 1)
    for interval in range(INTERVALS):
        members = np.flatnonzero(part == interval).tolist()
        assert table["interval_rows"][0, interval] == len(members)
        chosen = [firing for firing in drawn[0, interval].tolist() if firing >= 0]
        assert chosen == sorted(set(chosen)) and set(chosen) <= set(members)
        assert len(chosen) == min(per_interval, len(members))
    tokens = np.bincount(facts[:, 0], minlength=6)
    lifts = tokens * 6000 / (count * 1000)
    best = sorted((-tokens[token] * np.log(lifts[token]), token) for token in np.flatnonzero(lifts > 1))[:kept]
    assert [token for token in table["token"][0].tolist() if token >= 0] == [token for _, token in best]
    assert table["positions"].sum() == table["sources"].sum() == count


def test_bins_of_positions():
    assert position_bins(np.array([0, 1, 2, 3, 4, 7, 8, 8191, 8192])).tolist() == [0, 1, 2, 2, 3, 3, 4, 13, 14]


def test_any_number_of_threads_gives_the_same_bits(tmp_path):
    generator = np.random.default_rng(0)
    codes = [{int(latent): float(generator.random()) + 0.1 for latent in generator.integers(0, LATENTS, 3)}
             for _ in range(500)]
    _write_sorted(sorted_path(tmp_path, 0), firings(codes), generator.permutation(500), 0, LATENTS, 1.0)
    begins, offsets, places, values = SortedFirings(tmp_path, 1).read(0, LATENTS)
    results = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        merged = np.empty_like(places), np.empty_like(values)
        call(merge_firings, begins, offsets, places, values, offsets.sum(axis=0), *merged)
        torch.set_num_threads(before)
        results.append(merged)
    assert all((one == other).all() for one, other in zip(*results, strict=True))
