"""How a training step grows: its time with the batch and with the number of latents, its memory with the batch.

    python benchmarks/scaling.py [--device cpu|cuda] [--rounds N] [--json FILE]

Time: the sizes take turns, round after round; the median over all steps of each size counts. A linear time has an
exponent of 1 in a fit of log(time) against log(size). Memory: each size has a process of its own; reported is the
growth of the peak resident memory (on a GPU: of the allocator's peak) during some steps, less the batch's own rows and
codes, which are always needed. With a dense code it would grow by `4 * d_sae` bytes for each row.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from olmoscope.provenance import provenance
from olmoscope.train.adam import Adam
from olmoscope.train.initialize import initialize
from olmoscope.train.step import Step

sys.path.insert(0, str(Path(__file__).parent))
from common import hardware, peak_resident
from peers import batches, timed

D_MODEL = {"cpu": 384, "cuda": 4096}
D_SAE = {"cpu": 12288, "cuda": 131072}
K = {"cpu": 32, "cuda": 64}
BATCHES = {"cpu": [1024, 2048, 4096, 8192, 16384], "cuda": [1024, 2048, 4096, 8192, 16384, 32768]}
LATENTS = {"cpu": [6144, 12288, 24576, 49152], "cuda": [32768, 65536, 131072, 163840]}
BATCH_FOR_LATENTS = 4096
MORE_MEMORY: dict[str, list[tuple[int, int, int]]] = {"cpu": [], "cuda": [(4096, 163840, 128)]}
"""Batch, latents, k: the shape whose step must add at most 4 GB."""
ADAM = Adam((0.9, 0.999), 1e-8)


def make_step(device: str, d_sae: int, k: int, mean_D: torch.Tensor) -> Step:
    """A new SAE in training."""
    return Step(initialize(D_MODEL[device], d_sae, k, "none", mean_D, seed=0), ADAM)


def times(device: str, sizes: list[tuple[int, int]], rounds: int) -> list[float]:
    """Median seconds of a step for each (batch, latents)."""
    runners = []
    for batch, d_sae in sizes:
        rows = batches(D_MODEL[device], batch, device)
        step = make_step(device, d_sae, K[device], rows[0].mean(dim=0))
        runners.append(timed(lambda number, step=step, rows=rows: step(rows[number % len(rows)], 1e-4), device))
    for run in runners:
        run(2)
    seconds: list[list[float]] = [[] for _ in sizes]
    for _ in range(rounds):
        for found, run in zip(seconds, runners, strict=True):
            found += run(3)
    return [statistics.median(found) for found in seconds]


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log(seconds) over log(size)."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(s) for s in seconds]).slope


def show(title: str, sizes: list[int], seconds: list[float]) -> dict[str, Any]:
    slope = exponent(sizes, seconds)
    print(f"\n{title}: time grows with the power {slope:.2f}")
    for size, found in zip(sizes, seconds, strict=True):
        relative = found / size / (seconds[0] / sizes[0])
        print(f"  {size:7d}  {found * 1e3:9.2f} ms  {relative:5.2f} of the first, per unit")
    return {"sizes": sizes, "seconds": seconds, "exponent": slope}


def memory_of(device: str, batch: int, d_sae: int, k: int) -> float:
    """Bytes that some steps add to the peak, beyond the batch's rows (x, u, e) and codes. Run this in a new process."""
    d_model = D_MODEL[device]
    rows = batches(d_model, batch, device)
    step = make_step(device, d_sae, k, rows[0].mean(dim=0))
    small = batches(d_model, 8, device)[0]
    step(small, 1e-4)  # compiles, and touches all parameters and moments
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
        before = peak_resident()
    for number in range(4):
        step(rows[number % len(rows)], 1e-4)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident()
    own = batch * (2 * d_model * 4 + k * (4 + 8 + 4) + k * (8 + 4 + 4))  # u, e; values, indices, dz; sorted pairs
    return float(peak - before - own)


def memory(device: str) -> list[dict[str, Any]]:
    """Print and return the memory of a step at each batch size."""
    print("\nmemory of a step beyond parameters, moments, and the batch's own rows and codes")
    found = []
    for batch, d_sae, k in [(batch, D_SAE[device], K[device]) for batch in BATCHES[device]] + MORE_MEMORY[device]:
        command = [sys.executable, __file__, "--device", device, "--memory-of", str(batch), str(d_sae), str(k)]
        took = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        found.append({"batch": batch, "latents": d_sae, "k": k, "bytes": took})
        dense = 4 * d_sae * batch
        print(f"  batch {batch:6d}, {d_sae:6d} latents  {took / 1e6:8.1f} MB   (a dense code: {dense / 1e6:8.1f} MB)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there")
    parser.add_argument("--memory-of", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.memory_of:
        print(memory_of(device, *arguments.memory_of))
        return
    results = {
        "batch": show(f"batch, {D_SAE[device]} latents", BATCHES[device],
                      times(device, [(batch, D_SAE[device]) for batch in BATCHES[device]], arguments.rounds)),
        "latents": show(f"latents, batch {BATCH_FOR_LATENTS}", LATENTS[device],
                        times(device, [(BATCH_FOR_LATENTS, d_sae) for d_sae in LATENTS[device]], arguments.rounds)),
        "memory": memory(device)}
    if arguments.json:
        arguments.json.write_text(json.dumps(
            {"benchmark": "scaling", "date": time.strftime("%Y-%m-%d"), "hardware": hardware(device),
             "provenance": provenance(), "rounds": arguments.rounds, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
