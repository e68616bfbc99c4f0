"""Other trainers' SAEs of the real model, on the rows of one of our runs and by the same evaluation.

    python benchmarks/real_model_peers.py OUT RUN [RUN ...] --peers peers/bin/python [--rates own 1e-3 4e-3]

OUT is an output folder of recipes/smollm2-sites.yaml (or any other) with its stores, RUN a finished run in it. The
peers' environment is that of train_step.py. Each trainer of quality_peers.py gets the rows that the run was trained on,
in its order and batches, with its width and k, at its own settings and at each rate. Results are
OUT/peers/RUN/NAME.json, made once; the table has the run itself first.
"""

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from olmoscope.activations.store.reader import open_store
from olmoscope.activations.stream.batches import Stream
from olmoscope.activations.stream.filters import keep_of_store
from olmoscope.activations.stream.rounds import StoreRounds
from olmoscope.evaluate.evaluate import Setting, evaluate_on_store
from olmoscope.evaluate.results import EVALUATION, Evaluation, read_evaluation, write_evaluation
from olmoscope.evaluate.sequences import read_sequences
from olmoscope.model.load import pick_device
from olmoscope.model.splice import load_causal_lm
from olmoscope.model_source import at_revision
from olmoscope.pipeline import store_folder
from olmoscope.recipe.load import load_recipe
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.topk import TopK
from olmoscope.tokens.tokenizer import load_tokenizer
from olmoscope.train.derived import settled

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
        if arguments.peers:
            measure_missing(arguments.out, run, arguments.peers, list(product(arguments.only, arguments.rates)))
        print(table(arguments.out, run))


def measure_missing(out: Path, run: str, python: Path, settings: list[tuple[str, str]]) -> None:
    """Train and evaluate the peers that a run has not been compared with yet."""
    folder = out / "peers" / run
    missing = [(peer, rate) for peer, rate in settings if not (folder / f"{peer}, rate {rate}.json").exists()]
    if not missing:
        return
    rows_ND, batch = rows_of(out, run)
    ours = open_sae(out / "runs" / run)
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.safetensors"
        save_file({"rows": rows_ND}, rows)
        for peer, rate in missing:
            wanted = {"peer": peer, "d_sae": ours.sae.d_sae, "k": 32 if not isinstance(ours.sae, TopK) else ours.sae.k,
                      "lr": None if rate == "own" else float(rate), "seed": 0, "batch": batch}
            weights = Path(scratch) / "weights.safetensors"
            subprocess.run([python, Path(__file__).with_name("quality_peers.py"), rows, weights, json.dumps(wanted)],
                           check=True, stderr=subprocess.DEVNULL, env=os.environ | {"SPARSIFY_DISABLE_TRITON": "1"})
            found = load_file(weights)
            sae = TopK(found["W_enc"], found["W_dec"], found["b_pre"], "none", b_latent=found["b_latent"],
                       k=wanted["k"]).at(ours.reads)
            name = f"{peer}, rate {rate}"
            evaluation = evaluate(out, replace(ours, sae=sae, name=name, identity=name))
            write_evaluation(folder / f"{name}.json", evaluation)
            print(f"{run}: {name}: NMSE {evaluation.usual.nmse:.4f}", flush=True)


def rows_of(out: Path, run: str) -> tuple[torch.Tensor, int]:
    """The rows that a run was trained on, in its order, `[N, D]`, and those of a batch."""
    recipe = load_recipe(str(out / "runs" / run / "recipe.yaml"))
    spec = next(sae for sae in recipe.saes if sae.id == run)
    train, store = settled(recipe, spec), open_store(store_folder(out, "train"))
    rounds = StoreRounds(store, [spec.site], train.order, recipe.seed, keep_of_store(train.filter, store, spec.sites))
    with contextlib.closing(Stream(rounds, train.batch, 1)) as stream:
        steps = -(-rounds.kept.rows // train.batch)
        return torch.cat([stream.next_batch()[spec.site].clone() for _ in range(steps)]), train.batch


def evaluate(out: Path, subject: Any) -> Evaluation:
    """As `olmoscope evaluate OUT` measures its own runs."""
    recipe, store = load_recipe(str(out / "recipe.yaml")), open_store(store_folder(out, "held_out"))
    model = at_revision(recipe.model, store.manifest.model.revision)
    tokenizer = load_tokenizer(model, recipe.tokens.bos)
    sequences = read_sequences(store.path, tokenizer, apart=recipe.tokens.documents == "apart", stored=tokenizer.begin)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(sequences, recipe.evaluate.tokens, recipe.tokens.batch_tokens, f"{recipe.name}, held out",
                          recipe.model.dtype, Path(folder), store.manifest.recipe_hash)
        loaded = load_causal_lm(model, pick_device("auto"), subject.reads)
        return evaluate_on_store([subject], store, loaded, setting)[0]


def table(out: Path, run: str) -> str:
    """The run and its peers, in Markdown."""
    paths = [out / "runs" / run / EVALUATION, *sorted((out / "peers" / run).glob("*.json"))]
    lines = [f"\n**{run}**\n", "| | NMSE | FVU | L0 | dead | ΔCE | ΔCE, outliers kept | KL |", "|---|" + "--:|" * 7]
    for path in paths:
        one = read_evaluation(path)
        name = "olmoscope" if path == paths[0] else path.stem
        language = one.language
        lines.append(f"| {name} | {one.usual.nmse:.4f} | {one.usual.fvu:.3f} | {one.l0.mean:.1f} "
                     f"| {one.dead.share:.1%} | {language.delta_ce:+.3f} | {language.delta_ce_outliers_kept:+.3f} "
                     f"| {language.kl:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
