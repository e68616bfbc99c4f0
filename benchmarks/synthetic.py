"""SAEs on rows whose true features are known (SynthSAEBench, arXiv:2602.14687): ours and SAELens'.

    OMP_NUM_THREADS=1 python benchmarks/synthetic.py --json benchmarks/results/synthetic-DATE-cpu.json
    python benchmarks/synthetic.py --full --device cuda --seeds 0 --rates 3e-4 --json FILE
    python benchmarks/synthetic.py --table --json FILE

A world of SAELens' `synthetic` module draws sparse features, correlated and in a hierarchy, and sums their directions.
`--full` is the published size, drawn again by its recipe (nothing is downloaded): 16,384 features in 768 dimensions,
SAEs of 4096 latents, L0 25, 200 million rows; without it the same recipe at a sixteenth of the features.

Every trainer gets the same rows in the same order. Ours uses its own defaults. SAELens' uses each of `--rates`, with
the paper's linear decay over the last third, and with a window for dead latents of a twentieth of the steps if that is
less than the default. SAELens opens all SAEs from disk and measures them with its own evaluation on the same held-out
rows. Results that are in FILE are not made again.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
)
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from olmoscope.files import read_json, write_json
from olmoscope.provenance import provenance
from olmoscope.recipe.load import load_recipe
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.io import saelens
from olmoscope.sae.io.checkpoint import read_checkpoint
from olmoscope.train.adam import Adam
from olmoscope.train.checkpoint import save_checkpoint
from olmoscope.train.derived import rate_of, settled
from olmoscope.train.initialize import initialize
from olmoscope.train.run import learning_rate
from olmoscope.train.step import Step

sys.path.insert(0, str(Path(__file__).parent))
from common import hardware

RECIPE = Path(__file__).parent / "recipes" / "quality.yaml"
KINDS = ("topk", "batchtopk", "jumprelu", "matryoshka")
"""The last one is a BatchTopK SAE with nested losses at `PREFIXES`."""
PREFIXES = [1 / 32, 1 / 8, 1 / 2]
"""Shares of the latents: 128, 512 and 2048 of 4096."""
AT_ONCE = 2**14
"""Rows drawn together."""
IN_MEMORY = 2**31
"""Most bytes of rows to keep instead of drawing them again for each SAE."""
TRAINING, HELD_OUT = 1, 10**6
"""Seeds of the first draws of rows."""
METADATA = {"model_name": "synthetic", "hook_name": "rows", "hf_hook_name": "rows", "prepend_bos": False}
"""The metadata about the model that our writer requires."""
FIGURES = ("f1", "mcc", "uniqueness", "explained_variance", "l0", "dead")


@dataclass(frozen=True)
class Size:
    """A world and the SAEs that are trained on it."""

    features: int
    width: int
    roots: int
    """Features at the top of the hierarchy; each has 4 children, these have 4 each, and so on to depth 3."""
    latents: int
    k: int
    rows: int
    held_out: int
    batch: int
    """Batch of SAELens' trainers; our package derives its batch from the number of rows."""


SMALL = Size(1024, 96, 8, 256, 5, 2**18, 2**14, 256)
FULL = Size(16384, 768, 128, 4096, 25, 200_000_000, 2**19, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the published size, which needs a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, help="training rows, instead of the size's own number")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--rates", nargs="*", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2],
                        help="rates of SAELens' trainers")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the file of results")
    parser.add_argument("--table", action="store_true", help="only print the existing results")
    arguments = parser.parse_args()
    if not arguments.table:
        size = FULL if arguments.full else SMALL
        if arguments.rows:
            size = Size(**vars(size) | {"rows": arguments.rows})
        run_all(size, arguments.device, list(product(arguments.seeds, arguments.kinds, [None, *arguments.rates])),
                arguments.json)
    print(table(read_json(arguments.json)["results"]))


