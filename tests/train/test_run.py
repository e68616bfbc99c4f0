"""A whole run is finished once, refused when it should be, and the same after a kill."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from commands import shared_commands
from helpers import checkpoint_contents, recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.errors import UserError
from olmoscope.files import locked, sha256
from olmoscope.recipe.schema import Auxiliary
from olmoscope.sae.io.checkpoint import read_checkpoint
from olmoscope.site import Site
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.group import train_from_store
from olmoscope.train.run import learning_rate, run_folder
from olmoscope.train.step import Step


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A recipe whose store is collected, and that store's folder."""
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=120)
    job = recipe(folder / "corpus", tokens__count=6000)
    collect(job, "train", folder / "store")
    return job, open_store(folder / "store"), folder


def train(recipe_, sae, store, out):
    """Train one SAE; returns whether there was something to do."""
    return [fresh for _, fresh in train_from_store(recipe_, [sae], store, out)] == [True]


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_learns_and_says_what_it_did(job, tmp_path, number):
    recipe_, store, _ = job
    sae = recipe_.saes[number]
    run = run_folder(tmp_path, sae)
    assert train(recipe_, sae, store, tmp_path)
    done = json.loads((run / "done.json").read_text())
    metrics = lines(run)
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    assert (done["tokens"], done["steps"]) == (6000, 47) == (metrics[-1]["tokens"], metrics[-1]["step"])
    weighted = sum(line["loss"] * (line["tokens"] - before) for line, before in
                   zip(metrics, [0, *(line["tokens"] for line in metrics)], strict=False))
    assert done["nmse"] == pytest.approx(weighted / 6000)
    assert [path.name for path in checkpoints(run)] == ["step-00000047.safetensors"]
    trained = read_checkpoint(run / done["checkpoint"])
    assert (trained.k, trained.d_sae, trained.normalize) == (sae.k, sae.d_sae, sae.normalize)
    torch.testing.assert_close(trained.W_dec.norm(dim=1), torch.ones(sae.d_sae))
    assert "finished: mean training NMSE" in (run / "training.log").read_text()
    before = sha256(checkpoints(run)[0])
    assert not train(recipe_, sae, store, tmp_path)
    assert sha256(checkpoints(run)[0]) == before


def test_dead_latents_are_null_until_the_window_is_full(job, tmp_path):
    recipe_, store, _ = job
    sae = recipe_.saes[0]
    for window, known in ((1000, True), (6001, False)):
        changed = recipe_.model_copy(update={"train": recipe_.train.model_copy(update={"dead_window": window})})
        out = tmp_path / str(window)
        train(changed, sae, store, out)
        run = run_folder(out, sae)
        assert [line["dead_share"] is not None for line in lines(run)] == [
            line["tokens"] >= window for line in lines(run)]
        assert (json.loads((run / "done.json").read_text())["dead_share"] is not None) == known
        first = (run / "training.log").read_text().splitlines()[1]
        assert "dead not known yet" in first


SCRIPT = """
import sys
from pathlib import Path
import torch
from olmoscope.activations.store.reader import open_store
from olmoscope.recipe.load import load_recipe
from olmoscope.train import run as module
from olmoscope.train.group import train_from_store
torch.set_num_threads(1)
job = load_recipe(sys.argv[1])
if sys.argv[4] != "0":  # slow enough to be killed in the middle
    import time
    step = module.Step.__call__
    module.Step.__call__ = lambda *rest: (time.sleep(float(sys.argv[4])), step(*rest))[1]
list(train_from_store(job, job.saes[:1], open_store(Path(sys.argv[2])), Path(sys.argv[3])))
"""


def start(folder, run, pause):
    """Start a training process; returns its pid and the file of its errors."""
    pid, _, errors = shared_commands().start_as(os.environ, folder / "job.yaml", folder / "store", run, pause,
                                                code=SCRIPT)
    return pid, errors


@pytest.mark.slow
@pytest.mark.parametrize(("number", "variant"), [
    (signal.SIGKILL, {}), (signal.SIGINT, {}), (signal.SIGTERM, {"activation": "jumprelu", "matryoshka": [0.25]}),
    (signal.SIGKILL, {"train": {"finish": {"share": 0.5}}}),
    (signal.SIGTERM, {"weights": "untied", "train": {"finish": {"share": 0.5}, "orthogonal": 0.8}})])
def test_killed_and_resumed_equals_never_killed(job, tmp_path, number, variant):
    recipe_, _, folder = job
    recipe_ = recipe_.model_copy(update={
        "saes": [recipe_.saes[0].model_copy(update=variant)],
        "train": recipe_.train.model_copy(update={"auxiliary": Auxiliary(weight=1 / 32, dead_window=1000, k=32)})})
    (folder / "job.yaml").write_text(recipe_.to_yaml())
    ended = shared_commands().wait
    pid, errors = start(folder, tmp_path / "whole", 0)
    assert ended(pid, 120) == 0, errors.read_text()
    run, whole = (run_folder(tmp_path / name, recipe_.saes[0]) for name in ("killed", "whole"))
    kills = 0
    for _ in range(20):
        pid, errors = start(folder, tmp_path / "killed", 0.05)
        while (status := ended(pid, 0.01)) is None and (
                len(lines(run)) if (run / "metrics.jsonl").exists() else 0) < 7 * (kills + 1):
            pass
        if status is not None:
            break
        os.kill(pid, number)
        assert ended(pid) is not None
        assert not (run / "done.json").exists()
        kills += 1
    assert status == 0, errors.read_text()
    assert kills >= 2
    assert lines(run) == lines(whole)
    assert ("capped_share" in lines(run)[0]) == ("activation" in variant)
    assert lines(run)[0]["auxiliary_loss"] is None and lines(run)[-1]["auxiliary_loss"] > 0
    assert checkpoint_contents(checkpoints(run)[-1]) == checkpoint_contents(checkpoints(whole)[-1])
    log = (run / "training.log").read_text()
    assert log.count("resumed after step") >= 2 or number == signal.SIGKILL
    if number != signal.SIGKILL:
        assert log.count("stopped by a signal") == kills


