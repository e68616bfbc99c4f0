"""How good our SAEs are beside others': same activations, same batches, same evaluation. Results: docs/recipes.md.

    OMP_NUM_THREADS=1 python benchmarks/quality.py tiny qwen3 --peers peers/bin/python

Folders are made as for recipes.py, the peers' environment as for train_step.py. Compared are the forms of
benchmarks/quality.yaml, trained by the package itself, and the TopK trainers of SAELens, dictionary_learning and
sparsify (signum, its default, and Adam), each at its own settings and at the rates in `RATES`: the best of them counts.
Everybody gets the rows of the default form's stream: same rows, order, batch, latents, k and tokens. Peers' weights are
untied, as the default form's are. A result is a line of benchmarks/results/quality.jsonl and is not made again.
"""

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from olmoscope.activations.stream.batches import Stream
from olmoscope.recipe.schema import Recipe
from olmoscope.sae.topk import TopK
from olmoscope.site import Site
from olmoscope.train.derived import batch_of
from study import Job, measure, read_results, recipe_of, rounds_of, run_all, stores, table, train

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
PEERS = ("saelens", "dictionary_learning", "sparsify", "sparsify_adam")
RATES = ("own", "1e-3", "2e-3", "4e-3")


def main() -> None:
    """Read the arguments and run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="*", type=Path, help="output folders of `olmoscope collect`")
    parser.add_argument("--forms", nargs="*", default=["reference", "default"])
    parser.add_argument("--peers", type=Path, help="Python of the peers' environment")
    parser.add_argument("--only", nargs="*", default=list(PEERS), choices=PEERS, help="peers")
    parser.add_argument("--rates", nargs="*", default=list(RATES), help="own: the trainer's")
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
        settings = [{"setting": form} for form in arguments.forms]
        if arguments.peers:
            rates = [None if rate == "own" else float(rate) for rate in arguments.rates]
            settings += [{"setting": f"{peer}, {'own rate' if lr is None else f'lr {lr:g}'}", "peer": peer, "lr": lr,
                          "python": str(arguments.peers)} for peer, lr in product(arguments.only, rates)]
        jobs = [setting | {"model": out.name, "layer": layer, "seed": seed, "d_sae": arguments.d_sae,
                           "k": arguments.k, "tokens": arguments.tokens, "out": str(out)}
                for seed, setting, out, layer in product(arguments.seeds, settings, arguments.out, arguments.layers)]
        run_all(jobs, run, arguments.results, arguments.processes)
    print(table(read_results(arguments.results)))


def run(job: Job) -> dict[str, Any]:
    """Train and measure one SAE."""
    started = time.process_time()
    sae = train_peer(job) if "peer" in job else train(_recipe(job, job["setting"]), Path(job["out"]))
    seconds = time.process_time() - started
    held_out = stores(Path(job["out"]))[1]
    return {**measure(sae, held_out, job["layer"]), "seconds": round(seconds, 1)}


def train_peer(job: Job) -> TopK:
    """By another trainer, on the rows of the default form's stream."""
    recipe = _recipe(job, "default")
    with contextlib.closing(Stream(rounds_of(recipe, Path(job["out"])), batch_of(recipe, recipe.train))) as stream:
        steps = -(-job["tokens"] // batch_of(recipe, recipe.train))
        rows_ND = torch.cat([stream.next_batch()[Site(job["layer"])].clone() for _ in range(steps)])
    settings = {name: job[name] for name in ("peer", "d_sae", "k", "lr", "seed")}
    settings["batch"] = batch_of(recipe, recipe.train)
    with tempfile.TemporaryDirectory() as folder:
        rows, weights = Path(folder) / "rows.safetensors", Path(folder) / "weights.safetensors"
        save_file({"rows": rows_ND}, rows)
        script = Path(__file__).parent / "quality_peers.py"
        subprocess.run([job["python"], script, rows, weights, json.dumps(settings)], check=True,
                       stderr=subprocess.DEVNULL, env=os.environ | {"SPARSIFY_DISABLE_TRITON": "1"})
        found = load_file(weights)
    return TopK(found["W_enc"], found["W_dec"], found["b_pre"], "none", found["b_latent"], job["k"])


def _recipe(job: Job, form: str) -> Recipe:
    """The form `default` is untied, the others tied."""
    return recipe_of(job, form, weights="untied" if form == "default" else "tied")


if __name__ == "__main__":
    main()
