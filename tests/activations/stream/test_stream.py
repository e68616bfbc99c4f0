"""What training reads: each row once an epoch, mixed, in an order that three integers resume."""

import concurrent.futures
import contextlib
import shutil
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.format import read_rows
from olmoscope.activations.store.reader import Store, open_store
from olmoscope.activations.stream import rounds as rounds_module
from olmoscope.activations.stream.batches import Stream
from olmoscope.activations.stream.filters import keep_of_store
from olmoscope.activations.stream.rounds import StoreRounds
from olmoscope.errors import UserError
from olmoscope.recipe.schema import Filter
from olmoscope.site import Site


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
    kept = keep_of_store(filter_ or Filter(), store, store.manifest.sites)
    return Stream(StoreRounds(store, [Site(layer) for layer in layers], order, seed, kept), batch, epochs=2, **options)


def sorted_rows(rows_RD):
    return rows_RD[np.lexsort(rows_RD.T.numpy())]


def all_rows(store, layer=1):
    return torch.cat([store.read(Site(layer), segment, slice(0, rows))
                      for segment, rows in enumerate(store.segment_rows)])


@pytest.mark.parametrize("order", ["shuffled", "reading"])
@pytest.mark.parametrize("batch", [64, 1000, 5000])
def test_an_epoch_has_every_row_once(store, order, batch, several_rounds):
    stream = open_stream(store, batch, order, seed=0)
    for epoch in range(2):
        assert stream.state()["epoch"] == epoch
        batches = [stream.next_batch()[Site(1)].clone() for _ in range(stream.batches)]
        assert all(len(part) == batch for part in batches[:-1])
        assert torch.equal(sorted_rows(torch.cat(batches)), sorted_rows(all_rows(store)))


def test_reading_order_is_the_model_s(store):
    stream = open_stream(store, 100, "reading", seed=0)
    got = torch.cat([stream.next_batch()[Site(1)].clone() for _ in range(stream.batches)])
    want = []
    for segment, count in enumerate(store.segment_rows):
        rows = read_rows(store.path, segment)
        places = list(zip(rows["sequence"].tolist(), rows["position"].tolist(), strict=True))
        order = sorted(range(count), key=places.__getitem__)
        want.append(store.read(Site(1), segment, slice(0, count))[order])
    assert torch.equal(got, torch.cat(want))


@pytest.mark.parametrize("order", ["shuffled", "reading"])
def test_goes_on_from_every_batch(store, order, several_rounds):
    whole = open_stream(store, 70, order, seed=3)
    batches, states = [], []
    for _ in range(2 * whole.batches):
        states.append(whole.state())
        batches.append(whole.next_batch()[Site(1)].clone())
    assert all(set(state) == {"epoch", "round", "offset"} for state in states)
    for number, state in enumerate(states):
        stream = open_stream(store, 70, order, seed=3)
        stream.restore(state)
        assert torch.equal(stream.next_batch()[Site(1)], batches[number])


def test_batches_mix_the_whole_store(store, several_rounds):
    """A shuffled batch holds rows of all segments; epochs and seeds differ in order."""
    stream = open_stream(store, 200, "shuffled", seed=0)
    assert len(stream.rounds.sizes) > 1
    first = stream.next_batch()[Site(1)].clone()
    segments = [store.read(Site(1), segment, slice(0, rows)) for segment, rows in enumerate(store.segment_rows)]
    for segment in segments:
        assert (first[:, None] == segment[None]).all(2).any(), "a segment is missing from the batch"
    assert not torch.equal(first, open_stream(store, 200, "shuffled", seed=1).next_batch()[Site(1)])
    for _ in range(stream.batches - 1):
        stream.next_batch()[Site(1)]
    assert not torch.equal(first, stream.next_batch()[Site(1)])


