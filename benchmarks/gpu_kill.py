"""GPU day: a training run that is killed and resumed, compared bit for bit with one that was never killed.

The package's tiny model reads Python's standard library on the device. An SAE is trained on it once without
interruption, and once by `olmoscope train` in a process that gets SIGKILL after a third of the steps and is started
again. Weights, moments and metrics must be the same.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gpu_part import Part
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.files import write_text
from olmoscope.pipeline import store_folder
from olmoscope.progress import console
from olmoscope.recipe.schema import Recipe
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.group import train_from_store
from olmoscope.train.run import run_folder

COMMAND = [sys.executable, "-m", "olmoscope", "train"]


def main() -> None:
    part = Part("kill", __doc__)
    console.quiet = True
    recipe = recipe_of(part)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        collected = collect(recipe, "train", store_folder(whole, "train"))
        part.keep(f"collected {collected.manifest.rows:,} rows", rows=collected.manifest.rows)
        for out in (whole, killed):
            out.mkdir(exist_ok=True)
            write_text(out / "recipe.yaml", recipe.to_yaml())
        shutil.copytree(store_folder(whole, "train"), store_folder(killed, "train"))
        start = time.monotonic()
        list(train_from_store(recipe, recipe.saes, open_store(store_folder(whole, "train")), whole))
        total = newest(run(recipe, whole))
        part.keep(f"trained to the end: {total} steps, {time.monotonic() - start:.1f} s", steps=total)
        at = train_and_kill(killed, run(recipe, killed), total // 3)
        part.keep(f"killed; its last checkpoint is that of step {at}", killed_at=at)
        subprocess.run([*COMMAND, str(killed)], check=True)
        compare(part, run(recipe, whole), run(recipe, killed))


def recipe_of(part: Part) -> Recipe:
    """The recipe to collect and train."""
    count, d_sae, batch, every = (3000, 512, 32, 5) if part.small else (200_000, 8192, 256, 50)
    return Recipe.model_validate({
        "name": "gpu-day", "device": part.device.type,
        "text": {"sources": [{"kind": "files", "name": "modules", "paths": [f"{sysconfig.get_path('stdlib')}/*.py"]}],
                 "mixture": {"modules": 1.0}},
        "tokens": {"count": count, "held_out": 100, "chunk_lengths": [[48, 128], [192, 256]],
                   "segment_rows": max(1000, count // 8), "batch_tokens": 1000 if part.small else 16384},
        "model": {"name": "tiny", "dtype": "bfloat16" if part.cuda else "float32"}, "activations": {"layers": [3]},
        "saes": [{"layer": 3, "d_sae": d_sae, "k": 32 if part.cuda else 8, "weights": "untied"}],
        "train": {"batch": batch, "checkpoint_every": every, "log_every": every, "dead_window": 1000},
        "release": {"name": "gpu-day", "repo_id": "nobody/gpu-day"}})


def run(recipe: Recipe, out: Path) -> Path:
    """The folder of the SAE's run."""
    return run_folder(out, recipe.saes[0])


def newest(folder: Path) -> int:
    """The step of a run's last checkpoint; 0 if it has none."""
    return max((int(path.stem.removeprefix("step-")) for path in checkpoints(folder)), default=0)


def train_and_kill(out: Path, folder: Path, step: int) -> int:
    """Start a training run, and kill it when there is a checkpoint of this step or later; returns the last one's
    step."""
    process = subprocess.Popen([*COMMAND, str(out)])
    try:
        while newest(folder) < step:
            if process.poll() is not None:
                raise SystemExit(f"the training ended before it could be killed, with status {process.returncode}")
            time.sleep(0.002)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL or (folder / "done.json").exists():
        raise SystemExit("the training ended before it could be killed")
    return newest(folder)


def compare(part: Part, whole: Path, killed: Path) -> None:
    """Compare checkpoints, metrics and final figures of two runs."""
    states = [load_file(checkpoints(folder)[-1]) for folder in (whole, killed)]
    differ = {name: float((tensor.double() - states[1][name].double()).abs().max())
              for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])}
    metrics = [(folder / "metrics.jsonl").read_text() for folder in (whole, killed)]
    same = {"tensors": not differ, "metrics": metrics[0] == metrics[1], "figures": figures(whole) == figures(killed)}
    text = ", ".join(f"{what} {'equal' if equal else 'DIFFER'}" for what, equal in same.items())
    part.keep(f"killed at one third and resumed: {text} ({len(states[0])} tensors)", equal=same,
              largest_difference=differ)
    if not all(same.values()):
        raise SystemExit(f"a killed run ends differently from an uninterrupted one: {text}")


def figures(folder: Path) -> dict[str, Any]:
    """done.json without the entries that may differ."""
    done = json.loads((folder / "done.json").read_text())
    return {name: value for name, value in done.items() if name not in ("seconds", "provenance")}


if __name__ == "__main__":
    main()
