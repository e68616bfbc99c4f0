"""What training reads: each row once an epoch, mixed, in an order that three integers resume."""

import numpy as np
import pytest
import torch

from helpers import recipe, write_documents
from olmoscope.activations import rounds as rounds_module
from olmoscope.activations.collect import collect
from olmoscope.activations.filters import keep_of_store
from olmoscope.activations.format import read_rows
from olmoscope.activations.rounds import StoreRounds
from olmoscope.activations.store import open_store
from olmoscope.activations.stream import Stream
from olmoscope.recipe import Filter


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    write_documents(folder / "corpus", count=90)
    collect(recipe(folder / "corpus", activations__dtype="float32"), "train", folder / "store")
    return open_store(folder / "store")


@pytest.fixture
def several_rounds(monkeypatch):
    monkeypatch.setattr(rounds_module, "ROUND_ROWS", 1000)


def open_stream(store, batch, order="shuffled", seed=0, layers=(1,), filter_=None, **options):
    kept = keep_of_store(filter_ or Filter(), store)
    return Stream(StoreRounds(store, list(layers), order, seed, kept), batch, epochs=2, **options)


def sorted_rows(rows_RD):
    return rows_RD[np.lexsort(rows_RD.T.numpy())]


def all_rows(store, layer=1):
    return torch.cat([store.read(layer, segment, slice(0, rows)) for segment, rows in enumerate(store.segment_rows)])


@pytest.mark.parametrize("order", ["shuffled", "reading"])
@pytest.mark.parametrize("batch", [64, 1000, 5000])
def test_an_epoch_has_every_row_once(store, order, batch, several_rounds):
    stream = open_stream(store, batch, order, seed=0)
    for epoch in range(2):
        assert stream.state()["epoch"] == epoch
        batches = [stream.next_batch()[1] for _ in range(stream.batches)]
        assert all(len(part) == batch for part in batches[:-1])
        assert torch.equal(sorted_rows(torch.cat(batches)), sorted_rows(all_rows(store)))


def test_reading_order_is_the_model_s(store):
    stream = open_stream(store, 100, "reading", seed=0)
    got = torch.cat([stream.next_batch()[1] for _ in range(stream.batches)])
    want = []
    for segment, count in enumerate(store.segment_rows):
        rows = read_rows(store.path, segment)
        places = list(zip(rows["sequence"].tolist(), rows["position"].tolist(), strict=True))
        order = sorted(range(count), key=places.__getitem__)
        want.append(store.read(1, segment, slice(0, count))[order])
    assert torch.equal(got, torch.cat(want))


@pytest.mark.parametrize("order", ["shuffled", "reading"])
def test_goes_on_from_every_batch(store, order, several_rounds):
    whole = open_stream(store, 70, order, seed=3)
    batches, states = [], []
    for _ in range(2 * whole.batches):
        states.append(whole.state())
        batches.append(whole.next_batch()[1])
    assert all(set(state) == {"epoch", "round", "offset"} for state in states)
    for number, state in enumerate(states):
        stream = open_stream(store, 70, order, seed=3)
        stream.restore(state)
        assert torch.equal(stream.next_batch()[1], batches[number])


def test_batches_mix_the_whole_store(store, several_rounds):
    """A shuffled batch holds rows of all segments; epochs and seeds differ in order."""
    stream = open_stream(store, 200, "shuffled", seed=0)
    assert len(stream.rounds.sizes) > 1
    first = stream.next_batch()[1]
    segments = [store.read(1, segment, slice(0, rows)) for segment, rows in enumerate(store.segment_rows)]
    for segment in segments:
        assert (first[:, None] == segment[None]).all(2).any(), "a segment is missing from the batch"
    assert not torch.equal(first, open_stream(store, 200, "shuffled", seed=1).next_batch()[1])
    for _ in range(stream.batches - 1):
        stream.next_batch()[1]
    assert not torch.equal(first, stream.next_batch()[1])


def test_the_sampled_mean_is_the_mean(store, monkeypatch):
    x_BD = all_rows(store).double()
    torch.testing.assert_close(store.sample_mean(1, "none").double(), x_BD.mean(0), rtol=1e-5, atol=1e-6)
    normal_BD = (x_BD - x_BD.mean(1, keepdim=True)) / (x_BD.std(1, keepdim=True) + 1e-5)
    torch.testing.assert_close(store.sample_mean(1, "layer_norm").double(), normal_BD.mean(0), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("olmoscope.activations.store.SAMPLE_ROWS", 1500)
    sampled = store.sample_mean(1, "none").double()
    assert 0 < (sampled - x_BD.mean(0)).norm() < 0.2 * x_BD.std(0).norm()
