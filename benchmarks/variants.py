"""The frontier of error against sparsity: every variant of an SAE on the same batches. Results: docs/recipes.md.

    OMP_NUM_THREADS=1 python benchmarks/variants.py tiny [--layers 3 7]

`tiny` is an output folder of `olmoscope collect`. All SAEs of a layer and seed are trained on one read of its training
rows, by the package's own step, and measured on the same held-out rows by the package's own figures. What is compared
is in `VARIANTS`; all have the same latents, tokens, batch, rate and auxiliary loss. A result is a line of
benchmarks/results/variants.jsonl and is not made again.
"""

import argparse
import contextlib
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.filters import keep_of_store
from olmoscope.activations.rounds import StoreRounds
from olmoscope.activations.store import Store, open_store
from olmoscope.activations.stream import Stream
from olmoscope.evaluate.reconstruction import Reconstruction
from olmoscope.evaluate.rows import LayerSurvey, RowFacts
from olmoscope.recipe import Filter
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.interface import SparseAutoencoder
from olmoscope.sae.topk import initialize
from olmoscope.train.adam import Adam
from olmoscope.train.checkpoint import load_sae, save_checkpoint
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.step import Step

RESULTS = Path(__file__).parent / "results" / "variants.jsonl"
ROWS_AT_ONCE = 4096
VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"activation": "topk"},
    "topk tied": {"activation": "topk", "tied": True},
    "batchtopk": {"activation": "batchtopk"},
    "matryoshka batchtopk": {"activation": "batchtopk", "matryoshka": (1 / 16, 1 / 4)},
    "jumprelu": {"activation": "jumprelu"},
    "groupmax": {"activation": "groupmax"},
}
"""Untied where nothing else is said."""
USUAL_SLOPE = -0.55
"""Of log FVU by log L0, between k 16 and 64 here: for a frontier of one point."""
Key = tuple[str, int, int, int, int, int]
"""variant, layer, k, seed, d_sae, tokens"""


def main() -> None:
    """Read the arguments, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="output folder of `olmoscope collect`; none: only the table")
    parser.add_argument("--layers", nargs="*", type=int, default=[3, 7])
    parser.add_argument("--ks", nargs="*", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="the first for every k, others for 32")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--held-out", type=int, default=65_536)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.8)
    parser.add_argument("--dead-window", type=int, default=20_000, help="of the auxiliary loss")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.out:
        done = {key_of(result) for result in read_results(arguments.results)}
        for seed, layer in product(arguments.seeds, arguments.layers):
            ks = arguments.ks if seed == arguments.seeds[0] else [k for k in arguments.ks if k == 32]
            missing = [(variant, k) for k, variant in product(ks, arguments.variants)
                       if (variant, layer, k, seed, arguments.d_sae, arguments.tokens) not in done]
            if missing:
                run(arguments, layer, seed, missing)
    print(table(read_results(arguments.results)))


def run(arguments: argparse.Namespace, layer: int, seed: int, missing: list[tuple[str, int]]) -> None:
    """Train and measure the variants of a layer and seed, on the same batches."""
    train, held_out = (open_store(arguments.out / "store" / split) for split in ("train", "held_out"))
    rounds = StoreRounds(train, [layer], "shuffled", seed, keep_of_store(Filter(), train))
    mean_D = rounds.sample_mean(layer, "none")
    steps_of = {one: fresh(arguments, *one, mean_D, seed) for one in missing}
    seconds = dict.fromkeys(missing, 0.0)
    stream = Stream(rounds, arguments.batch)
    steps = min(stream.batches, arguments.tokens // arguments.batch)
    with contextlib.closing(stream):
        for number in range(steps):
            x_BD = stream.next_batch()[layer].float()
            lr = arguments.lr * min(1.0, (steps - number) / (arguments.decay * steps))
            for one, step in steps_of.items():
                started = time.process_time()
                step(x_BD, lr)
                seconds[one] += time.process_time() - started
    for (variant, k), step in steps_of.items():
        sums = step.take_sums()
        line = {"variant": variant, "layer": layer, "k": k, "seed": seed, "d_sae": arguments.d_sae,
                "tokens": arguments.tokens, **measure(trained(step, arguments.results), held_out, layer,
                                                      arguments.held_out),
                "capped_share": sums.capped / (steps * arguments.batch), "seconds": round(seconds[variant, k], 1)}
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with arguments.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def fresh(arguments: argparse.Namespace, variant: str, k: int, mean_D: Tensor, seed: int) -> Step:
    """A variant before its first step."""
    settings = dict(VARIANTS[variant])
    sae = initialize(len(mean_D), arguments.d_sae, k, "none", mean_D, seed, tied=settings.pop("tied", False))
    return Step(sae, Adam((0.9, 0.999), 1e-8), SettledAuxiliary(k=32, dead_window=arguments.dead_window), **settings)


def trained(step: Step, results: Path) -> SparseAutoencoder:
    """The SAE as a run would leave it: of its checkpoint."""
    path = results.with_suffix(".checkpoint.safetensors")
    save_checkpoint(path, step, {})
    sae = load_sae(path)
    path.unlink()
    assert isinstance(sae, GroupMax) == (step.activation == "groupmax")
    return sae


def measure(sae: SparseAutoencoder, held_out: Store, layer: int, most: int) -> dict[str, Any]:
    """The package's figures on the first `most` held-out rows (rows of a segment are in random order)."""
    parts, left = [], most
    for segment, rows in enumerate(held_out.segment_rows):
        parts.append(held_out.read(layer, segment, slice(0, min(rows, left))))
        left -= len(parts[-1])
        if not left:
            break
    x_ND = torch.cat(parts).float()
    norms_N = x_ND.double().norm(dim=1).numpy()
    measured = Reconstruction(sae, LayerSurvey.of(x_ND.double().mean(0), np.asarray(norms_N)), 1)
    for x_BD in x_ND.split(ROWS_AT_ONCE):
        zeros = torch.zeros(len(x_BD), dtype=torch.int64)
        measured.add(x_BD, RowFacts(zeros, zeros, zeros.bool(), zeros))
    figures, distributions = measured.subset("all"), measured.distributions()
    assert figures is not None
    return {"fvu": figures["fvu"], "nmse": figures["nmse"], "l0": figures["l0"], "dead": distributions["dead"].share,
            "l0_p5": distributions["l0"].p5, "l0_p95": distributions["l0"].p95, "rows": figures["rows"]}


