"""The rates of this machine: a few batches of the recipe's model, a few training steps of its widest SAE, the language
model's part in `train.finish` (cost/finish.py), and the disk (cost/disk.py).

The batches are like those of collection: their lengths are drawn and grouped as for the store. Only their tokens are
random, and the speed of a dense model does not depend on these. Training steps read the resulting rows.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.store.gather import TORCH_DTYPES
from olmoscope.activations.store.outliers import Outliers, outliers_among
from olmoscope.cost.disk import read_rate
from olmoscope.cost.finish import finish_seconds
from olmoscope.cost.timing import time_steps
from olmoscope.kernels.prepare import prepare_kernels
from olmoscope.model.capture import read_sites
from olmoscope.model.load import LoadedModel, load_model, pick_device
from olmoscope.recipe.schema import CoderConfig, Recipe
from olmoscope.sae.normalize import normalize_rows
from olmoscope.seeds import generator
from olmoscope.site import Site
from olmoscope.tokens.batches import plan_batches
from olmoscope.tokens.chunks import Chunker
from olmoscope.train.adam import Adam
from olmoscope.train.derived import rate_of, settled
from olmoscope.train.initialize import initialize
from olmoscope.train.step import Step

BATCHES = 8
STEPS = 8


@dataclass(frozen=True)
class Rates:
    """What was measured."""

    device: str
    tokens_per_second: float
    """The rate of collection without its disk: the forward pass, and the copy of rows into memory."""
    batches: int
    """How many batches were timed."""
    sae: CoderConfig
    """The widest SAE of the recipe."""
    step_seconds: float
    """Seconds per training step of this SAE."""
    steps: int
    """How many steps were timed."""
    documents_apart: bool | None = None
    """What the model's probe found (model/probe.py); None if it did not run."""
    outliers: dict[Site, Outliers] = field(default_factory=dict)
    """The outliers of each site, among the rows that were read for the measurement."""
    disk: float | None = None
    """Bytes per second that the disk reads (cost/disk.py); None if unknown."""
    finish_seconds: dict[Site, float] = field(default_factory=dict)
    """Seconds per token of a finish at each site that a coder with `train.finish` writes (cost/finish.py)."""


def measure(recipe: Recipe, batches: int = BATCHES, steps: int = STEPS, store: Path | None = None) -> Rates:
    """Time a recipe's two stages on its device, and the disk.

    Args:
        batches, steps: the most batches, and steps of training and of a finish, that are timed; one more of each runs
            first to warm up.
        store: a folder on the disk that would hold the store; None to leave the disk unmeasured.

    Raises:
        UserError: the model cannot be loaded or does not keep documents apart as the recipe wants, or the device is
            absent.
    """
    device = pick_device(recipe.device)
    sae = max(recipe.saes, key=lambda sae: sae.d_sae)
    seconds, timed, apart = 0.0, 0, True
    rows: dict[Site, Tensor] = {}
    outliers: dict[Site, Outliers] = {}
    for name in ("", *recipe.models):
        of = recipe.of_model(name)
        model = load_model(of.model, of.activations.sites, device)
        model.probe.refuse_leak(of.model.name, recipe.tokens.documents)
        each, timed, found, position_R = _time_collection(of, model, batches)
        seconds, apart = seconds + each, apart and model.probe.documents_apart
        rows |= {site.of(name): rows_RD[: settled(recipe, sae).batch] for site, rows_RD in found.items()}
        outliers |= {site.of(name): _outliers(rows_RD, position_R) for site, rows_RD in found.items()}
        del model  # the next one needs its memory
    fewest = min(len(rows[site]) for site in sae.reads)
    x_RD = torch.cat([rows[site][:fewest] for site in sae.reads], dim=1)
    step_seconds, stepped = _time_training(recipe, sae, x_RD, device, steps)
    return Rates(str(device), 1 / seconds, timed, sae, step_seconds, stepped, apart, outliers,
                 None if store is None else read_rate(store),
                 finish_seconds(recipe, _sequence_lengths(recipe), device, steps))


def _outliers(rows_RD: Tensor, position_R: Tensor) -> Outliers:
    return outliers_among(rows_RD.float().norm(dim=1).numpy(), position_R.numpy(),
                          lambda numbers: rows_RD[torch.from_numpy(numbers)])


def _time_collection(recipe: Recipe, model: LoadedModel, most: int) -> tuple[float, int, dict[Site, Tensor], Tensor]:
    """Seconds per token, how many batches were timed, the rows of each site, `[R, D]` on the CPU, and their positions,
    `[R]`."""
    lengths = _sequence_lengths(recipe)
    batches = plan_batches(lengths, recipe.tokens.batch_tokens, recipe.tokens.max_padding)
    # Long and short sequences differ in speed: in random order, a sample is fair wherever it ends.
    order = generator(recipe.seed, "batches to measure").permutation(len(batches))[:most]
    parts: list[dict[Site, Tensor]] = []
    positions: list[Tensor] = []

    def run(batch: int) -> int:
        found = _forward(recipe, model, lengths[batches[batch]])
        parts.append(found)
        positions.append(torch.cat([torch.arange(int(length)) for length in lengths[batches[batch]]]))
        return len(next(iter(found.values())))

    seconds, timed = time_steps("measuring the model", "batches", [order[0], *order], run)
    rows = {site: torch.cat([part[site] for part in parts]) for site in parts[0]}
    return seconds, timed, rows, torch.cat(positions)


def _forward(recipe: Recipe, model: LoadedModel, lengths: np.ndarray) -> dict[Site, Tensor]:
    """Run a batch through the model and copy its rows into memory, as collection does."""
    real_BT = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None]).to(model.device)
    token_ids_BT = torch.randint(model.vocabulary, real_BT.shape).to(model.device)
    outputs = read_sites(model.module, list(model.sites.places.values()), token_ids_BT)
    dtype = TORCH_DTYPES[recipe.activations.dtype]
    return {site: output_BTD[real_BT].to("cpu", dtype) for site, output_BTD in outputs.items()}


def _sequence_lengths(recipe: Recipe) -> np.ndarray:
    """Lengths of the sequences of one segment, drawn as packing draws them, `[S]`."""
    chunker = Chunker(recipe.tokens.chunk_lengths, recipe.tokens.segment_rows, recipe.seed)
    chunker.add(np.zeros(recipe.tokens.segment_rows, np.int32), 0)
    lengths = []
    while sequence := chunker.cut():
        lengths.append(len(sequence.token_ids))
    return np.array(lengths)


def _time_training(recipe: Recipe, sae: CoderConfig, rows_RD: Tensor, device: torch.device,
                   most: int) -> tuple[float, int]:
    """Seconds per step, and steps timed."""
    train = settled(recipe, sae)
    x_BD = rows_RD.repeat(-(-train.batch // len(rows_RD)), 1)[: train.batch].to(device)
    mean_D = normalize_rows(x_BD.float(), sae.normalize)[0].mean(dim=0)
    step = Step(initialize(x_BD.shape[1], sae.d_sae, sae.k, sae.normalize, mean_D, train.seed,
                           sae.default_id, tied=sae.weights == "tied"),
                Adam.of(train), train.auxiliary, candidates=train.candidates, activation=sae.activation,
                matryoshka=sae.matryoshka, orthogonal=train.orthogonal)
    prepare_kernels(device, candidates=train.candidates is not None)

    def run(number: int) -> int:
        step(x_BD, rate_of(recipe, sae, x_BD.shape[1]))
        step.take_sums()  # waits for the device
        return 1

    return time_steps(f"measuring {sae.id}", "steps", range(most + 1), run)
