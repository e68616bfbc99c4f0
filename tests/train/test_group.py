"""Several SAEs on one read: each trains as if alone, wherever its last checkpoint was."""

import json
import os
import signal

import pytest
import torch

from helpers import checkpoint_contents, recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.errors import UserError
from olmoscope.files import locked
from olmoscope.recipe.schema import Live
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.group import _note, train_from_store, train_live
from olmoscope.train.run import run_folder
from olmoscope.train.step import Step

SAES = [{"layer": 1, "d_sae": 512, "k": 8}, {"layer": 1, "d_sae": 256, "k": 4, "normalize": "layer_norm"},
        {"layer": 7, "d_sae": 256, "k": 4}]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=90)
    job = recipe(folder / "corpus", saes=SAES)
    collect(job, "train", folder / "store")
    return job, folder / "store"


def train(job, saes, store, out):
    """From the store, or live into `out`; the ids of the SAEs in the order in which they were done."""
    if job.train.live:
        return [sae.id for sae, _ in train_live(job, saes, out / "store", out)]
    return [sae.id for sae, _ in train_from_store(job, saes, open_store(store), out)]


def result(out, sae):
    run = run_folder(out, sae)
    done = json.loads((run / "done.json").read_text())
    del done["seconds"], done["provenance"]
    return [checkpoint_contents(path) for path in checkpoints(run)], (run / "metrics.jsonl").read_text(), done


def changed(job, **train_):
    return job.model_copy(update={"train": job.train.model_copy(update=train_)})


@pytest.fixture(scope="module", params=["store", "live"])
def alone(job, request, tmp_path_factory):
    """Each SAE trained by itself; the recipe, the store, the results."""
    job, store = job
    if request.param == "live":
        job = changed(job, live=Live(rows=1000))
    results = {}
    for sae in job.saes:
        out = tmp_path_factory.mktemp("alone")
        assert train(job, [sae], store, out) == [sae.id]
        results[sae.id] = result(out, sae)
    return job, store, results


@pytest.mark.parametrize("together", ["fit", 2])
def test_each_as_if_alone(alone, together, tmp_path):
    job, store, expected = alone
    job = changed(job, together=together)
    assert train(job, job.saes, store, tmp_path) == list(expected)
    assert {sae.id: result(tmp_path, sae) for sae in job.saes} == expected


def test_members_at_different_checkpoints_go_on_together(alone, tmp_path, monkeypatch):
    job, store, expected = alone
    step = Step.__call__
    for sae, last in zip(job.saes[:2], (7, 12), strict=True):  # the third has not begun

        def interrupted(self, *arguments, last=last):
            step(self, *arguments)
            if self.count == last:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Step, "__call__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(job, [sae], store, tmp_path)
        assert [path.stem for path in checkpoints(run_folder(tmp_path, sae))] == [f"step-{last:08d}"]
    train(job, job.saes, store, tmp_path)
    assert {sae.id: result(tmp_path, sae) for sae in job.saes} == expected


def test_the_progress_bar_says_what_is_known():
    early = {"loss": 0.5, "l0": 8.0, "dead_share": None}
    assert _note([early]) == "loss 0.500 L0 8.0 dead -"
    assert _note([early, early | {"dead_share": 0.25}, early | {"dead_share": 0.5}]) == (
        "loss 0.500 L0 8.0 dead 25.0%-50.0%")


def test_from_a_store_layers_go_one_after_the_other(job, tmp_path, monkeypatch):
    job, store = job
    seen = []
    step = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, *rest: (seen.append(self.sae.d_sae), step(self, *rest))[1])
    train(job, job.saes, store, tmp_path)
    assert seen == [512, 256] * 24 + [256] * 24


def test_one_that_diverges_drops_out_and_the_others_are_finished(alone, tmp_path, monkeypatch):
    job, store, expected = alone
    step = Step.__call__

    def spoilt(self, x_BD, *rest):
        step(self, x_BD, *rest)
        if self.sae.d_sae == 512 and self.count == 9:
            self.sae.W_dec[:] = torch.nan

    monkeypatch.setattr(Step, "__call__", spoilt)
    for _ in range(2):
        with pytest.raises(UserError, match=r"layer_01/width_512/topk_8_raw: the loss is not finite at step 10"):
            train(job, job.saes[:2], store, tmp_path)
        assert result(tmp_path, job.saes[1]) == expected[job.saes[1].id]
        assert [path.stem for path in checkpoints(run_folder(tmp_path, job.saes[0]))] == ["step-00000005"]


def test_a_group_waits_for_nobody(job, tmp_path):
    job, store = job
    with locked(run_folder(tmp_path, job.saes[1]), "training"), pytest.raises(UserError, match="another process is"):
        train(job, job.saes, store, tmp_path)
    assert not list(tmp_path.rglob("metrics.jsonl"))
