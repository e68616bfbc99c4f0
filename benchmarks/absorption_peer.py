"""SAEBench's absorption on rows that absorption_peers.py wrote; that script starts it with the peers' Python.

    PYTHON absorption_peer.py '{"rows": ..., "sae": ..., "train": ..., "split": [[...], ...]}'

A stand-in for its language model gives the row of each word. The last line of the output is JSON: for each way of
measuring, by letter, `fraction`, `full`, `split`, `probe_f1`. It imports nothing from Olmoscope.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sae_bench.evals.absorption.feature_absorption import (
    StatsAndLikelyFalseNegativeResults,
    calculate_projection_and_cos_sims,
    get_stats_and_likely_false_negative_tokens,
)
from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
from sae_bench.evals.absorption.k_sparse_probing import (
    add_feature_splits_to_metrics_df,
    build_metrics_df,
    eval_probe_and_sae_k_sparse_raw_scores,
    get_sparse_probing_raw_results_filename,
    sae_k_sparse_metadata,
    train_k_sparse_probes,
)
from sae_bench.evals.absorption.probing import LinearProbe, train_multi_probe
from sae_bench.evals.absorption.vocab import LETTERS
from sae_lens import SAE
from safetensors.torch import load_file

wanted = json.loads(sys.argv[1])
MOST, LAYER, NAME = 10, 0, "sae"
HOOK = f"blocks.{LAYER}.hook_resid_post"


class Rows:
    """Gives the rows of words, which are named `w0`, `w1`, ... at the end of a prompt."""

    tokenizer = "none"

    def __init__(self, x_ND: torch.Tensor) -> None:
        self.x_ND = x_ND

    def run_with_cache(self, prompts: list[str], names_filter: list[str]) -> tuple[None, dict[str, torch.Tensor]]:
        return None, {HOOK: self.x_ND[[int(prompt.strip()[1:]) for prompt in prompts]][:, None]}

    def to_tokens(self, prompt: str) -> torch.Tensor:
        return torch.zeros(1, 1)


def main() -> None:
    """Print figures with SAEBench's own probes and latents, and with ours."""
    torch.manual_seed(0)
    given = load_file(wanted["rows"])
    x_ND, letters, train = given["rows"].float(), given["letters"].tolist(), wanted["train"]
    sae = SAE.load_from_disk(wanted["sae"], device="cpu")
    words = [(f"w{row}", letter) for row, letter in enumerate(letters)]
    calculator = FeatureAbsorptionCalculator(model=Rows(x_ND), icl_word_list=[], max_icl_examples=0,
                                             base_template="{word}", word_token_pos=-1, batch_size=64)
    y_NL = torch.nn.functional.one_hot(given["letters"][:train], len(LETTERS))
    probe = train_multi_probe(x_ND[:train].clone(), y_NL, batch_size=64, num_epochs=50, lr=1e-2, weight_decay=1e-4,
                              device=torch.device("cpu"), show_progress=False)
    # Ten batches per epoch, as with batches of 4096 words from a whole vocabulary, so that Adam takes as many steps.
    sparse = train_k_sparse_probes(sae, words[:train], x_ND[:train], ks=list(range(1, MOST + 1)),
                                   batch_size=-(-train // 10), precalc_sae_acts=True)
    with torch.no_grad():
        scores = eval_probe_and_sae_k_sparse_raw_scores(sae, probe, sparse, words[train:], x_ND[train:], 512)
        metrics = build_metrics_df(scores, sae_k_sparse_metadata(sae, probe, sparse, NAME, LAYER), MOST)
    add_feature_splits_to_metrics_df(metrics, MOST)
    with tempfile.TemporaryDirectory() as folder:
        scores.to_parquet(Path(folder) / get_sparse_probing_raw_results_filename(NAME, LAYER))
        stats = get_stats_and_likely_false_negative_tokens(metrics, NAME, LAYER, Path(folder))
    probe_f1 = dict(zip(metrics["letter"], metrics["f1_probe"], strict=True))
    found = {"SAEBench": by_letter(calculator, sae, probe, stats, probe_f1)}
    ours = LinearProbe(x_ND.shape[1], len(LETTERS))
    with torch.no_grad():
        ours.fc.weight.copy_(given["directions"])
        recognised_NL = x_ND.double() @ given["directions"].T + given["offsets"] > 0
    stats = {}
    for number, split in enumerate(wanted["split"]):
        rows = [row for row in range(train, len(words)) if letters[row] == number and recognised_NL[row, number]]
        if split and rows:
            names = [f"w{row}" for row in rows]
            stats[LETTERS[number]] = StatsAndLikelyFalseNegativeResults(len(rows), 0, split, names)
    found["SAEBench, our probes and latents"] = by_letter(calculator, sae, ours, stats, dict.fromkeys(stats, 1.0))
    sys.__stdout__.write("\n" + json.dumps(found) + "\n")


def by_letter(calculator: FeatureAbsorptionCalculator, sae: Any, probe: LinearProbe,
              stats: dict[str, StatsAndLikelyFalseNegativeResults], probe_f1: dict[str, float]) -> dict[str, Any]:
    """SAEBench's figures for the letters that its ground-truth probe knows."""
    words = calculate_projection_and_cos_sims(
        calculator, sae, probe, LAYER, {letter: one for letter, one in stats.items() if one.potential_false_negatives})
    found = {}
    for letter, lines in words.groupby("letter"):
        if probe_f1[letter] > 0.6:
            positives = int(lines["num_probe_true_positives"].iloc[0])
            found[letter] = {"fraction": float(lines["absorption_fraction"].sum()) / positives,
                             "full": int(lines["is_full_absorption"].sum()) / positives,
                             "split": [int(latent) for latent in lines["split_feats"].iloc[0]],
                             "probe_f1": float(probe_f1[letter])}
    return found


with contextlib.redirect_stdout(sys.stderr):
    main()
