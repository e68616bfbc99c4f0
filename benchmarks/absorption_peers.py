"""Feature absorption by SAEBench's own code, on the rows, words and SAE of `olmoscope evaluate --absorption`.

    python benchmarks/absorption_peers.py SAE --model MODEL --peers peers/bin/python [--rows FILE] [--words 250]

SAE is a folder in SAELens' format, for a residual stream. The peers' environment has sae-bench. SAEBench loads the
model from TransformerLens' list of names, so it cannot read a folder by itself; here it gets the words' rows from our
model. With its own code it trains ground-truth and k-sparse probes, chooses each letter's latents and measures
absorption. Then it repeats the last step with our probes and latents; these figures must equal ours. --rows keeps the
rows for another SAE of the site.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from olmoscope.evaluate import first_letter
from olmoscope.evaluate.absorption import LEAST_LETTERS, measure_absorption, truth_probes
from olmoscope.evaluate.first_letter import LETTERS, first_letter_task, rows_of_words
from olmoscope.model.load import load_model, pick_device
from olmoscope.recipe.schema import Model
from olmoscope.sae.io.open import open_sae
from olmoscope.tokens.tokenizer import load_tokenizer


def main() -> None:
    """Read the arguments, measure, pass the rows on, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--peers", type=Path, required=True, help="Python of the peers' environment")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--words", type=int, default=first_letter.WORDS, help="per letter, at most")
    arguments = parser.parse_args()
    first_letter.WORDS = arguments.words
    subject = open_sae(arguments.sae)
    model = Model(name=arguments.model, dtype=arguments.dtype)
    tokenizer = load_tokenizer(model, subject.bos)
    task = first_letter_task(tokenizer)
    if arguments.rows and arguments.rows.exists():
        x_ND = load_file(arguments.rows)["rows"]
    else:
        x_ND = rows_of_words(load_model(model, subject.reads, pick_device("auto")), task,
                             tokenizer.begin)[subject.site].cpu()
        if arguments.rows:
            save_file({"rows": x_ND}, arguments.rows)
    probes = truth_probes(x_ND, task)
    ours = measure_absorption(subject.sae, x_ND, task, probes, "")
    assert ours.fraction is not None, f"under {LEAST_LETTERS} letters are known to the model"
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.safetensors"
        save_file({"rows": x_ND, "letters": torch.tensor([word.letter for word in task.words]),
                   "directions": torch.stack([torch.zeros(x_ND.shape[1]).double() if probe is None else probe.w_P
                                              for probe in probes]),
                   "offsets": torch.stack([torch.zeros(()).double() if probe is None else probe.b
                                           for probe in probes])}, rows)
        wanted = {"rows": str(rows), "sae": str(arguments.sae), "train": task.train,
                  "split": [one.split for one in ours.letters]}
        done = subprocess.run([arguments.peers, Path(__file__).with_name("absorption_peer.py"), json.dumps(wanted)],
                              check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    mine = {one.letter: {"fraction": one.fraction, "full": one.full, "split": one.split, "probe_f1": one.probe_f1}
            for one in ours.letters if one.fraction is not None}
    print("\n| | letters | absorption fraction | full absorption | latents per letter |\n|---|--:|--:|--:|--:|")
    for who, letters in {"olmoscope": mine, **found}.items():
        means = [sum(value) / len(letters) for value in (
            [one["fraction"] for one in letters.values()], [one["full"] for one in letters.values()],
            [len(one["split"]) for one in letters.values()])]
        print(f"| {who} | {len(letters)} | {means[0]:.4f} | {means[1]:.4f} | {means[2]:.2f} |")
    own, fixed = found["SAEBench"], found["SAEBench, our probes and latents"]
    both = [letter for letter in LETTERS if letter in own and letter in mine]
    same = sum(own[one]["split"][:1] == mine[one]["split"][:1] for one in both)
    print(f"\nThe same first latent: {same} of {len(both)} letters. Largest difference of a letter's fraction with our "
          f"probes and latents: {max(abs(fixed[one]['fraction'] - mine[one]['fraction']) for one in fixed):.1e}")


if __name__ == "__main__":
    main()
