"""What several ranks train on: whole batches, of which the next one travels while one is computed."""

import contextlib

import pytest
import torch

from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.activations.stream.batches import Stream
from olmoscope.activations.stream.filters import keep_of_store
from olmoscope.activations.stream.rounds import StoreRounds
from olmoscope.recipe.schema import Filter
from olmoscope.site import Site
from olmoscope.train.shared_batches import shared_batches

SITES = [Site(1), Site(7)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    write_documents(folder / "corpus", count=60)
    collect(recipe(folder / "corpus", tokens__count=2500, activations={"layers": [1, 7]}), "train", folder / "store")
    return folder / "store"


def streamed(store, share):
    store = open_store(store)
    return Stream(StoreRounds(store, SITES, "shuffled", 0, keep_of_store(Filter(), store, SITES), share), 300, epochs=2)


def read(ranks, store, count):
    """Each batch and its position, and the bytes that this rank has given to the others by the time it gets it."""
    found = []
    with contextlib.closing(streamed(store, (ranks.index, ranks.count))) as stream, contextlib.closing(
            shared_batches(stream, torch.device("cpu"), stream.batches * 2, ranks)) as batches:
        for batch in batches:
            found.append(({site: rows.clone() for site, rows in batch.rows.items()}, batch.position,
                          ranks.traffic["gather"]))
            ranks.gather(torch.zeros(5))  # a step exchanges other things while the next batch travels
            ranks.traffic["gather"] -= 20 * (ranks.count - 1)
            if len(found) == count:
                break
    return found


@pytest.mark.parametrize(("ranks", "nodes"), [(2, 1), (3, 1), (4, 2)])
def test_ranks_get_the_batches_of_one_process_and_send_one_ahead(rank_pool, store, ranks, nodes):
    alone = streamed(store, (0, 1))
    wanted = [(alone.next_batch(), alone.state()) for _ in range(alone.batches * 2)]
    for found in rank_pool.run(ranks, read, store, None, nodes=nodes):
        for (rows, position, _), (all_rows, state) in zip(found, wanted, strict=True):
            assert position == state and all(torch.equal(rows[site], all_rows[site]) for site in SITES)
        sent = [bytes_ for _, _, bytes_ in found]
        if nodes == 1:  # on two levels, the way within a node is left for later
            assert sent[0] > 1.5 * (sent[1] - sent[0]) > 0, "the first comes when two are under way"
            assert sent[-1] == sent[-2], "with the last, none is left"


def test_ranks_may_stop_while_a_batch_travels(rank_pool, store):
    for _ in range(2):
        assert [len(found) for found in rank_pool.run(2, read, store, 3)] == [3, 3]
