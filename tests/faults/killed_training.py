"""Train once undisturbed and once under SIGKILLs at random moments; a script for test_train_faults.py.

    python killed_training.py RECIPE store|live STORE FOLDER KILLS

Everything is imported once; each attempt is a forked process, so that 25 of them take seconds. FOLDER gets `whole`,
`killed`, and `report.json`: the undisturbed run's seconds until its first metrics and in total, and the step of each
kill.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers.models.olmo3.modeling_olmo3  # noqa: F401
from numba.np.ufunc import parallel

from olmoscope.activations.store.reader import open_store
from olmoscope.files import write_json
from olmoscope.model.load import load_model
from olmoscope.recipe.load import load_recipe
from olmoscope.site import Site
from olmoscope.tokens.tokenizer import load_tokenizer
from olmoscope.train.adam import Adam
from olmoscope.train.derived import settled
from olmoscope.train.group import train_from_store, train_live
from olmoscope.train.initialize import initialize
from olmoscope.train.step import Step

RECIPE, MODE, STORE, FOLDER, KILLS = load_recipe(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:5]), int(sys.argv[5])


def start(out: Path) -> int:
    """Fork a process that trains into `out`; its errors go to a file beside it."""
    pid = os.fork()
    if pid:
        return pid
    # torch makes a new thread pool after a fork, but not safely if several threads ask for it first, as they do while a
    # model is loaded: "Invalid thread pool". Now there is one thread.
    torch.set_num_threads(1)
    # numba's lock is shared with forked processes: a process that is killed while it holds the lock would block all
    # later ones.
    parallel._set_init_process_lock()
    log = os.open(FOLDER / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        if MODE == "live":
            list(train_live(RECIPE, RECIPE.saes, out / "store", out))
        else:
            list(train_from_store(RECIPE, RECIPE.saes, open_store(STORE), out))
        status = 0
    finally:
        if status:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)


def steps(out: Path) -> int:
    """Steps of the earliest SAE's last checkpoint."""
    found = [max((int(path.stem[5:]) for path in (out / "runs" / sae.id / "checkpoints").glob("step-*")), default=0)
             for sae in RECIPE.saes]
    return min(found)


def ended(pid: int) -> bool:
    """Wait for an attempt; returns whether it finished before it was killed. It must not have failed."""
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, (FOLDER / "stderr.txt").read_text()
    return os.WIFEXITED(status)


def main() -> None:
    torch.set_num_threads(1)
    if MODE == "live":
        load_tokenizer(RECIPE.model)
        load_model(RECIPE.model, [Site(0)], torch.device("cpu"))  # for modules that transformers imports late
    for spec in RECIPE.saes:  # loads the compiled kernels, which would otherwise take most of the time of every attempt
        mean_D = torch.zeros(256)
        sae = initialize(len(mean_D), spec.d_sae, spec.k, spec.normalize, mean_D, seed=0)
        Step(sae, Adam.of(settled(RECIPE, spec)))(torch.randn(RECIPE.train.batch, len(mean_D)), lr=0.0)
    began = time.monotonic()
    pid = start(FOLDER / "whole")
    metrics = FOLDER / "whole" / "runs" / RECIPE.saes[0].id / "metrics.jsonl"
    while not metrics.exists():
        assert time.monotonic() - began < 60, (FOLDER / "stderr.txt").read_text()
        time.sleep(0.002)
    startup = time.monotonic() - began
    assert ended(pid)
    whole = time.monotonic() - began
    total = steps(FOLDER / "whole")

    moments = random.Random(25)
    longest = startup + 3 * (whole - startup) / KILLS
    kills: list[int] = []
    while len(kills) < KILLS:
        # At a random moment, or at this kill's share of the run if that comes first. So the kills are spread over the
        # run, and it never finishes before the last, however fast the machine is.
        moment = time.monotonic() + moments.uniform(0, longest)
        share = 0.6 * total * (len(kills) + 1) / KILLS
        pid = start(FOLDER / "killed")
        while time.monotonic() < moment and steps(FOLDER / "killed") < share:
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        assert not ended(pid), f"over after {kills}, {startup=}, {whole=}"
        kills.append(steps(FOLDER / "killed"))
        longest *= 1.15 if kills[-1] < share else 1
    assert ended(start(FOLDER / "killed"))
    write_json(FOLDER / "report.json", {"startup": startup, "whole": whole, "total": total, "kills": kills})


main()
