"""Median seconds of one training step on this CPU, to compare two commits: run it alternately in both, several times.

    python benchmarks/step_seconds.py

The shape is that of an SAE of SmolLM2 (d_model 576, 4608 latents, k 32, untied, batch 1024), on random rows, with the
auxiliary loss. `train_step.py` compares the step with peers and with the floor. (In commit 0ceb9f3 `initialize` is in
sae/topk.py.)
"""

import statistics
import time

import torch

import olmoscope  # noqa: F401  (sets the threads, so it comes before torch's work)
from olmoscope.kernels.prepare import prepare_kernels
from olmoscope.train.adam import Adam
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.initialize import initialize
from olmoscope.train.step import Step

D_MODEL, D_SAE, K, BATCH = 576, 4608, 32, 1024
WARM_UP, STEPS = 3, 40


def main() -> None:
    """Print the median in seconds."""
    torch.manual_seed(0)
    prepare_kernels(torch.device("cpu"), candidates=False)
    rows = [torch.randn(BATCH, D_MODEL).bfloat16() for _ in range(8)]
    auxiliary = SettledAuxiliary(weight=0.125, k=K, dead_window=10**6, lift=0.1)
    step = Step(initialize(D_MODEL, D_SAE, K, "none", torch.zeros(D_MODEL), seed=0, tied=False),
                Adam((0.9, 0.999), 1e-8, scale_biases=True), auxiliary)
    seconds = []
    for number in range(WARM_UP + STEPS):
        started = time.perf_counter()
        step(rows[number % len(rows)], 1e-3)
        seconds.append(time.perf_counter() - started)
    print(statistics.median(seconds[WARM_UP:]))


if __name__ == "__main__":
    main()