def test_seconds_are_those_of_the_whole_run(job, tmp_path, monkeypatch):
    """Stopped after 7 slow steps, it continues with fast ones: the time of the slow ones still counts."""
    recipe_, store, _ = job
    sae = recipe_.saes[0]
    run = run_folder(tmp_path, sae)
    step = Step.__call__

    def slow(self, *rest):
        time.sleep(1)
        step(self, *rest)
        if self.count == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", slow)
        with pytest.raises(KeyboardInterrupt):
            train(recipe_, sae, store, tmp_path)
    copy = shutil.copytree(tmp_path, tmp_path / "copy")
    began = time.monotonic()
    train(recipe_, sae, store, tmp_path)
    second_part = time.monotonic() - began
    seconds = json.loads((run / "done.json").read_text())["seconds"]
    assert 7 <= seconds <= 9 + second_part

    # A checkpoint from a version that did not count them: the run continues, and does not report a part as the total.
    older = checkpoints(run_folder(copy, sae))[0]
    with safe_open(older, "pt") as file:
        metadata = json.loads(file.metadata()["olmoscope"])
    del metadata["loop"]["seconds"]
    save_file(load_file(older), older, {"olmoscope": json.dumps(metadata)})
    train(recipe_, sae, store, copy)
    assert json.loads((run_folder(copy, sae) / "done.json").read_text())["seconds"] is None
    weights = [load_file(checkpoints(run_folder(out, sae))[0]) for out in (tmp_path, copy)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_another_run_or_store_is_refused(job, tmp_path):
    recipe_, store, _ = job
    sae = recipe_.saes[0]
    train(recipe_, sae, store, tmp_path)
    other = recipe_.model_copy(update={"train": recipe_.train.model_copy(update={"lr": 0.1})})
    with pytest.raises(UserError, match="holds a different"):
        train(other, sae, store, tmp_path)
    logging_differs = recipe_.model_copy(update={"train": recipe_.train.model_copy(update={"log_every": 7})})
    assert not train(logging_differs, sae, store, tmp_path)
    fresh = tmp_path / "fresh"
    for change, message in (
            ({"model": recipe_.model.model_copy(update={"name": "another/model"})}, "the recipe is for another/model"),
            ({"model": recipe_.model.model_copy(update={"d_model": 4096})}, r"is for tiny \(d_model 4096\)"),
            ({"model": recipe_.model.model_copy(update={"revision": "abc"})}, "with another recipe"),
            ({"seed": 9}, "with another recipe")):
        with pytest.raises(UserError, match=message):
            train(recipe_.model_copy(update=change), sae, store, fresh)
    with pytest.raises(UserError, match=r"has no rows of layers\.3 \(it has layers\.1, layers\.7\)"):
        train(recipe_, sae.model_copy(update={"reads": [Site(3)]}), store, fresh)
    assert not fresh.exists()


def test_two_at_once_and_damage_are_refused(job, tmp_path):
    recipe_, store, _ = job
    sae = recipe_.saes[0]
    run = run_folder(tmp_path, sae)
    with locked(run, "training"), pytest.raises(UserError, match="another process is training"):
        train(recipe_, sae, store, tmp_path)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-00000005.safetensors").write_bytes(b"half of a file")
    with pytest.raises(UserError, match=r"step-00000005\.safetensors is damaged"):
        train(recipe_, sae, store, tmp_path)


def test_a_diverging_run_stops(job, tmp_path):
    recipe_, store, _ = job
    wild = recipe_.model_copy(update={"train": recipe_.train.model_copy(update={"lr": 1e30})})
    with pytest.raises(UserError, match=r"the loss is not finite at step \d+; lower train.lr"):
        train(wild, recipe_.saes[0], store, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_and_absent(job, tmp_path):
    recipe_, store, _ = job
    with pytest.raises(UserError, match="cuda was asked for"):
        train(recipe_.model_copy(update={"device": "cuda"}), recipe_.saes[0], store, tmp_path)


def test_learning_rate():
    assert {learning_rate(2.0, 0, step, 100) for step in range(100)} == {2.0}
    assert {learning_rate(2.0, 0.2, step, 100) for step in range(81)} == {2.0}
    assert learning_rate(2.0, 0.2, 90, 100) == pytest.approx(1.0)
    assert learning_rate(2.0, 0.2, 99, 100) == pytest.approx(0.1)


def test_interrupting_leaves_handlers_as_they_were():
    from olmoscope.train.interrupt import deferred_interrupts

    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupts() as came:
        os.kill(os.getpid(), signal.SIGINT)
        assert came()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    assert signal.getsignal(signal.SIGINT) is before