def run_all(size: Size, device: str, jobs: list[tuple[int, str, float | None]], path: Path) -> None:
    """Train and measure the SAEs that are not in the file.

    Args:
        jobs: seed, kind, and the rate of SAELens' trainer; rate None: our trainer.
    """
    kept = read_json(path) if path.exists() else {"results": []}
    results = kept["results"]
    done = {(one["seed"], one["kind"], one["lr"]) for one in results}
    missing = [job for job in jobs if job not in done]
    if not missing:
        return
    model = world(size, device)
    rows = Draws(model.sample, size.rows, size.width, TRAINING)
    held_out = Draws(model.activation_generator.sample, size.held_out, size.features, HELD_OUT)
    for seed, kind, lr in missing:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if lr is None:
                saelens.write(ours(size, kind, rows, seed), folder, METADATA)
            else:
                saelens_own(size, kind, rows, seed, lr, device).save_inference_model(folder)
            figures = measure(sae_lens.SAE.load_from_disk(folder, device=device), model, held_out)
        results.append({"trainer": "olmoscope" if lr is None else "saelens", "kind": kind, "lr": lr, "seed": seed,
                        **figures})
        print(json.dumps(results[-1]), flush=True)
        write_json(path, {"benchmark": "synthetic", "date": time.strftime("%Y-%m-%d"), "hardware": hardware(device),
                          "provenance": provenance(), "sae_lens": sae_lens.__version__, "size": vars(size),
                          "results": results})


def world(size: Size, device: str, apart: bool = True) -> SyntheticModel:
    """The published recipe at any size (from SAELens' page on SynthSAEBench).

    Args:
        apart: whether the features' directions are pushed apart, which takes minutes for thousands of features.
    """
    return SyntheticModel(SyntheticModelConfig(
        size.features, size.width, ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        HierarchyConfig(size.roots, branching_factor=4, max_depth=3, mutually_exclusive_portion=1.0,
                        compensate_probabilities=True),
        OrthogonalizationConfig(num_steps=100, lr=3e-4) if apart else None,
        LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        mean_firing_magnitudes=LinearMagnitudeConfig(5.0, 4.0), seed=42), device=device)


