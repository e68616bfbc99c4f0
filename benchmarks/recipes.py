"""What each lever of SAE training does, alone and together: held-out error and dead latents. Results: docs/recipes.md.

    olmoscope collect benchmarks/quality.yaml -o tiny
    python tools/train_tiny_model.py --architecture qwen3 --steps 3000 --out tiny-qwen3
    olmoscope collect benchmarks/quality.yaml --set model.name=tiny-qwen3 -o qwen3
    OMP_NUM_THREADS=1 python benchmarks/recipes.py tiny qwen3 --layers 3 --seeds 0
    python benchmarks/recipes.py --table

One process and one thread for each SAE; a result is a line of benchmarks/results/recipes.jsonl and is not made again.
An SAE of 256 x 4096 on 1M tokens takes 40 s of a core. Error is measured on the first rows of the held-out ones, dead
latents over the last tokens of training. Settings other than `default, …` are those of the first round, before the
decoder had a rate of its own; their results were measured on all held-out rows.
"""

import argparse
import contextlib
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from levers import Levers, LeverStep
from olmoscope.activations.store.reader import Store
from olmoscope.activations.stream.batches import Stream
from olmoscope.activations.stream.filters import keep_of_store
from olmoscope.activations.stream.rounds import StoreRounds
from olmoscope.recipe.schema import Filter
from olmoscope.sae.topk import TopK
from olmoscope.site import Site
from olmoscope.train.initialize import initialize
from study import Job, measure, read_results, run_all, stores, table

RESULTS = Path(__file__).parent / "results" / "recipes.jsonl"
HELD_OUT = 131_072
"""Rows measured."""
DEAD_WINDOW = 500_000
"""The last tokens of training, in which a dead latent did not fire."""

