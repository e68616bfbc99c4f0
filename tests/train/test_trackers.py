"""Metrics in trackers, read back with the trackers' own code: every line once, even if a process was killed."""

import json
import os
import signal
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.errors import UserError
from olmoscope.train.group import train_from_store
from olmoscope.train.run import run_folder

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from olmoscope.activations.store.reader import open_store
from olmoscope.recipe.load import load_recipe
from olmoscope.train import run as module
from olmoscope.train.group import train_from_store
torch.set_num_threads(1)
job = load_recipe(sys.argv[1])
step = module.Step.__call__
def step_or_die(self, *rest):
    if self.count == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, *rest)
module.Step.__call__ = step_or_die
list(train_from_store(job, job.saes[:1], open_store(Path(sys.argv[2])), Path(sys.argv[3]), sys.argv[4]))
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus")
    job = recipe(folder / "corpus")
    collect(job, "train", folder / "store")
    (folder / "recipe.yaml").write_text(job.to_yaml())
    return job, open_store(folder / "store"), folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """wandb reads the environment once, when it starts."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    if "wandb" in sys.modules and sys.modules["wandb"] is not None:
        sys.modules["wandb"].teardown()


def killed_and_gone_on(job, out, tracker):
    """A run that was killed at step 13 (its checkpoint is of step 10, its last line of 12) and then finished."""
    recipe_, store, folder = job
    died = subprocess.run([sys.executable, "-c", SCRIPT, folder / "recipe.yaml", folder / "store", out, tracker],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    list(train_from_store(recipe_, recipe_.saes[:1], store, out, tracker))
    return run_folder(out, recipe_.saes[0])


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def logged(run):
    """The lines as trackers get them: without null values (the auxiliary loss, while no latent is dead)."""
    return [{key: value for key, value in line.items() if value is not None} for line in metrics(run)]


def events(run):
    """(step, key) -> value of all event files; no pair may come twice."""
    found = {}
    for path in sorted((run / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                assert (event.step, value.tag) not in found
                found[event.step, value.tag] = value.tensor.float_val[0]
    return found


def test_tensorboard_has_each_line_once(job, tmp_path):
    run = killed_and_gone_on(job, tmp_path, "tensorboard")
    want = {(line["step"], key): value for line in logged(run) for key, value in line.items() if key != "step"}
    assert events(run) == pytest.approx(want)
    assert (2, "dead_share") not in want and (8, "dead_share") in want, "a window of 1000 tokens: 8 batches"


def offline_records(file: bytes):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, pieces with a header of 7 bytes: checksum,
    length, and whether it is whole or the first, a middle or the last piece) after 7 bytes of its own."""
    at, whole = 7, b""
    while at + 7 <= len(file):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = int.from_bytes(file[at + 4 : at + 6], "little"), file[at + 6]
        whole += file[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_has_each_line_once_in_one_run(job, tmp_path):
    from wandb.proto import wandb_internal_pb2

    run = killed_and_gone_on(job, tmp_path, "wandb")
    lines, ids, names = [], set(), set()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in offline_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                names.add((record.run.project, record.run.display_name))
            if record.HasField("history"):
                lines.append({item.key or item.nested_key[0]: json.loads(item.value_json)
                              for item in record.history.item})
    wanted = logged(run)
    assert [{key: line[key] for key in want} for line, want in zip(lines, wanted, strict=True)] == [
        pytest.approx(want) for want in wanted]
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1  # the killed one's lines are in the other
    assert ids == {json.loads((run / "tracker-wandb.json").read_text())["id"]}
    assert names == {("olmoscope", job[0].saes[0].id)}


def test_lines_of_before_there_was_a_tracker_are_sent(job, tmp_path, monkeypatch):
    recipe_, store, _ = job
    from olmoscope.train import run as module

    step = module.Step.__call__

    def interrupted(self, *rest):
        if self.count == 11:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module.Step, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(train_from_store(recipe_, recipe_.saes[:1], store, tmp_path))
    list(train_from_store(recipe_, recipe_.saes[:1], store, tmp_path, "tensorboard"))
    run = run_folder(tmp_path, recipe_.saes[0])
    assert {step for step, _ in events(run)} == {line["step"] for line in metrics(run)}


@pytest.mark.parametrize(("tracker", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named(job, tmp_path, monkeypatch, tracker, module):
    monkeypatch.setitem(sys.modules, module, None)
    recipe_, store, _ = job
    with pytest.raises(UserError, match=rf"--log {tracker} needs the package {tracker}: pip install 'olmoscope"):
        list(train_from_store(recipe_, recipe_.saes[:1], store, tmp_path, tracker))


def test_wandb_without_an_account_is_one_line(job, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    recipe_, store, _ = job
    with pytest.raises(UserError, match=r"wandb does not start: .*WANDB_MODE=offline"):
        list(train_from_store(recipe_, recipe_.saes[:1], store, tmp_path, "wandb"))
