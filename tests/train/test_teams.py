"""Teams of ranks: each trains its own SAEs, as one process would."""

import pytest

from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.distributed.launch import World
from olmoscope.distributed.place import Place
from olmoscope.errors import UserError
from olmoscope.train.group import train_from_store
from olmoscope.train.run import run_folder
from olmoscope.train.step import Step
from olmoscope.train.teams import refuse_idle_ranks
from shard_jobs import contents

SAES = [{"layer": layer, "d_sae": 200, "k": 8, "name": f"{layer}-{name}", "train": {"shards": shards}}
        for layer in (1, 7) for name, shards in (("halves", 2), ("whole", 1), ("more", 1))]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=90)
    job = recipe(folder / "corpus", saes=SAES)
    collect(job, "train", folder / "store")
    return job, folder / "store"


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory):
    """Each SAE by itself."""
    job, store = job
    out = tmp_path_factory.mktemp("alone")
    for sae in job.saes:
        list(train_from_store(job, [sae], open_store(store), out))
    return out


def train(ranks, job, store, out, spoilt=None):
    """The SAEs that each rank yields, or the reason why it ended."""
    call = Step.__call__

    def spoil(self, *arguments):
        call(self, *arguments)
        if spoilt is not None and ranks.index == spoilt:
            self.sae.W_dec[:] = float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", spoil)
        try:
            return list(train_from_store(job, job.saes, open_store(store), out,
                                         world=World(ranks, Place(ranks.index, ranks.count, ranks.index))))
        except UserError as error:
            return type(error).__name__, str(error)


def test_two_teams_of_two_and_four_of_one(rank_pool, job, alone, tmp_path):
    job, store = job
    found = rank_pool.run(4, train, job, store, tmp_path)
    assert [[(sae.id, fresh) for sae, fresh in each] for each in found] == [
        [("1-halves", True), ("1-whole", True)], [("1-more", True)],
        [("7-halves", True), ("7-whole", True)], [("7-more", True)]]
    for sae in job.saes:
        assert contents(run_folder(tmp_path, sae)) == contents(run_folder(alone, sae)), sae.id
    again = rank_pool.run(4, train, job, store, tmp_path)
    assert [[(sae.id, fresh) for sae, fresh in each] for each in again] == [
        [(sae.id, False) for sae in job.saes], [], [], []]


def test_a_team_that_fails_lets_the_others_end(rank_pool, job, alone, tmp_path):
    """There are four teams of one process; the second has a loss that is not finite."""
    job, store = job
    job = job.model_copy(update={"saes": [sae for sae in job.saes if "halves" not in sae.id]})
    found = rank_pool.run(4, train, job, store, tmp_path, 1)
    assert found[1][0] == "UserError" and "1-more: the loss is not finite" in found[1][1]
    assert [found[rank] for rank in (0, 2, 3)] == [("AnotherRankFailedError", "another process failed")] * 3
    for sae in job.saes:
        if sae.id != "1-more":
            assert contents(run_folder(tmp_path, sae)) == contents(run_folder(alone, sae)), sae.id


def test_ranks_without_work_are_refused(tmp_path):
    job = recipe(tmp_path, train__shards=4)
    one, two = job.saes[:1], job.saes
    refuse_idle_ranks(job, one, 4)
    refuse_idle_ranks(job, two, 8)
    for saes, count, counts in ((one, 3, "1 or 2"), (one, 8, "1, 2 or 4"), (two, 3, "1 or 2"), (two, 6, "1, 2 or 4")):
        many = "1 SAE" if len(saes) == 1 else "2 SAEs"
        with pytest.raises(UserError, match=(rf"^{count} processes cannot share {many} with train.shards: 4 \(1, 2 or "
                                             rf"4 can share one SAE\): start {counts}, or change train.shards$")):
            refuse_idle_ranks(job, saes, count)
