"""Sequences: nothing lost, lengths from the buckets, resumable at every cut; batches: the bound on padding."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoscope.tokens.batches import plan_batches
from olmoscope.tokens.begin import Begun, begun_with, is_begin
from olmoscope.tokens.chunks import Chunker, positions, waiting_from_arrays, waiting_to_arrays

BUCKETS = [(5, 9), (20, 30)]


def documents(count=40):
    random = np.random.default_rng(0)
    return [random.integers(0, 1000, random.integers(1, 60)).astype(np.int32) for _ in range(count)]


def cut_all(chunker, texts, first=0):
    sequences = []
    for number, token_ids in enumerate(texts[first:], start=first):
        chunker.add(token_ids, number % 3)
        while sequence := chunker.cut():
            sequences.append(sequence)
    while sequence := chunker.cut(last=True):
        sequences.append(sequence)
    return sequences


def test_every_token_is_in_one_sequence_with_its_document_and_source():
    texts = documents()
    sequences = cut_all(Chunker(BUCKETS, 10**9, seed=1), texts)
    assert np.array_equal(np.concatenate([s.token_ids for s in sequences]), np.concatenate(texts))
    document_ids = np.concatenate([s.document_ids for s in sequences])
    assert np.array_equal(document_ids, np.repeat(np.arange(len(texts)), [len(text) for text in texts]))
    assert np.array_equal(np.concatenate([s.sources for s in sequences]), document_ids % 3)
    assert [s.number for s in sequences] == list(range(len(sequences)))


def test_lengths_come_from_the_buckets_each_as_often():
    lengths = np.array([len(s.token_ids) for s in cut_all(Chunker(BUCKETS, 10**9, seed=1), documents(4000))][:-1])
    assert set(lengths) == {*range(5, 10), *range(20, 31)}
    assert abs((lengths < 10).mean() - 0.5) < 0.05


def test_the_count_is_met_exactly():
    sequences = cut_all(Chunker(BUCKETS, 333, seed=1), documents())
    assert sum(len(s.token_ids) for s in sequences) == 333


def test_goes_on_from_every_cut():
    texts = documents()
    whole = cut_all(Chunker(BUCKETS, 900, seed=1), texts)
    for stop in range(len(whole)):
        first = Chunker(BUCKETS, 900, seed=1)
        added, cuts = 0, 0
        while cuts <= stop:
            if first.cut():
                cuts += 1
            else:
                first.add(texts[added], added % 3)
                added += 1
        counters, waiting = first.state()
        second = Chunker(BUCKETS, 900, seed=1)
        second.restore(counters, waiting_from_arrays(waiting_to_arrays(waiting)))
        rest = []
        while sequence := second.cut():
            rest.append(sequence)
        rest += cut_all(second, texts, first=added)
        assert len(rest) == len(whole) - stop - 1
        for got, want in zip(rest, whole[stop + 1 :], strict=True):
            assert got.number == want.number
            assert np.array_equal(got.token_ids, want.token_ids)
            assert np.array_equal(got.document_ids, want.document_ids)


@pytest.mark.parametrize("begin", [(7,), (7, 8)])
@pytest.mark.parametrize("apart", [False, True])
def test_each_context_begins_with_bos_and_no_token_is_lost(begin, apart):
    texts = [text + 10 for text in documents()]  # only 7 and 8 are BOS
    sequences = cut_all(Chunker(BUCKETS, 10**9, 1, begin, apart=apart), texts)
    for sequence in sequences:
        starts = np.flatnonzero(np.diff(sequence.document_ids, prepend=-1)) if apart else [0]
        for start, end in pairwise([*starts, len(sequence.token_ids)]):
            assert tuple(sequence.token_ids[start:end][: len(begin)]) == begin[: end - start]
        assert (sequence.token_ids < 10).sum() == sum(
            min(len(begin), end - start) for start, end in pairwise([*starts, len(sequence.token_ids)]))
    tokens = np.concatenate([sequence.token_ids for sequence in sequences])
    ids = np.concatenate([sequence.document_ids for sequence in sequences])
    assert np.array_equal(tokens[tokens >= 10], np.concatenate(texts))
    assert np.array_equal(ids[tokens >= 10], np.repeat(np.arange(len(texts)), [len(text) for text in texts]))
    plain = Chunker(BUCKETS, 10**9, 1)
    plain.add(np.zeros(10**4, np.int32), 0)
    for sequence in sequences[:-1]:
        assert len(sequence.token_ids) == len(plain.cut().token_ids)  # BOS counts as a token
    whole = cut_all(Chunker(BUCKETS, 333, 1, begin, apart=apart), texts)
    assert sum(len(sequence.token_ids) for sequence in whole) == 333


@pytest.mark.parametrize("apart", [False, True])
def test_another_beginning_for_the_same_sequences(apart):
    """Sequences cut with BOS give, without it, the same text in the same sequences; adding it again is exact."""
    texts = [text + 10 for text in documents()]
    sequences = cut_all(Chunker(BUCKETS, 10**9, 1, (7,), apart=apart), texts)
    with_bos = Begun(np.concatenate([s.token_ids for s in sequences]),
                     np.concatenate([s.document_ids for s in sequences]),
                     np.cumsum([0, *(len(s.token_ids) for s in sequences)]))
    without = begun_with(with_bos, (7,), (), apart=apart)
    assert np.array_equal(without.token_ids, np.concatenate(texts))
    assert np.array_equal(is_begin(with_bos.document_ids, with_bos.starts, 1, apart=apart), with_bos.token_ids == 7)
    lone = int((np.diff(np.flatnonzero(np.append(with_bos.token_ids, 7) == 7)) == 1).sum())  # BOS ends a sequence
    back = begun_with(without, (), (7,), apart=apart)
    assert len(back.token_ids) == len(with_bos.token_ids) - lone
    if not lone:
        for name in ("token_ids", "document_ids", "starts"):
            assert np.array_equal(getattr(back, name), getattr(with_bos, name))
    two = begun_with(without, (), (7, 8), apart=apart)
    assert np.array_equal(begun_with(two, (7, 8), (7,), apart=apart).token_ids, back.token_ids)


def test_positions_restart_at_documents_kept_apart():
    document_ids = np.array([4, 4, 4, 5, 9, 9])
    assert positions(document_ids, "share").tolist() == [0, 1, 2, 3, 4, 5]
    assert positions(document_ids, "apart").tolist() == [0, 1, 2, 0, 0, 1]
    assert positions(np.array([], dtype=int), "apart").tolist() == []


@settings(deadline=None)
@given(st.lists(st.integers(1, 512), min_size=1, max_size=200), st.sampled_from([512, 4096]))
def test_batches_hold_their_bounds(lengths, batch_tokens):
    lengths = np.array(lengths)
    batches = plan_batches(lengths, batch_tokens, max_padding=0.03)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        computed = len(batch) * lengths[batch].max()
        assert computed <= batch_tokens
        assert 1 - lengths[batch].sum() / computed <= 0.03


def test_batches_are_as_large_as_the_bounds_allow():
    assert [len(batch) for batch in plan_batches(np.full(20, 100), 850, 0.03)] == [8, 8, 4]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_cuts(seed):
    first, second = (cut_all(Chunker(BUCKETS, 500, seed), documents()) for _ in range(2))
    assert [len(s.token_ids) for s in first] == [len(s.token_ids) for s in second]
