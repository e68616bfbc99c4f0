"""What the studies of SAE quality share: stores by name, training as the package does it, one evaluation for everybody,
results a line each.

A results file has a JSON line for each SAE; what stands there is not done again. Lines are added whole by one process.
"""

import contextlib
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from olmoscope.activations.store.reader import Store, open_store
from olmoscope.activations.stream.batches import Stream
from olmoscope.activations.stream.filters import keep_of_store
from olmoscope.activations.stream.rounds import StoreRounds
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import Recipe
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.io.checkpoint import read_checkpoint
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.derived import batch_of
from olmoscope.train.run import Run

RECIPE = Path(__file__).parent / "quality.yaml"
ROWS_AT_ONCE = 4096
Job = dict[str, Any]
"""`KEYS`, and how to do it."""
KEYS = ("setting", "model", "layer", "seed", "d_sae", "k", "tokens")
"""What decides a result."""
PLACES = ("out", "python")
"""Of this machine alone: not written down."""


def stores(out: Path) -> tuple[Store, Store]:
    """The training and the held-out store of an output folder of `olmoscope collect`."""
    return open_store(out / "store" / "train"), open_store(out / "store" / "held_out")


def recipe_of(job: Job, form: str, **sae: Any) -> Recipe:
    """A form of the study's recipe with one SAE, that of the job.

    Args:
        sae: what else it says of the SAE.
    """
    sae |= {key: job[key] for key in ("layer", "d_sae", "k")}
    return load_recipe(str(RECIPE), form, [f"saes=[{json.dumps(sae)}]", f"seed={job['seed']}",
                                           f"tokens.count={job['tokens']}", "device=cpu"])


def rounds_of(recipe: Recipe, out: Path) -> StoreRounds:
    """The training rows of a recipe's SAE."""
    training = stores(out)[0]
    return StoreRounds(training, [recipe.saes[0].site], recipe.train.order, recipe.seed,
                       keep_of_store(recipe.train.filter, training, [recipe.saes[0].site]))


def train(recipe: Recipe, out: Path) -> SparseCoder:
    """The recipe's SAE as `olmoscope train` would make it of the first `tokens.count` rows of an output folder."""
    rounds, spec = rounds_of(recipe, out), recipe.saes[0]
    with tempfile.TemporaryDirectory() as folder, \
            contextlib.closing(Stream(rounds, batch_of(recipe, recipe.train), recipe.train.epochs)) as stream:
        training = Run(recipe, spec, rounds, Path(folder), torch.device("cpu"))
        training.steps = -(-recipe.tokens.count // batch_of(recipe, recipe.train))
        for _ in range(training.steps):
            training.train_on(stream.next_batch()[spec.site], stream.state())
        return read_checkpoint(checkpoints(Path(folder))[-1])


@torch.no_grad()
def measure(sae: SparseCoder, held_out: Store, layer: int, most: int | None = None) -> dict[str, Any]:
    """The figures of docs/metrics.md on all held-out rows; dead latents over all of them.

    Args:
        most: not all but so many rows, the first ones of every segment, which is in random order.
    """
    share = min(1.0, most / held_out.rows) if most else 1.0
    rows = active = 0
    error2 = x2 = nmse = 0.0
    x_sum_D = torch.zeros(sae.d_model, dtype=torch.float64)
    fired_F = torch.zeros(sae.d_sae, dtype=torch.bool)
    for segment, count in enumerate(held_out.segment_rows):
        wanted = int(count * share)
        for start in range(0, wanted, ROWS_AT_ONCE):
            x_BD = held_out.read(layer, segment, slice(start, min(wanted, start + ROWS_AT_ONCE))).float()
            xhat_BD, codes = sae.reconstruct(x_BD)
            x2_B = x_BD.square().sum(1, dtype=torch.float64)
            error2_B = (x_BD - xhat_BD).square().sum(1, dtype=torch.float64)
            rows += len(x_BD)
            x2, error2, nmse = x2 + float(x2_B.sum()), error2 + float(error2_B.sum()), nmse + float(
                (error2_B / x2_B).sum())
            x_sum_D += x_BD.sum(0, dtype=torch.float64)
            active += int((codes.values > 0).sum())
            fired_F[codes.indices[codes.values > 0]] = True
    return {"nmse": nmse / rows, "fvu": error2 / (x2 - float(x_sum_D.square().sum()) / rows),
            "dead": float((~fired_F).double().mean()), "window": rows, "l0": active / rows}


def read_results(path: Path) -> list[dict[str, Any]]:
    """All results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(jobs: Iterable[Job], run: Callable[[Job], dict[str, Any]], path: Path, processes: int) -> None:
    """Run what the results file lacks, each job in a process with one thread; results are added as they come."""
    have = [{key: result[key] for key in KEYS} for result in read_results(path)]
    missing = [job for job in jobs if {key: job[key] for key in KEYS} not in have]
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _one_thread) as pool:
        futures = {pool.submit(run, job): job for job in missing}
        for done, future in enumerate(as_completed(futures), 1):
            job = {key: value for key, value in futures[future].items() if key not in PLACES}
            if future.exception():
                print(f"{done}/{len(futures)} failed: {job}: {future.exception()!r}", flush=True)
                continue
            line = json.dumps(job | future.result())
            with path.open("a") as file:
                file.write(line + "\n")
            print(f"{done}/{len(futures)} {line}", flush=True)


def table(results: list[dict[str, Any]]) -> str:
    """Means over seeds, by setting, model and layer; spread: (largest - smallest) / mean of the NMSE over seeds."""
    lines = ["| setting | model | layer | d_sae | k | tokens | seeds | NMSE | spread | FVU | dead | L0 |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        key = tuple(result[name] for name in ("setting", "model", "layer", "d_sae", "k", "tokens"))
        groups.setdefault(key, []).append(result)
    for (setting, model, layer, d_sae, k, tokens), group in groups.items():
        nmse = [result["nmse"] for result in group]
        fvu, dead, l0 = (mean(result[name] for result in group) for name in ("fvu", "dead", "l0"))
        spread = f"{(max(nmse) - min(nmse)) / mean(nmse):.1%}" if len(nmse) > 1 else ""
        lines.append(f"| {setting} | {model} | {layer} | {d_sae} | {k} | {tokens:,} | {len(group)} | {mean(nmse):.4f} "
                     f"| {spread} | {fvu:.4f} | {dead:.2%} | {l0:.2f} |")
    return "\n".join(lines)


def _one_thread() -> None:
    torch.set_num_threads(1)
