"""Several `olmoscope collect` processes, however started, make the store of one process; Ctrl-C works at any moment."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.pipeline import store_folder
from olmoscope.recipe.load import load_recipe

OLMOSCOPE = [sys.executable, "-m", "olmoscope"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0", "--no-python", "--"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A recipe's file and the files of its stores as one worker makes them."""
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=120)
    job = recipe(folder / "corpus", tokens__count=6000)
    (folder / "job.yaml").write_text(job.to_yaml())
    for split in ("train", "held_out"):
        collect(job, split, store_folder(folder, split))
    return folder / "job.yaml", contents(folder)


def contents(out):
    """The whole content of a folder's stores."""
    return {str(path.relative_to(out)): path.read_bytes() for path in (out / "store").rglob("*.safetensors")}


def started(job, out, *more, by=(), **environment):
    return subprocess.Popen([*by, *OLMOSCOPE, "collect", str(job), "-o", str(out), *more], text=True,
                            env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_launched_processes_make_the_store_of_one(job, tmp_path, launcher):
    """srun is not installed here, so two processes get the variables that it sets."""
    if launcher == "torchrun":
        workers = [started(job[0], tmp_path, by=TORCHRUN)]
    else:
        workers = [started(job[0], tmp_path, SLURM_PROCID=str(index), SLURM_LOCALID=str(index), SLURM_NTASKS="2",
                           SLURM_STEP_NUM_TASKS="2", SLURM_JOB_ID="7", SLURM_STEP_NODELIST="localhost")
                   for index in range(2)]
    said = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers), said
    assert contents(tmp_path) == job[1]
    told = "".join(said)
    for index in range(2):
        assert f"worker {index}/2, as set by {launcher} (" in told
    assert "Traceback" not in told


def workers_of(launcher):
    """The workers that `--ranks` has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(child) for child in children if b"collect" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_interrupt_ends_all_workers_and_the_command_goes_on_from_there(job, tmp_path):
    collecting = started(job[0], tmp_path, "--ranks", "2")
    end = time.monotonic() + 60
    while len(workers := workers_of(collecting)) < 2:
        assert time.monotonic() < end and collecting.poll() is None
        time.sleep(0.02)
    time.sleep(1)  # they import torch
    collecting.send_signal(signal.SIGINT)
    _, errors = collecting.communicate(timeout=30)
    assert collecting.returncode == 130, errors
    assert not any(map(is_running, workers)) and "Traceback" not in errors and contents(tmp_path) != job[1]
    for split in ("train", "held_out"):
        collect(load_recipe(str(job[0])), split, store_folder(tmp_path, split))
    assert contents(tmp_path) == job[1]
    again = started(job[0], tmp_path, "--ranks", "2")
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0 and output.count("segments (0 made now)") == 2, errors
    assert contents(tmp_path) == job[1]
