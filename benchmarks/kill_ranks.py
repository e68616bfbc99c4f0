"""Ranks killed at random moments under torchrun with restarts: is the result that of a run that nothing disturbed?

    python benchmarks/kill_ranks.py [--kills 25] [--ranks 2] [--seed 25] [--live] [--json FILE]

Two SAEs in four shards each are trained from a store, or with `--live` straight from the model: once by this process
alone, and once by torchrun, of whose ranks a random one gets SIGKILL, again and again, at random moments: while it
starts, joins the others, trains or saves. torchrun starts all ranks anew each time. In the end weights, moments,
metrics and figures must be the same to the last bit. It exits with 1 if they are not.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import olmoscope  # noqa: F401  (sets the threads, so it comes before torch)

# isort: split
import torch
from safetensors import safe_open

from common import hardware
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.pipeline import settle_recipe, store_folder
from olmoscope.progress import console
from olmoscope.provenance import provenance
from olmoscope.recipe.load import made_live
from olmoscope.recipe.schema import Recipe
from olmoscope.sae.io.checkpoint import step_of
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.group import train_from_store, train_live
from olmoscope.train.run import run_folder

STEPS_A_KILL = 60
"""Training steps for each kill, so that every kill has something to disturb."""
PATIENCE = 300.0
"""Seconds that ranks may take to start."""


def recipe_of(kills: int) -> Recipe:
    """Two SAEs that share a read; as many epochs as the kills need."""
    tokens, batch = 6000, 128
    return Recipe.model_validate({
        "name": "killed", "device": "cpu",
        "text": {"sources": [{"kind": "files", "name": "modules", "paths": [f"{sysconfig.get_path('stdlib')}/*.py"]}],
                 "mixture": {"modules": 1.0}},
        "tokens": {"count": tokens, "held_out": 100, "chunk_lengths": [[48, 128]], "segment_rows": 1000,
                   "batch_tokens": 1000},
        "model": {"name": "tiny", "dtype": "float32"}, "activations": {"layers": [3]},
        "saes": [{"layer": 3, "d_sae": 512, "k": 8, "weights": "untied"},
                 {"layer": 3, "d_sae": 500, "k": 8, "activation": "batchtopk", "matryoshka": [0.1, 0.5]}],
        "train": {"batch": batch, "shards": 4, "checkpoint_every": 10, "log_every": 10, "dead_window": 1000,
                  "epochs": -(-kills * STEPS_A_KILL * batch // tokens)},
        "release": {"name": "killed", "repo_id": "nobody/killed"}})


def steps_of(recipe: Recipe, out: Path) -> int:
    """Steps of the earlier SAE's last checkpoint."""
    return min(max((step_of(path) for path in checkpoints(run_folder(out, sae))), default=0) for sae in recipe.saes)