class Draws:
    """Rows of a world, the same each time: every chunk of `AT_ONCE` rows is drawn with its own seed."""

    def __init__(self, draw: Callable[[int], Tensor], rows: int, width: int, seed: int) -> None:
        self.rows = rows
        self._draw, self._seed, self._keep = draw, seed, 4 * rows * width <= IN_MEMORY
        self._kept: dict[int, Tensor] = {}
        self._walk: Iterator[Tensor] = iter(())

    @torch.no_grad()
    def chunks(self) -> Iterator[Tensor]:
        """All rows, `AT_ONCE` at a time."""
        for start in range(0, self.rows, AT_ONCE):
            chunk = self._kept.get(start)
            if chunk is None:
                with torch.random.fork_rng():
                    torch.manual_seed(self._seed + start // AT_ONCE)
                    chunk = self._draw(min(AT_ONCE, self.rows - start)).detach()
            if self._keep:
                self._kept[start] = chunk
            yield chunk

    def batches(self, size: int) -> Iterator[Tensor]:
        """All rows, `size` at a time."""
        left = None
        for chunk in self.chunks():
            parts = torch.split(chunk if left is None else torch.cat([left, chunk]), size)
            yield from (part for part in parts if len(part) == size)
            left = parts[-1] if len(parts[-1]) < size else None
        if left is not None:
            yield left

    def sample(self, size: int) -> Tensor:
        """The next chunk, in the way in which SAELens' evaluation asks a generator for it."""
        chunk = next(self._walk)
        assert len(chunk) == size
        return chunk

    def from_the_start(self) -> "Draws":
        """This object, starting again with the first chunk."""
        self._walk = self.chunks()
        return self


def ours(size: Size, kind: str, rows: Draws, seed: int) -> SparseCoder:
    """An SAE from our step, with the settings that the package derives for its shape and number of rows."""
    sae = {"layer": 3, "d_sae": size.latents, "k": size.k, "weights": "untied",
           "activation": "batchtopk" if kind == "matryoshka" else kind,
           "matryoshka": PREFIXES if kind == "matryoshka" else []}
    recipe = load_recipe(str(RECIPE), overrides=[f"saes=[{json.dumps(sae)}]", f"seed={seed}",
                                                 f"tokens.count={size.rows}"])
    spec = recipe.saes[0]
    settings = settled(recipe, spec)
    mean_D = next(rows.chunks()).mean(dim=0)
    step = Step(initialize(size.width, spec.d_sae, spec.k, "none", mean_D, seed, spec.default_id, tied=False),
                Adam.of(settings), settings.auxiliary, activation=spec.activation, matryoshka=spec.matryoshka)
    steps, lr = -(-size.rows // settings.batch), rate_of(recipe, spec, size.width)
    for x_BD in rows.batches(settings.batch):
        step(x_BD, learning_rate(lr, settings.decay, step.count, steps))
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "last.safetensors", step, {})
        return read_checkpoint(Path(folder) / "last.safetensors")


def saelens_own(size: Size, kind: str, rows: Draws, seed: int, lr: float, device: str) -> Any:
    """An SAE from SAELens' trainer: JumpReLU with the loss that has a target for L0; otherwise with defaults."""
    torch.manual_seed(seed)
    shape = {"d_in": size.width, "d_sae": size.latents, "device": device}
    sae = {"topk": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(k=size.k, **shape)),
           "batchtopk": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=size.k, **shape)),
           "jumprelu": lambda: JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(
               jumprelu_sparsity_loss_mode="quadratic", target_l0=size.k, **shape)),
           "matryoshka": lambda: MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(
               k=size.k, matryoshka_widths=[*(round(share * size.latents) for share in PREFIXES), size.latents],
               **shape))}[kind]()
    steps = size.rows // size.batch
    # Its auxiliary loss considers a latent dead after 1000 steps, which is nearly all of a short training run.
    config = SAETrainerConfig(size.rows, size.batch, lr=lr, lr_end=lr, lr_decay_steps=steps // 3, device=device,
                              dead_feature_window=min(1000, max(1, steps // 20)))
    return SAETrainer(config, sae, rows.batches(size.batch)).fit()


def measure(sae: Any, model: SyntheticModel, held_out: Draws) -> dict[str, float]:
    """The figures of SAELens' evaluation."""
    with torch.no_grad():
        found = eval_sae_on_synthetic_data(sae, model.feature_dict, held_out.from_the_start(), held_out.rows, AT_ONCE)
    return {"f1": found.classification.f1_score, "precision": found.classification.precision,
            "recall": found.classification.recall, "mcc": found.mcc, "uniqueness": found.uniqueness,
            "explained_variance": found.explained_variance, "l0": found.sae_l0,
            "dead": found.dead_latents / sae.cfg.d_sae, "true_l0": found.true_l0}


def table(results: list[dict[str, Any]]) -> str:
    """Means over seeds, with the sample standard deviation of the first two figures."""
    lines = ["| kind | trainer | seeds | F1 | MCC | uniqueness | explained variance | L0 | dead |",
             "|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for one in results:
        groups.setdefault((one["kind"], one["lr"]), []).append(one)
    for (kind, lr), group in sorted(groups.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1] or 0)):
        mean = {name: statistics.mean(one[name] for one in group) for name in FIGURES}
        sd = {name: f" ± {statistics.stdev(one[name] for one in group):.3f}" if len(group) > 1 else ""
              for name in FIGURES}
        lines.append(f"| {kind} | {'olmoscope' if lr is None else f'SAELens, {lr:g}'} | {len(group)} "
                     f"| {mean['f1']:.3f}{sd['f1']} | {mean['mcc']:.3f}{sd['mcc']} | {mean['uniqueness']:.3f} "
                     f"| {mean['explained_variance']:.3f} | {mean['l0']:.1f} | {mean['dead']:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