REFERENCE = Levers(order="reading", lr=3e-4, decay=0)
SHUFFLED = replace(REFERENCE, order="shuffled")
FAST = Levers(lr=2e-3, decay=0.8)
UNTIED = replace(FAST, weights="untied")
LOSS = replace(UNTIED, k_aux=32)
BEST = replace(LOSS, aux_lift=0.1)
DEFAULT = replace(BEST, decoder_rate=8.0, scale_biases=True, aux=1 / 8)
"""What derived.py finds for 4096 latents and k 32; the settings `default, …` change one thing each."""
SETTINGS = {
    "default": DEFAULT,
    "default, in reading order": replace(DEFAULT, order="reading"),
    "default, tied": replace(DEFAULT, weights="tied", aux=1e-12),
    "default, decoder rate 1": replace(DEFAULT, decoder_rate=1.0),
    "default, decoder rate 4": replace(DEFAULT, decoder_rate=4.0),
    "default, decoder rate 16": replace(DEFAULT, decoder_rate=16.0),
    "default, plain biases": replace(DEFAULT, scale_biases=False),
    "default, lr 5e-4": replace(DEFAULT, lr=5e-4),
    "default, lr 1e-3": replace(DEFAULT, lr=1e-3),
    "default, lr 1.4e-3": replace(DEFAULT, lr=1.4e-3),
    "default, lr 2.8e-3": replace(DEFAULT, lr=2.8e-3),
    "default, lr 4e-3": replace(DEFAULT, lr=4e-3),
    "default, lr 8e-3": replace(DEFAULT, lr=8e-3),
    "default, constant rate": replace(DEFAULT, decay=0.0),
    "default, decay 0.2": replace(DEFAULT, decay=0.2),
    "default, decay 1": replace(DEFAULT, decay=1.0),
    "default, warmup 0.05": replace(DEFAULT, warmup=0.05),
    "default, batch 128": replace(DEFAULT, batch=128),
    "default, batch 512": replace(DEFAULT, batch=512),
    "default, batch 1024": replace(DEFAULT, batch=1024),
    "default, no auxiliary loss, no lift": replace(DEFAULT, k_aux=0),
    "default, no auxiliary loss": replace(DEFAULT, aux=1e-12),
    "default, no lift": replace(DEFAULT, aux_lift=0.0),
    "default, auxiliary loss of weight 1/32": replace(DEFAULT, aux=1 / 32),
    "default, auxiliary loss of weight 1": replace(DEFAULT, aux=1.0),
    "default, k_aux 128": replace(DEFAULT, k_aux=128),
    "default, window 80k": replace(DEFAULT, aux_window=81_920),
    "default, beta1 0": replace(DEFAULT, betas=(0.0, 0.999)),
    "default, beta2 0.99": replace(DEFAULT, betas=(0.9, 0.99)),
    "default, touched rows": replace(DEFAULT, adam="touched"),
    "default, clipped to 0.03": replace(DEFAULT, clip=0.03),
    "default, EMA 0.999": replace(DEFAULT, ema=0.999),
    "default, k from 128": replace(DEFAULT, anneal=128),
    "default, Multi-TopK": replace(DEFAULT, multi=4),
    "default, data rows": replace(DEFAULT, init="data"),
    "default, encoder 0.5": replace(DEFAULT, encoder_scale=0.5),
    "default, resampling": replace(DEFAULT, resample=100_000),
    "default, layer norm": replace(DEFAULT, normalize="layer_norm"),
    "reference": REFERENCE,
    "+ shuffled": SHUFFLED,
    "+ lr 1e-3": replace(SHUFFLED, lr=1e-3),
    "+ decay 0.2": Levers(),
    "fast: lr 2e-3, decay 0.8": FAST,
    "fast, auxiliary loss": replace(FAST, k_aux=32),
    "fast, auxiliary loss, lift": replace(FAST, k_aux=32, aux_lift=0.1),
    "fast, lift as in best": replace(FAST, k_aux=32, aux=1e-12, aux_lift=0.1),
    "fast, lift": replace(FAST, lift=0.25),
    "fast, warmup 0.1": replace(FAST, warmup=0.1),
    "fast, data rows": replace(FAST, init="data"),
    "fast, resampling": replace(FAST, resample=100_000),
    "fast, k from 256": replace(FAST, anneal=256),
    "fast, Multi-TopK": replace(FAST, multi=4),
    "fast, touched rows": replace(FAST, adam="touched"),
    "fast, clipped": replace(FAST, clip=0.1),
    "fast, EMA 0.999": replace(FAST, ema=0.999),
    "fast, layer norm": replace(FAST, normalize="layer_norm"),
    "fast, beta1 0": replace(FAST, betas=(0.0, 0.999)),
    "fast, beta2 0.99": replace(FAST, betas=(0.9, 0.99)),
    "fast, batch 128": replace(FAST, batch=128),
    "fast, batch 1024": replace(FAST, batch=1024),
    "untied": UNTIED,
    "untied, lr 1e-3": replace(UNTIED, lr=1e-3),
    "untied, warmup 0.1": replace(UNTIED, warmup=0.1),
    "untied, encoder 0.3": replace(UNTIED, encoder_scale=0.3),
    "untied, data rows, encoder 0.1": replace(UNTIED, init="data", encoder_scale=0.1),
    "untied, data rows, encoder 0.5": replace(UNTIED, init="data", encoder_scale=0.5),
    "untied, resampling": replace(UNTIED, resample=100_000),
    "untied, lift": replace(UNTIED, lift=0.25),
    "untied, eps 1e-15": replace(UNTIED, eps=1e-15),
    "untied, auxiliary loss": LOSS,
    "untied, auxiliary loss of weight 1": replace(LOSS, aux=1.0),
    "untied, auxiliary loss, eps 1e-15": replace(LOSS, eps=1e-15),
    "untied, auxiliary loss, eps 1e-15, lift": replace(LOSS, eps=1e-15, lift=0.25),
    "best: untied, auxiliary loss, lift": BEST,
    "best, lr 1e-3": replace(BEST, lr=1e-3),
    "best, lr 3e-3": replace(BEST, lr=3e-3),
    "best, lr 4e-3": replace(BEST, lr=4e-3),
    "best, lr 4e-3, warmup 0.25": replace(BEST, lr=4e-3, warmup=0.25, decay=0.75),
    "best, decay 0.2": replace(BEST, decay=0.2),
    "best, decay 1": replace(BEST, decay=1.0),
    "best, warmup 0.05": replace(BEST, warmup=0.05),
    "best, k_aux 128": replace(BEST, k_aux=128),
    "best, window 5k": replace(BEST, aux_window=5_000),
    "best, window 100k": replace(BEST, aux_window=100_000),
    "best, batch 128": replace(BEST, batch=128),
    "best, batch 512": replace(BEST, batch=512),
    "best, EMA 0.999": replace(BEST, ema=0.999),
    "best, Multi-TopK": replace(BEST, multi=4),
    "best, layer norm": replace(BEST, normalize="layer_norm"),
    "best, touched rows": replace(BEST, adam="touched"),
}