@contextmanager
def torchrun(job: Path, out: Path, rows: Sequence[str], ranks: int, restarts: int) -> Iterator[subprocess.Popen[str]]:
    """Training under torchrun, with the options that say where its rows come from; it is stopped in the end, whatever
    happens."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    log = (out / "torchrun.log").open("w")
    training = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
         "--rdzv-endpoint", "localhost:0", "--max-restarts", str(restarts), "--no-python", "--", sys.executable, "-m",
         "olmoscope", "train", str(job), "-o", str(out), *rows],
        env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
    try:
        yield training
    finally:
        if training.poll() is None:
            training.terminate()
            training.wait()
        log.close()


def ranks_of(training: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started, by their ids."""
    try:
        children = Path(f"/proc/{training.pid}/task/{training.pid}/children").read_text().split()
        return [int(child) for child in children
                if b"olmoscope" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except FileNotFoundError:
        return []


def kill_some(recipe: Recipe, training: subprocess.Popen[str], out: Path, kills: int, ranks: int,
              moments: random.Random, total: int) -> list[dict[str, Any]]:
    """Kill a rank so many times; for each, which one, how long after its start, and where training stood."""
    found: list[dict[str, Any]] = []
    startup, killed = 8.0, set[int]()
    while len(found) < kills:
        began = time.monotonic()
        while len(mine := [pid for pid in ranks_of(training) if pid not in killed]) < ranks:
            if training.poll() is not None or time.monotonic() - began > PATIENCE:
                raise SystemExit(f"no ranks to kill after {found}: {(out / 'torchrun.log').read_text()}")
            time.sleep(0.002)
        began, before = time.monotonic(), steps_of(recipe, out)
        # At a random moment, or at this kill's share of the run if that comes first: training is never over before.
        moment, share = began + moments.uniform(0, 2 * startup), 0.8 * total * (len(found) + 1) / kills
        seen = False
        while time.monotonic() < moment and (steps := steps_of(recipe, out)) < share:
            if steps > before and not seen:
                startup, seen = time.monotonic() - began, True
            time.sleep(0.002)
        victim = moments.randrange(ranks)
        os.kill(mine[victim], signal.SIGKILL)
        killed |= set(mine)
        after = steps_of(recipe, out)
        startup *= 1 if seen else 1.15  # not one got so far
        found.append({"rank": victim, "seconds": round(time.monotonic() - began, 2), "step": after,
                      "made": after - before})
        print(f"kill {len(found)}: rank {victim}, {found[-1]['seconds']} s after its start, last checkpoint {after}",
              flush=True)
    return found


def contents(run: Path) -> dict[str, Any]:
    """What a run folder says, but for how long it took and when."""
    done = json.loads((run / "done.json").read_text())
    found: dict[str, Any] = {"metrics": (run / "metrics.jsonl").read_text(), "done": {
        name: value for name, value in done.items() if name not in ("seconds", "provenance")}}
    for path in sorted((run / "checkpoints").rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (the file is no mapping)
                found[f"{path.relative_to(run)}, {name}"] = file.get_tensor(name).reshape(-1).view(torch.uint8).tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=25)
    parser.add_argument("--live", action="store_true", help="train straight from the model")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console.quiet = True
    recipe = recipe_of(arguments.kills)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        killed.mkdir()
        store, job = store_folder(whole, "train"), Path(name) / "job.yaml"
        job.write_text(recipe.to_yaml())
        if arguments.live:
            recipe = made_live(settle_recipe(recipe, whole))
            list(train_live(recipe, recipe.saes, store, whole))
        else:
            collect(recipe, "train", store)
            list(train_from_store(recipe, recipe.saes, open_store(store), whole))
        total = steps_of(recipe, whole)
        with torchrun(job, killed, ["--live"] if arguments.live else ["--store", str(whole)], arguments.ranks,
                      arguments.kills) as training:
            kills = kill_some(recipe, training, killed, arguments.kills, arguments.ranks,
                              random.Random(arguments.seed), total)
            if training.wait():
                raise SystemExit(f"torchrun ended with {training.returncode}: {(killed / 'torchrun.log').read_text()}")
        differ = [f"{sae.id}: {what}" for sae in recipe.saes
                  for ours, theirs in [[contents(run_folder(out, sae)) for out in (whole, killed)]]
                  for what in sorted(ours.keys() | theirs.keys()) if ours.get(what) != theirs.get(what)]
        left = [path.name for path in killed.rglob("*.tmp")]
    training_kills = sum(kill["made"] > 0 for kill in kills)
    print(f"{len(kills)} kills of {arguments.ranks} ranks, {training_kills} after a checkpoint of that life, "
          f"{len({kill['step'] for kill in kills})} different last checkpoints of {total} steps; "
          f"{'DIFFERENT: ' + ', '.join(differ) if differ else 'equal to a run that nothing disturbed'}; "
          f"temporary files left: {len(left)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(
            {"benchmark": "kill_ranks", "date": time.strftime("%Y-%m-%d"), "hardware": hardware("cpu"),
             "provenance": provenance(), "ranks": arguments.ranks, "live": arguments.live, "seed": arguments.seed,
             "steps": total, "kills": kills, "differ": differ, "left": left}, indent=1) + "\n")
    if differ or left:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
