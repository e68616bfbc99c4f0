"""`olmoscope train` in several processes writes the same folder as one, and continues after a kill."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.cli.app import app
from olmoscope.cli.processes import one_tells
from olmoscope.errors import AnotherRankFailedError, UserError
from olmoscope.kernels.prepare import prepare_kernels
from olmoscope.pipeline import settle_recipe, store_folder
from olmoscope.recipe.load import made_live
from olmoscope.sae.io.checkpoint import step_of
from olmoscope.sae.io.open import load
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.group import train_from_store, train_live
from olmoscope.train.run import run_folder
from shard_jobs import contents

OLMOSCOPE = [sys.executable, "-m", "olmoscope"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0", "--max-restarts", "3", "--no-python", "--"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "2", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Two threads: `--ranks 2` gives each process one, as the test has."""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A recipe as a file, its store, and its SAE as one process trains it."""
    prepare_kernels(torch.device("cpu"))
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=120)
    job = recipe(folder / "corpus", saes=[{"layer": 1, "d_sae": 500, "k": 8, "weights": "untied"}], tokens__count=6000,
                 activations={"layers": [1]}, train__shards=4, train__epochs=3, train__checkpoint_every=20)
    (folder / "job.yaml").write_text(job.to_yaml())
    collect(job, "train", store_folder(folder, "train"))
    list(train_from_store(job, job.saes, open_store(store_folder(folder, "train")), folder))
    return job, folder, run_folder(folder, job.saes[0])


def command(job, out, *more):
    _, folder, _ = job
    return [*OLMOSCOPE, "train", str(folder / "job.yaml"), "-o", str(out), "--store", str(folder), *more]


def processes_of(out):
    """The ranks that train in a folder."""
    found = []
    for line in subprocess.run(["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True).stdout.splitlines():
        pid, _, arguments = line.strip().partition(" ")
        if str(out) in arguments and "torch.distributed.run" not in arguments and "--ranks" not in arguments:
            found.append(int(pid))
    return found


def wait_for(run, steps, patience=90.0):
    """Wait until a run has a checkpoint of at least this many steps; returns its steps."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        made = [step_of(path) for path in checkpoints(run)]
        if made and made[-1] >= steps:
            return made[-1]
        time.sleep(0.02)
    pytest.fail("no checkpoint came")


def test_told_to_stop_the_launcher_lets_all_save_and_they_go_on_from_there(job, tmp_path):
    training = subprocess.Popen([*TORCHRUN, *command(job, tmp_path)], env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
                                stderr=subprocess.PIPE, text=True)
    run = run_folder(tmp_path, job[0].saes[0])
    at = wait_for(run, 20)
    training.send_signal(signal.SIGTERM)
    _, errors = training.communicate(timeout=60)
    assert training.returncode and not (run / "done.json").exists(), errors
    assert "stopped by a signal after step" in (run / "training.log").read_text().splitlines()[-1]
    (newest,) = checkpoints(run)
    assert step_of(newest) >= at
    done = subprocess.run(command(job, tmp_path, "--ranks", "2"), env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(run) == contents(job[2])


def test_live_training_under_torchrun_goes_on_after_a_rank_was_killed(job, tmp_path):
    spec, out, whole = job[0].saes[0], tmp_path / "killed", tmp_path / "whole"
    live = [*OLMOSCOPE, "train", str(job[1] / "job.yaml"), "--live", "-o"]
    training = subprocess.Popen([*TORCHRUN, *live, str(out)], env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
                                stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(run_folder(out, spec), 20)
    os.kill(processes_of(out)[-1], signal.SIGKILL)
    output, errors = training.communicate(timeout=120)
    assert (training.returncode, output) == (0, f"{spec.id}: trained\n"), errors
    made = made_live(settle_recipe(job[0], whole))
    assert [fresh for _, fresh in train_live(made, made.saes, store_folder(whole, "train"), whole)] == [True]
    assert contents(run_folder(out, spec)) == contents(run_folder(whole, spec))


def test_two_ranks_write_what_one_process_does_also_after_a_kill(job, tmp_path):
    training = subprocess.Popen(command(job, tmp_path, "--ranks", "2"), env=ENVIRONMENT, stderr=subprocess.PIPE,
                                text=True)
    spec = job[0].saes[0]
    wait_for(run_folder(tmp_path, spec), 20)
    os.kill(processes_of(tmp_path)[-1], signal.SIGKILL)
    _, errors = training.communicate(timeout=60)
    assert training.returncode == 1
    said = errors.splitlines()[-1]
    assert said.startswith("error: rank ") and said.endswith(
        " was killed by SIGKILL; the checkpoints are whole: run the same command again to continue from the last one"
    ), errors
    assert "Traceback" not in errors
    done = subprocess.run(command(job, tmp_path, "--ranks", "2"), env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{spec.id}: trained\n"), done.stderr
    assert contents(run_folder(tmp_path, spec)) == contents(job[2])
    assert load(run_folder(tmp_path, spec)).d_sae == 500


@pytest.mark.parametrize(("environment", "ranks", "said"), [
    ({}, "--ranks=3", "3 processes cannot share 1 SAE with train.shards: 4 (1, 2 or 4 can share one SAE)"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "--ranks=2",
     "--ranks 2: torchrun (RANK, WORLD_SIZE) already started this process")])
def test_what_is_wrong_is_said_before_anything_starts(job, tmp_path, monkeypatch, environment, ranks, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["olmoscope", *command(job, tmp_path / "out", ranks)[3:]])
    monkeypatch.setattr("olmoscope.distributed.launch.start", lambda *_: pytest.fail("started"))
    with pytest.raises(UserError, match=re.escape(said)):
        app(standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_the_same_command_is_given_to_the_processes(job, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("olmoscope.distributed.launch.start", lambda *given: started.append(given[:2]))
    for ranks in (["--ranks", "2"], ["--ranks=2"]):
        asked = command(job, tmp_path, *ranks, "--only", job[0].saes[0].id)[3:]
        monkeypatch.setattr("sys.argv", ["olmoscope", *asked])
        app(standalone_mode=False)
    assert started == [(2, command(job, tmp_path, "--only", job[0].saes[0].id)[3:])] * 2


def test_collecting_in_two_processes_gives_the_same_store(job, tmp_path):
    _, folder, _ = job
    said = subprocess.run([*OLMOSCOPE, "collect", str(folder / "job.yaml"), "-o", str(tmp_path), "--ranks", "2"],
                          env=ENVIRONMENT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    one, two = store_folder(folder, "train"), store_folder(tmp_path, "train")
    files = {path.relative_to(one): path.read_bytes() for path in one.rglob("*.safetensors")}
    assert files == {path.relative_to(two): path.read_bytes() for path in two.rglob("*.safetensors")}
    segments = len(list((two / "rows").iterdir()))
    assert said.stdout.count(f"in {segments} segments ({segments} made now)") == 1


def test_one_of_several_processes_tells_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("OLMOSCOPE_RANKS", str(tmp_path))
    for raised in (UserError, AnotherRankFailedError):
        with pytest.raises(UserError) as found, one_tells():
            raise UserError("the disk is full")
        assert type(found.value) is raised
