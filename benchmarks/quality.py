"""Other trainers' SAEs compared with ours: on the rows of one of our runs, with the same evaluation.

    python benchmarks/quality.py OUT RUN [RUN ...] --peers peers/bin/python [--rates own 1e-3 4e-3]

OUT is an output folder with its stores (`olmoscope collect`, `train`, `evaluate`; recipes/quality.yaml is one for the
tiny model, recipes/smollm2-sites.yaml for a real one), RUN a finished run in it: an SAE of one site. The peers'
environment is that of train_step.py. Each trainer of quality_peers.py gets the run's training rows, in the same order
and batches, with the run's width, k and seed, with the trainer's own settings and each rate. Results are in
OUT/peers/RUN/NAME.json and are made only once; the first line of the table is the run itself.
"""

import argparse
import json
import os
import subprocess
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

from safetensors.torch import load_file, save_file

from olmoscope.evaluate.results import write_evaluation
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.topk import TopK
from olmoscope.train.derived import settled
from runs_of import evaluate, recipe_and_coder, rows_of, table

PEERS = ("saelens", "dictionary_learning", "sparsify", "sparsify_adam")


def main() -> None:
    """Read the arguments, train and measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", help="ids of SAEs")
    parser.add_argument("--peers", type=Path, help="Python of the peers' environment; without: only the table")
    parser.add_argument("--only", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rates", nargs="*", default=["own"], help="own: the trainer's")
    arguments = parser.parse_args()
    for run in arguments.runs:
        folder = arguments.out / "peers" / run
        if arguments.peers:
            measure_missing(arguments.out, run, folder, arguments.peers, list(product(arguments.only, arguments.rates)))
        print(table(arguments.out, run, folder))


def measure_missing(out: Path, run: str, folder: Path, python: Path, settings: list[tuple[str, str]]) -> None:
    """Train and evaluate the peers with which a run has not been compared yet."""
    missing = [(peer, rate) for peer, rate in settings if not (folder / f"{peer}, rate {rate}.json").exists()]
    if not missing:
        return
    recipe, spec = recipe_and_coder(out, run)
    rows_ND, batch = rows_of(out, run)
    ours = open_sae(out / "runs" / run)
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.safetensors"
        save_file({"rows": rows_ND}, rows)
        for peer, rate in missing:
            wanted = {"peer": peer, "d_sae": spec.d_sae, "k": spec.k, "lr": None if rate == "own" else float(rate),
                      "seed": settled(recipe, spec).seed, "batch": batch}
            weights = Path(scratch) / "weights.safetensors"
            subprocess.run([python, Path(__file__).with_name("quality_peers.py"), rows, weights, json.dumps(wanted)],
                           check=True, stderr=subprocess.DEVNULL, env=os.environ | {"SPARSIFY_DISABLE_TRITON": "1"})
            found = load_file(weights)
            sae = TopK(found["W_enc"], found["W_dec"], found["b_pre"], "none", b_latent=found["b_latent"],
                       k=spec.k).at(ours.reads)
            name = f"{peer}, rate {rate}"
            evaluation = evaluate(out, replace(ours, sae=sae, name=name, identity=name))
            write_evaluation(folder / f"{name}.json", evaluation)
            print(f"{run}: {name}: NMSE {evaluation.usual.nmse:.4f}", flush=True)


if __name__ == "__main__":
    main()
