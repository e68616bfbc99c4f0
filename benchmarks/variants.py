"""The frontier of error against sparsity: every variant of an SAE on the same batches. Results: docs/recipes.md.

    OMP_NUM_THREADS=1 python benchmarks/variants.py tiny qwen3 [--layers 3 7]

Folders are made as for recipes.py. Every variant is trained by the package itself, from the same rows in the same
order, with what it derives from width, k and tokens, and measured on the same held-out rows. A result is a line of
benchmarks/results/variants.jsonl and is not made again.
"""

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from study import Job, measure, read_results, recipe_of, run_all, stores, train

RESULTS = Path(__file__).parent / "results" / "variants.jsonl"
VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"activation": "topk"},
    "topk tied": {"activation": "topk", "weights": "tied"},
    "batchtopk": {"activation": "batchtopk"},
    "matryoshka batchtopk": {"activation": "batchtopk", "matryoshka": [1 / 16, 1 / 4]},
    "jumprelu": {"activation": "jumprelu"},
    "groupmax": {"activation": "groupmax"},
}
"""Untied where nothing else is said."""
K = 32
"""The k that every seed is run for."""
HELD_OUT = 65_536
"""Rows measured."""
USUAL_SLOPE = -0.55
"""Of log FVU by log L0, between k 16 and 64 here: for a frontier of one point."""


def main() -> None:
    """Read the arguments, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="*", type=Path, help="output folders of `olmoscope collect`; none: only the table")
    parser.add_argument("--layers", nargs="*", type=int, default=[3, 7])
    parser.add_argument("--ks", nargs="*", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help=f"others than the first for k {K}")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    jobs = [{"setting": variant, "model": out.name, "layer": layer, "seed": seed, "d_sae": arguments.d_sae, "k": k,
             "tokens": arguments.tokens, "out": str(out)}
            for seed, k, out, layer, variant in product(arguments.seeds, arguments.ks, arguments.out, arguments.layers,
                                                        arguments.variants)
            if k == K or seed == arguments.seeds[0]]
    run_all(jobs, run, arguments.results, arguments.processes)
    print(table(read_results(arguments.results)))


def run(job: Job) -> dict[str, Any]:
    """Train and measure one SAE."""
    started = time.process_time()
    sae = train(recipe_of(job, "default", **{"weights": "untied"} | VARIANTS[job["setting"]]), Path(job["out"]))
    seconds = time.process_time() - started
    return {**measure(sae, stores(Path(job["out"]))[1], job["layer"], HELD_OUT), "seconds": round(seconds, 1)}


def at_l0(frontier: dict[float, float], l0: float) -> float:
    """FVU of a frontier (by L0) at an L0: a power law between its points, and beyond the outermost."""
    l0s, fvus = (np.log(np.array(list(values))) for values in zip(*sorted(frontier.items()), strict=True))
    if len(l0s) == 1:
        return float(np.exp(fvus[0]) * (l0 / np.exp(l0s[0])) ** USUAL_SLOPE)
    place = int(np.clip(np.searchsorted(l0s, np.log(l0)), 1, len(l0s) - 1))
    slope = (fvus[place] - fvus[place - 1]) / (l0s[place] - l0s[place - 1])
    return float(np.exp(fvus[place] + slope * (np.log(l0) - l0s[place])))


def table(results: list[dict[str, Any]]) -> str:
    """Of each model, layer and size: FVU (L0) by k for seed 0, and how far it is off TopK's frontier at the same L0; at
    k = 32 means over seeds, and the spread of NMSE, (largest - smallest) / mean."""
    lines = []
    names = ("model", "layer", "d_sae", "tokens")
    for key in sorted({tuple(result[name] for name in names) for result in results}):
        here = [result for result in results if tuple(result[name] for name in names) == key]
        ks = sorted({result["k"] for result in here})
        lines += ["\n**{}, layer {}, {} latents, {:,} tokens**\n".format(*key),
                  "| variant | " + " | ".join(f"k = {k}" for k in ks) + " | NMSE | spread | dead | CPU s |",
                  "|---|" + "--:|" * (len(ks) + 4)]
        frontier = {result["l0"]: result["fvu"] for result in here
                    if result["setting"] == "topk" and result["seed"] == 0}
        for variant in VARIANTS:
            mine = [result for result in here if result["setting"] == variant]
            first = {result["k"]: result for result in mine if result["seed"] == 0}
            cells = [cell(first[k], frontier) if k in first else "" for k in ks]
            if same_k := [result for result in mine if result["k"] == K]:
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
    if result["setting"] == "topk" or not frontier:
        return text
    return f"{text} {result['fvu'] / at_l0(frontier, result['l0']) - 1:+.1%}"


if __name__ == "__main__":
    main()
