"""The live stream: the rows that a store would hold, each once an epoch, mixed, resumable anywhere."""

import numpy as np
import pytest
import torch

from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.format import read_manifest
from olmoscope.activations.store.reader import open_store
from olmoscope.activations.stream.batches import Stream
from olmoscope.activations.stream.live import open_live, parts, rounds_of_parts
from olmoscope.errors import UserError
from olmoscope.recipe.schema import Filter, Live
from olmoscope.site import Site


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    write_documents(folder / "corpus", count=90)
    job = recipe(folder / "corpus")
    job = job.model_copy(update={"train": job.train.model_copy(update={"live": Live(rows=1000)})})
    open_live(job, [Site(1), Site(7)], "train", folder / "live")
    return job, folder


def open_stream(job, folder, batch=70, filter_=None, layers=(1, 7)):
    if filter_:
        job = job.model_copy(update={"train": job.train.model_copy(update={"filter": filter_})})
    return Stream(open_live(job, [Site(layer) for layer in layers], "train", folder / "live"), batch, epochs=2)


def sorted_rows(rows_RD):
    return rows_RD[np.lexsort(rows_RD.float().T.numpy())]


def test_an_epoch_has_every_row_of_a_store_once(job):
    job, folder = job
    collect(job, "train", folder / "store")
    store = open_store(folder / "store")
    stream = open_stream(job, folder)
    assert len(stream.rounds.sizes) > 5
    for _ in range(2):
        batches = [stream.next_batch() for _ in range(stream.batches)]
        for layer in (1, 7):
            want = torch.cat([store.read(Site(layer), segment, slice(0, rows))
                              for segment, rows in enumerate(store.segment_rows)])
            assert torch.equal(sorted_rows(torch.cat([batch[Site(layer)] for batch in batches])), sorted_rows(want))


@pytest.mark.slow
def test_goes_on_from_every_batch(job):
    job, folder = job
    whole = open_stream(job, folder, 150)
    batches, states = [], []
    for _ in range(whole.batches + 3):
        states.append(whole.state())
        batches.append(whole.next_batch())
    for state, batch in list(zip(states, batches, strict=True))[::2]:
        stream = open_stream(job, folder, 150, layers=[7])  # fewer layers: the same rows
        stream.restore(state)
        assert torch.equal(stream.next_batch()[Site(7)], batch[Site(7)])


def test_filters_and_the_mean(job):
    job, folder = job
    plain = open_stream(job, folder)
    filtered = open_stream(job, folder, filter_=Filter(special_tokens=True, first_positions=2))
    kept = filtered.rounds.kept
    assert set(kept.dropped) == {"special tokens", "first 2 positions"}
    assert 0 < kept.rows == filtered.rows < plain.rows == 3000
    rows = [filtered.next_batch()[Site(1)] for _ in range(filtered.batches)]
    assert [len(part) for part in rows[:-1]] == [70] * (len(rows) - 1)
    assert sum(map(len, rows)) == kept.rows
    first = Stream(plain.rounds, plain.rounds.sizes[0]).next_batch()[Site(7)].double().mean(0)
    torch.testing.assert_close(plain.rounds.sample_mean(Site(7), "none").double(), first, rtol=1e-5, atol=1e-5)


def test_collecting_goes_on_from_a_live_folder(job, tmp_path):
    job, folder = job
    stream = open_stream(job, folder)
    stream.next_batch()
    assert not read_manifest(folder / "live").finished
    assert not (folder / "live" / "layer_01").exists()
    other = job.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match="holds the store of another recipe"):
        open_live(other, [Site(1)], "train", folder / "live")
    assert collect(job, "train", folder / "live").manifest.finished


@pytest.mark.parametrize(("segments", "count"), [(1, 1), (5, 1), (9, 2), (9, 4), (9, 9), (40, 11)])
def test_the_interleaver(segments, count):
    rounds = rounds_of_parts(segments, count)
    assert sorted(part for one in rounds for part in one) == [(s, p) for s in range(segments) for p in range(count)]
    held, run, most = set(), -1, 0
    for one in rounds:
        for segment, part in one:
            if (segment, part) not in held:
                assert (segment, part) == (run + 1, 0), "a segment goes through the model once, in order"
                run = segment
                held |= {(segment, each) for each in range(count)}
        most = max(most, len(held))
        assert len({segment for segment, _ in one}) >= min(segments, max(1, count // 2))
        held -= set(one)
    assert most / count <= max(1, (count + 1) / 2), "segments held"


def test_parts_fill_the_buffer():
    assert parts(2**18, [65536] * 305) == 9
    assert parts(2**20, [65536] * 305) == 33
    assert parts(2**20, [65536] * 7) == 7
    assert parts(10, [65536] * 7) == 1
