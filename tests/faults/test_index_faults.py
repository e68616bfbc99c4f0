"""Indexing may be killed at any moment: the finished index is the same, byte for byte."""

import os
import signal
import time

import numpy as np
import pytest
import torch

from commands import Commands
from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.files import sha256
from olmoscope.sae.io import saelens
from olmoscope.train.initialize import initialize

SMALL_PARTS = {"features__parts__FEATURES_OF_A_PART": 40}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command that indexes a random SAE over a store of 19 segments, without its output folder."""
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=200)
    job = recipe(folder / "corpus", tokens__count=12000)
    store = collect(job, "train", folder / "store").store
    sae = initialize(256, 512, 8, "none", torch.zeros(256), seed=0)
    saelens.write(sae, folder / "sae", {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"} | dict.fromkeys(
        ("hf_hook_name", "context_size", "prepend_bos", "dataset_path", "l0", "num_dead_features")))
    return ["index", folder / "sae", "--store", store, "--skip-first", 1, "-o"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("outputs"), NUMBA_NUM_THREADS="1", NUMBA_THREADING_LAYER="workqueue")
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def whole(command, commands, tmp_path_factory):
    """The files of an index that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "index"
    status, output = commands.run(*command, out, **SMALL_PARTS)
    assert status == 0, output
    return content(out)


def content(out):
    """Every file except the lock, so a half-written one would show."""
    return {str(path.relative_to(out)): sha256(path) for path in sorted(out.rglob("*"))
            if path.is_file() and not path.name.startswith(".lock")}


def done(out):
    """The number of finished runs and parts."""
    return len(list(out.glob("work/firings/[!.]*"))), len(list(out.glob("work/parts/[!.]*")))


def test_kills_at_random_moments(command, commands, whole, tmp_path):
    out = tmp_path / "index"
    random = np.random.default_rng(0)
    seen, status = [], None
    while status is None:
        before = sum(done(out))
        pid, output = commands.start(*command, out, **SMALL_PARTS)
        more = before + int(random.integers(0, 5))
        while (status := commands.wait(pid, 0.001)) is None and (sum(done(out)) <= more or not out.exists()):
            pass
        if status is None:
            time.sleep(random.uniform(0, 0.01))
            os.kill(pid, signal.SIGKILL)
            ended = commands.wait(pid)
            assert ended in (-signal.SIGKILL, 0)
            status = None if ended else 0
            seen.append(done(out))
    assert status == 0, output.read_text()
    print(f"{len(seen)} kills, after so many runs and parts: {seen}")
    assert len(seen) >= 6
    assert sum(0 < runs < 19 for runs, _ in seen) >= 2 and sum(parts > 0 for _, parts in seen) >= 2
    assert content(out) == whole


def test_a_second_process_is_refused(command, commands, tmp_path):
    out = tmp_path / "index"
    pid, _ = commands.start(*command, out, **SMALL_PARTS)
    while not (out / "work" / "identity.json").exists():
        assert commands.wait(pid, 0.002) is None
    os.kill(pid, signal.SIGSTOP)
    status, output = commands.run(*command, out, **SMALL_PARTS)
    os.kill(pid, signal.SIGKILL)
    commands.wait(pid)
    assert status == 1 and "another process is indexing in" in output and "Traceback" not in output


def test_labels_beside_it_stay(command, commands, whole, tmp_path):
    out = tmp_path / "index"
    out.mkdir()
    (out / "labels.sqlite").write_text("what people wrote")
    assert commands.run(*command, out, **SMALL_PARTS)[0] == 0
    status, output = commands.run(*command, out, **SMALL_PARTS)
    assert status == 0 and "already there" in output
    assert (out / "labels.sqlite").read_text() == "what people wrote"
    assert {name: value for name, value in content(out).items() if name != "labels.sqlite"} == whole
