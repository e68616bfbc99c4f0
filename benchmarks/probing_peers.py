"""Sparse probing by sae-probes itself, on the texts and the SAE that `olmoscope evaluate --probing` measured.

    pip download --no-deps sae-probes           # or any folder of tables: --data
    olmoscope evaluate SAE -o OUT --probing
    python benchmarks/probing_peers.py OUT/NAME SAE --peers peers/bin/python [--tables 4] [--own-rows]

OUT/NAME holds evaluation.json and probing.json; SAE is a folder in SAELens' format. The peers' environment has
sae-probes with its dependencies. It gets the tables, reduced to the texts that we used. It splits them itself, loads
the SAE with SAELens, and selects latents and trains probes with its own code (`split: its own`); then it does the same
on our split. By default it reads our model's rows as its cache of activations; with --own-rows the model runs in
TransformerLens, in float32.
"""

import argparse
import csv
import io
import json
import subprocess
import tempfile
from pathlib import Path

import torch
import zstandard

from olmoscope.evaluate.labelled import Table, read_tables
from olmoscope.evaluate.last_rows import last_rows
from olmoscope.evaluate.probing import LATENTS, PROBING, token_ids_of
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.files import read_json
from olmoscope.model.load import load_model, pick_device
from olmoscope.progress import bar
from olmoscope.recipe.schema import Model
from olmoscope.sae.io.open import open_sae
from olmoscope.tokens.tokenizer import load_tokenizer


def main() -> None:
    """Read the arguments, pass everything on, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sae", type=Path)
    parser.add_argument("--peers", type=Path, required=True, help="Python of the peers' environment")
    parser.add_argument("--data", type=Path, help="as --probing-data")
    parser.add_argument("--tables", type=int, help="use only this many tables, the first ones")
    parser.add_argument("--own-rows", action="store_true")
    arguments = parser.parse_args()
    evaluation, kept = read_evaluation(arguments.folder / EVALUATION), read_json(arguments.folder / PROBING)["tables"]
    assert evaluation.probing is not None
    names = evaluation.probing.tables[: arguments.tables]
    tables = read_tables(arguments.data, ",".join(names)).tables
    hook = evaluation.site.transformer_lens
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_tables(work / "data", tables)
        if not arguments.own_rows:
            write_rows(work / "cache" / "model_activations_model", tables, arguments.sae, evaluation.model,
                       evaluation.model_dtype, hook)
        wanted = {"work": str(work), "sae": str(arguments.sae), "hook": hook, "ks": LATENTS, "model": evaluation.model,
                  "tables": {name: kept[name]["train"] for name in names}}
        done = subprocess.run([arguments.peers, Path(__file__).with_name("probing_peer.py"), json.dumps(wanted)],
                              check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{evaluation.sae}, {len(names)} tables, mean AUC (accuracy)\n")
    print("| | " + " | ".join(f"k {k}" for k in LATENTS) + " | activations |\n|---|" + "--:|" * (len(LATENTS) + 1))
    ours = {str(k): [kept[name]["k"][str(k)] for name in names] for k in LATENTS}
    ours["activations"] = [kept[name]["activations"] for name in names]
    for who, figures in {"olmoscope": ours, **found}.items():
        cells = [f"{sum(one['auc'] for one in each) / len(each):.4f} "
                 f"({sum(one['accuracy'] for one in each) / len(each):.4f})" for each in figures.values()]
        print(f"| {who} | " + " | ".join(cells) + " |")
    same = sum(one["latents"] == two["latents"] for one, two in zip(ours["16"], found["our split, l2"]["16"],
                                                                     strict=True))
    print(f"\nThe same 16 latents on the same split: {same} of {len(names)} tables")


def write_tables(folder: Path, tables: list[Table]) -> None:
    """Write tables in the form of sae-probes' package, with our training texts first."""
    (folder / "cleaned_data").mkdir(parents=True)
    index = [("Dataset Tag", "Dataset save name", "Data type")]
    for table in tables:
        rows = [(table.texts[row], int(table.labels[row])) for part in table.split() for row in part]
        _write_csv(folder / "cleaned_data" / f"{table.name}.csv.zst", [("prompt", "target"), *rows])
        index.append((table.name.partition("_")[2], f"cleaned_data/{table.name}.csv", "Binary Classification"))
    _write_csv(folder / "probing_datasets_MASTER.csv.zst", index)


def _write_csv(path: Path, rows: list[tuple[str, ...]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    path.write_bytes(zstandard.compress(text.getvalue().encode()))


def write_rows(folder: Path, tables: list[Table], sae: Path, model: str, dtype: str | None, hook: str) -> None:
    """Write our rows of the texts in the form of sae-probes' cache."""
    folder.mkdir(parents=True)
    subject = open_sae(sae)
    wanted = Model(name=model, dtype=dtype or "auto")
    loaded = load_model(wanted, subject.reads, pick_device("auto"))
    tokenizer = load_tokenizer(wanted, subject.bos)
    for table in tables:
        ids = token_ids_of(tokenizer, table, [row for part in table.split() for row in part])
        with bar(table.name[:40], sum(map(len, ids)), "tokens") as advance:
            torch.save(last_rows(loaded, ids, 16384, advance)[subject.site].cpu(), folder / f"{table.name}_{hook}.pt")


if __name__ == "__main__":
    main()