def main() -> None:
    """Read the arguments and run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="*", type=Path, help="output folders of `olmoscope collect`")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    parser.add_argument("--layers", nargs="*", type=int, default=[1, 3, 5, 7])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of the stream, from its start")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what there is")
    arguments = parser.parse_args()
    if not arguments.table:
        jobs = [{"setting": setting, "model": out.name, "layer": layer, "seed": seed, "d_sae": arguments.d_sae,
                 "k": arguments.k, "tokens": arguments.tokens, "out": str(out)}
                for seed, setting, out, layer in product(arguments.seeds, arguments.settings, arguments.out,
                                                         arguments.layers)]
        run_all(jobs, run, arguments.results, arguments.processes)
    print(table(read_results(arguments.results)))


def run(job: Job) -> dict[str, Any]:
    """Train and measure one SAE."""
    levers, layer = SETTINGS[job["setting"]], job["layer"]
    firings = job["d_sae"] / 4096 * 32 / job["k"]  # the window is for 4096 latents and k 32
    levers = replace(levers, aux_window=round(levers.aux_window * firings))
    training, held_out = stores(Path(job["out"]))
    rounds = StoreRounds(training, [Site(layer)], levers.order, job["seed"],  # type: ignore[arg-type]
                         keep_of_store(Filter(), training, []))
    mean_D = rounds.sample_mean(Site(layer), levers.normalize)  # type: ignore[arg-type]
    sae = initialize(len(mean_D), job["d_sae"], job["k"], levers.normalize,  # type: ignore[arg-type]
                     mean_D, job["seed"], tied=levers.weights == "tied")
    if levers.init == "data":
        _start_from_data(sae, training, layer, job["seed"])
    if levers.weights == "untied":
        sae.W_enc.mul_(levers.encoder_scale)
    started = time.process_time()
    with contextlib.closing(Stream(rounds, levers.batch)) as stream:
        steps = -(-job["tokens"] // levers.batch)
        step = LeverStep(sae, levers, steps, job["seed"])
        for _ in range(steps):
            step(stream.next_batch()[Site(layer)], step.rate())
    seconds = time.process_time() - started
    figures = measure(step.finished(), held_out, layer, HELD_OUT)
    window = min(DEAD_WINDOW, job["tokens"])
    return {"levers": asdict(levers), **figures, "dead": step.dead_share(window), "window": window,
            "seconds": round(seconds, 1)}


def _start_from_data(sae: TopK, store: Store, layer: int, seed: int) -> None:
    rows_ND = torch.cat([store.read(Site(layer), segment, slice(0, min(rows, sae.d_sae)))
                         for segment, rows in enumerate(store.segment_rows)])
    order = torch.randperm(len(rows_ND), generator=torch.Generator().manual_seed(seed))
    rows_FD = sae.center(rows_ND[order[:sae.d_sae]])[0]
    for matrix_FD in (sae.W_enc, sae.W_dec):
        matrix_FD.copy_(rows_FD / rows_FD.norm(dim=1, keepdim=True))


if __name__ == "__main__":
    main()
