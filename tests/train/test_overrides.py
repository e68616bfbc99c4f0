"""SAEs of one recipe with different training settings: each trains as if alone; which checkpoints a run keeps."""

import json
import os
import signal
from itertools import pairwise

import pytest
import torch

from helpers import checkpoint_contents, recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.recipe.schema import Every, Train
from olmoscope.sae.io.checkpoint import read_checkpoint
from olmoscope.train.checkpoint import checkpoints, is_kept, kept_checkpoints
from olmoscope.train.group import by_stream, train_from_store, train_live
from olmoscope.train.run import run_folder
from olmoscope.train.step import Step

SMALL = {"layer": 1, "d_sae": 256, "k": 4}
OVERRIDES = {"plain": {}, "rate": {"lr": 1e-3}, "seed": {"seed": 5}, "batch": {"batch": 64}, "epochs": {"epochs": 2},
             "filter": {"filter": {"first_positions": 2}}, "order": {"order": "reading"},
             "auxiliary": {"auxiliary": {"weight": 0.5, "dead_window": 200}}}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=90)
    job = recipe(folder / "corpus", tokens__count=1500,
                 saes=[SMALL | {"name": name, "train": train} for name, train in OVERRIDES.items()])
    collect(job, "train", folder / "store")
    return job, folder / "store", folder / "corpus"


def result(out, sae):
    run = run_folder(out, sae)
    done = json.loads((run / "done.json").read_text())
    for key in ("seconds", "provenance", "sae"):
        del done[key]
    return [checkpoint_contents(path) for path in checkpoints(run)], (run / "metrics.jsonl").read_text(), done


def test_who_shares_a_read(job):
    groups = [[sae.name for sae in group] for _, group in by_stream(job[0], job[0].saes)]
    assert groups == [["plain", "rate", "seed", "auxiliary"], ["batch"], ["epochs"], ["filter"], ["order"]]


def test_each_becomes_what_a_recipe_of_its_own_would_make_it(job, tmp_path):
    recipe_, store, corpus = job
    trained = list(train_from_store(recipe_, recipe_.saes, open_store(store), tmp_path / "all"))
    assert sorted(sae.id for sae, fresh in trained if fresh) == sorted(OVERRIDES)
    results = {}
    for sae in recipe_.saes:
        alone = recipe(corpus, tokens__count=1500, saes=[SMALL],
                       **{f"train__{key}": value for key, value in OVERRIDES[sae.name].items()})
        list(train_from_store(alone, alone.saes, open_store(store), tmp_path / sae.name))
        results[sae.name] = result(tmp_path / sae.name, alone.saes[0])
        assert result(tmp_path / "all", sae) == results[sae.name]
    weights = {name: str(found[0][-1]["tensors"]["W"]) for name, found in results.items()}
    assert len(set(weights.values())) == len(OVERRIDES)
    assert not any(fresh for _, fresh in train_from_store(recipe_, recipe_.saes, open_store(store), tmp_path / "all"))


def test_live_too(job, tmp_path):
    corpus = job[2]
    names = ("plain", "batch")
    job_ = recipe(corpus, tokens__count=1500, train__live={"rows": 500},
                  saes=[SMALL | {"name": name, "train": OVERRIDES[name]} for name in names])
    assert [sae.id for sae, _ in train_live(job_, job_.saes, tmp_path / "store", tmp_path / "all")] == list(names)
    for sae in job_.saes:
        list(train_live(job_, [sae], tmp_path / "store", tmp_path / "alone"))
        assert result(tmp_path / "all", sae) == result(tmp_path / "alone", sae)


def test_a_seed_of_training_changes_the_start_and_nothing_else(job, tmp_path):
    recipe_, store, _ = job
    starts = []
    step = Step.__call__

    def first(self, x_BD, *rest):
        if self.count == 0:
            starts.append((self.sae.W_dec.clone(), x_BD.clone()))
        step(self, x_BD, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", first)
        wanted = [sae for sae in recipe_.saes if sae.name in ("plain", "rate", "seed")]
        list(train_from_store(recipe_, wanted, open_store(store), tmp_path))
    (plain, x_plain), (rate, _), (seed, x_seed) = starts
    assert torch.equal(x_plain, x_seed) and torch.equal(plain, rate) and not torch.equal(plain, seed)


@pytest.mark.parametrize(("kept", "every", "steps"), [
    ("last", 5, [24]), ("all", 5, [5, 10, 15, 20, 24]), (Every(every=7), 5, [7, 14, 21, 24]),
    (Every(every=12), 100, [12, 24])])
def test_checkpoints_are_kept_as_the_recipe_says_however_often_it_is_stopped(job, tmp_path, kept, every, steps):
    recipe_, store, _ = job
    train = recipe_.train.model_copy(update={"checkpoints": kept, "checkpoint_every": every, "batch": 64})
    job_ = recipe_.model_copy(update={"train": train, "saes": recipe_.saes[:1]})
    sae = job_.saes[0]
    assert kept_checkpoints(train, 24) == len(steps)
    list(train_from_store(job_, [sae], open_store(store), tmp_path / "whole"))
    for last in (4, 9, 16):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            step = Step.__call__

            def interrupted(self, *arguments, step=step, last=last):
                step(self, *arguments)
                if self.count == last:
                    os.kill(os.getpid(), signal.SIGINT)

            patch.setattr(Step, "__call__", interrupted)
            list(train_from_store(job_, [sae], open_store(store), tmp_path / "stopped"))
    list(train_from_store(job_, [sae], open_store(store), tmp_path / "stopped"))
    runs = [run_folder(tmp_path / name, sae) for name in ("whole", "stopped")]
    for run in runs:
        assert [int(path.stem[5:]) for path in checkpoints(run)] == steps
    whole, stopped = ([checkpoint_contents(path) for path in checkpoints(run)] for run in runs)
    assert whole == stopped
    loaded = [read_checkpoint(path).W_dec for path in checkpoints(runs[0])]
    assert all(not torch.equal(one, other) for one, other in pairwise(loaded))


def test_which_steps_are_kept():
    assert [step for step in range(1, 13) if is_kept(Train(checkpoints={"every": 4}), step)] == [4, 8, 12]
    assert [step for step in range(1, 13) if is_kept(Train(checkpoints="all", checkpoint_every=5), step)] == [5, 10]
    assert not any(is_kept(Train(), step) for step in range(1, 3000))