def test_the_sampled_mean_is_the_mean(store, monkeypatch):
    x_BD = all_rows(store).double()
    torch.testing.assert_close(store.sample_mean(Site(1), "none").double(), x_BD.mean(0), rtol=1e-5, atol=1e-6)
    normal_BD = (x_BD - x_BD.mean(1, keepdim=True)) / (x_BD.std(1, keepdim=True) + 1e-5)
    found_D = store.sample_mean(Site(1), "layer_norm").double()
    torch.testing.assert_close(found_D, normal_BD.mean(0), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("olmoscope.activations.store.reader.SAMPLE_ROWS", 1500)
    sampled = store.sample_mean(Site(1), "none").double()
    assert 0 < (sampled - x_BD.mean(0)).norm() < 0.2 * x_BD.std(0).norm()


@pytest.mark.parametrize("order", ["shuffled", "reading"])
@pytest.mark.parametrize(("readers", "filtered"), [(2, False), (3, True), (50, False)])
def test_processes_read_their_segments_and_have_the_batches_together(store, order, readers, filtered, several_rounds,
                                                                     monkeypatch):
    kept = keep_of_store(Filter(first_positions=2 if filtered else 0), store, [])
    read_bytes, read = Counter(), Store.read

    def counted(self, site, segment, rows=None, out=None):
        found = read(self, site, segment, rows, out)
        read_bytes[segment] += found.nbytes
        return found

    monkeypatch.setattr(Store, "read", counted)
    whole, *streams = (Stream(StoreRounds(store, [Site(1)], order, 0, kept, share), 70, epochs=2)
                       for share in [(0, 1), *((number, readers) for number in range(readers))])
    for _ in range(whole.batches + 2):
        batch = whole.next_batch()[Site(1)]
        shares = [stream.next_batch()[Site(1)].clone() for stream in streams]
        found = torch.empty_like(batch)
        for number, stream in enumerate(streams):
            assert np.array_equal(stream.owners, streams[0].owners)
            found[torch.from_numpy(stream.owners == number)] = shares[number]
        assert torch.equal(found, batch)
        assert all(stream.state() == whole.state() for stream in streams)
    assert whole.owners is None
    for stream in [whole, *streams]:
        stream.close()
    row_bytes = batch.shape[1] * batch.itemsize
    for number in range(min(readers, 3)):
        read_bytes.clear()
        with contextlib.closing(Stream(StoreRounds(store, [Site(1)], order, 0, kept, (number, readers)), 70)) as alone:
            for _ in range(alone.batches):
                alone.next_batch()
        own = store.segment_rows[number::readers]
        assert set(read_bytes) == set(range(number, len(store.segment_rows), readers))
        assert sum(read_bytes.values()) == sum(own) * row_bytes


def test_layers_share_a_read(store, several_rounds):
    both, one = open_stream(store, 70, layers=(1, 7)), open_stream(store, 70, layers=(7,))
    for _ in range(both.batches):
        assert torch.equal(both.next_batch()[Site(7)], one.next_batch()[Site(7)])


@pytest.mark.parametrize("order", ["shuffled", "reading"])
def test_filters_leave_out_what_they_say(store, order, several_rounds):
    rows = [read_rows(store.path, segment) for segment in range(len(store.segment_rows))]
    token_id, position = (torch.cat([part[name] for part in rows]) for name in ("token_id", "position"))
    norms = {layer: all_rows(store, layer).norm(dim=1) for layer in (1, 7)}
    for layer in (1, 7):
        torch.testing.assert_close(torch.cat([part[f"norm_{layer:02d}"] for part in rows]), norms[layer])
    special = torch.isin(token_id, torch.tensor(store.manifest.special_token_ids))
    outlying = (norms[1] > 1.05 * norms[1].quantile(0.5)) | (norms[7] > 1.05 * norms[7].quantile(0.5))
    assert special.any() and outlying.any() and not outlying.all()
    for filter_, dropped in ((Filter(special_tokens=True), special), (Filter(first_positions=3), position < 3),
                             (Filter(max_norm=1.05), outlying),
                             (Filter(special_tokens=True, first_positions=3, max_norm=1.05),
                              special | (position < 3) | outlying)):
        stream = open_stream(store, 64, order, filter_=filter_)
        kept = stream.rounds.kept
        assert kept.rows == stream.rows == int((~dropped).sum())
        assert kept.dropped_share == pytest.approx(float(dropped.double().mean()))
        got, states = [], []
        for _ in range(stream.batches):
            states.append(stream.state())
            got.append(stream.next_batch()[Site(1)].clone())
        assert all(len(batch) == 64 for batch in got[:-1])
        assert torch.equal(sorted_rows(torch.cat(got)), sorted_rows(all_rows(store)[~dropped]))
        again = open_stream(store, 64, order, filter_=filter_)
        again.restore(states[-2])
        assert torch.equal(again.next_batch()[Site(1)], got[-2])
        want = all_rows(store)[~dropped].double().mean(0)
        torch.testing.assert_close(stream.rounds.sample_mean(Site(1), "none").double(), want, rtol=1e-5, atol=1e-5)


def test_a_filter_that_leaves_nothing_is_refused(store):
    with pytest.raises(UserError, match=r"train.filter leaves no row to train on: 0 of 3,000 rows"):
        keep_of_store(Filter(first_positions=1000), store, [])


def test_reads_one_round_ahead_and_no_more(store, several_rounds):
    stream = open_stream(store, 100)
    asked = []
    read = stream.rounds.read
    stream.rounds.read = lambda epoch, number, spare: (asked.append((epoch, number)), read(epoch, number, spare))[1]
    rounds = len(stream.rounds.sizes)
    memory = set()
    for _ in range(2 * stream.batches):
        batch = stream.next_batch()[Site(1)]
        memory.add(stream._current[1][Site(1)].data_ptr())
        at = stream._current[0]
        assert asked[: rounds * at[0] + at[1] + 1] == sorted(asked)[: rounds * at[0] + at[1] + 1]
        assert len(asked) <= rounds * at[0] + at[1] + 2
        assert len(batch)
    stream.close()
    assert asked == [(epoch, number) for epoch in range(2) for number in range(rounds)], "nothing beyond the last epoch"
    assert len(memory) <= 2, "two rounds' memory, used again and again"
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("read-")]


def test_errors_of_reading_ahead_reach_the_reader(store, several_rounds, tmp_path):
    shutil.copytree(store.path, tmp_path / "store")
    stream = open_stream(open_store(tmp_path / "store"), 100)
    path = tmp_path / "store" / "layer_01" / "segment-000001.safetensors"
    kept = path.read_bytes()
    first = stream.next_batch()[Site(1)].clone()
    concurrent.futures.wait([stream._coming[1]])
    path.unlink()
    read, state = 1, stream.state()
    message = r"segment-000001.safetensors is damaged \(it is missing\); run `olmoscope store repair"
    with pytest.raises(UserError, match=message):
        for _ in range(stream.batches):
            state = stream.state()
            stream.next_batch()
            read += 1
    assert read >= stream.rounds.sizes[0] // 100
    assert stream.state() == state, "the stream stands where it stood"
    path.write_bytes(kept)
    stream.close()
    again = open_stream(open_store(tmp_path / "store"), 100)
    assert torch.equal(again.next_batch()[Site(1)], first)
    again.restore(state)
    whole = open_stream(store, 100)
    whole.restore(state)
    assert torch.equal(again.next_batch()[Site(1)], whole.next_batch()[Site(1)])