def read_results(path: Path) -> list[dict[str, Any]]:
    """All results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(result: dict[str, Any]) -> Key:
    """What decides a result."""
    return (result["variant"], result["layer"], result["k"], result["seed"], result["d_sae"], result["tokens"])


def at_l0(frontier: dict[float, float], l0: float) -> float:
    """FVU of a frontier (by L0) at an L0: a power law between its points, and beyond the outermost."""
    l0s, fvus = (np.log(np.array(list(values))) for values in zip(*sorted(frontier.items()), strict=True))
    if len(l0s) == 1:
        return float(np.exp(fvus[0]) * (l0 / np.exp(l0s[0])) ** USUAL_SLOPE)
    place = int(np.clip(np.searchsorted(l0s, np.log(l0)), 1, len(l0s) - 1))
    slope = (fvus[place] - fvus[place - 1]) / (l0s[place] - l0s[place - 1])
    return float(np.exp(fvus[place] + slope * (np.log(l0) - l0s[place])))


def table(results: list[dict[str, Any]]) -> str:
    """Of each layer and size: FVU (L0) by k for the first seed, and how far it is off TopK's frontier at the same L0;
    at k = 32 means over seeds, and the spread of NMSE, (largest - smallest) / mean."""
    lines = []
    for layer, d_sae, tokens in sorted({(result["layer"], result["d_sae"], result["tokens"]) for result in results}):
        here = [result for result in results if (result["layer"], result["d_sae"], result["tokens"]) ==
                (layer, d_sae, tokens)]
        ks = sorted({result["k"] for result in here})
        lines += [f"\nLayer {layer}, {d_sae} latents, {tokens:,} tokens\n",
                  "| variant | " + " | ".join(f"k = {k}" for k in ks) + " | NMSE | spread | dead | CPU s |",
                  "|---|" + "--:|" * (len(ks) + 4)]
        frontier = {result["l0"]: result["fvu"] for result in here
                    if result["variant"] == "topk" and result["seed"] == 0}
        for variant in VARIANTS:
            mine = [result for result in here if result["variant"] == variant]
            first = {result["k"]: result for result in mine if result["seed"] == 0}
            cells = [cell(first[k], frontier) if k in first else "" for k in ks]
            if same_k := [result for result in mine if result["k"] == 32]:
                nmse = [result["nmse"] for result in same_k]
                spread = f"{(max(nmse) - min(nmse)) / np.mean(nmse):.1%}" if len(nmse) > 1 else ""
                dead, seconds = (np.mean([result[name] for result in same_k]) for name in ("dead", "seconds"))
                cells += [f"{np.mean(nmse):.4f}", spread, f"{dead:.1%}", f"{seconds:.0f}"]
            if mine:
                lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(result: dict[str, Any], frontier: dict[float, float]) -> str:
    """FVU (L0), and how much that is over TopK's at this L0."""
    text = f"{result['fvu']:.4f} ({result['l0']:.1f})"
    if result["variant"] == "topk" or not frontier:
        return text
    return f"{text} {result['fvu'] / at_l0(frontier, result['l0']) - 1:+.1%}"


if __name__ == "__main__":
    main()
