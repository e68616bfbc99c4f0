"""The best learning rate at many shapes, and how far the package's own rule (train/derived.py) is from it.

    OMP_NUM_THREADS=1 python benchmarks/rates.py --store tiny=OUT:3 qwen3=OUT:3 smollm2=OUT:8,16 --json FILE
    python benchmarks/rates.py --table --json FILE
    ... --cells "tiny:3 2048" --rates 2e-3 4e-3 --sae '{"weights": "tied"}' --train '{"adam": "exact"}' --json FILE

OUT is a folder of `olmoscope collect` with the layers named (recipes/variants.yaml for tiny and, with --set
model.name=FOLDER, for qwen3; recipes/smollm2-sites.yaml, form `sinks`, for SmolLM2). SAELens' `synthetic` module draws
the rows called synthetic, as in synthetic.py. Rows of outlier norm are left out: the package has separate latents for
them.

For each cell, SAEs are trained at rates a factor of √2 apart, starting at `START`, until both neighbours of the best
rate are worse; everything else is as the package derives it. Then one SAE is trained at the rule's rate, if that is
different. Choose a new rule on the `known` cells, and judge it by the others. Results that are in FILE are not made
again. `--sae` and `--train` change the SAE and its training (keys of a recipe's `saes` and `train`); the table leaves
such results out.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmoscope.activations.store.reader import open_store
from olmoscope.activations.store.statistics import OUTLIER
from olmoscope.activations.stream.batches import Stream
from olmoscope.activations.stream.filters import keep_of_store
from olmoscope.activations.stream.rounds import StoreRounds
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import Recipe
from olmoscope.recipe.training import Filter
from olmoscope.sae.io.checkpoint import read_checkpoint
from olmoscope.site import Site
from olmoscope.train.adam import Adam
from olmoscope.train.checkpoint import save_checkpoint
from olmoscope.train.derived import rate_of, settled
from olmoscope.train.initialize import initialize
from olmoscope.train.run import learning_rate
from olmoscope.train.step import Step

sys.path.insert(0, str(Path(__file__).parent))

RECIPE = Path(__file__).parent / "recipes" / "quality.yaml"
WIDTHS = {"tiny": 256, "qwen3": 192, "smollm2": 576}
"""The width of each model's rows; the name of synthetic rows contains it."""
HELD_OUT = 2**15
"""Number of rows on which an SAE is measured."""
SEED = 0
START = 1.4
"""The search starts at this / width."""


@dataclass(frozen=True)
class Cell:
    """A shape. Half of the cells of each kind of rows are known when the rule is chosen."""

    known: bool
    rows: str
    d_sae: int
    k: int
    tokens: int
    batch: int | None = None
    """None: as derived."""
    epochs: int = 1
    sae: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    """Differences from the defaults."""

    @property
    def changes(self) -> dict[str, Any]:
        """The differences from the defaults; empty if there are none."""
        return {name: value for name, value in (("sae", self.sae), ("train", self.train)) if value}

    @property
    def name(self) -> str:
        return f"{self.rows} {self.d_sae} k{self.k} {self.tokens * self.epochs // 1000}k b{self.batch or 'auto'}"


CELLS = [
    Cell(True, "tiny:3", 4096, 32, 500_000),
    Cell(False, "tiny:3", 2048, 32, 500_000),
    Cell(True, "tiny:3", 16384, 32, 250_000),
    Cell(False, "tiny:3", 8192, 32, 500_000),
    Cell(True, "tiny:3", 4096, 8, 250_000),
    Cell(False, "tiny:3", 4096, 64, 125_000),
    Cell(True, "tiny:7", 1024, 32, 500_000),
    Cell(False, "tiny:7", 4096, 32, 500_000, 1024),
    Cell(True, "tiny:3", 4096, 32, 500_000, 1024),
    Cell(False, "tiny:3", 4096, 32, 500_000, None, 3),
    Cell(True, "qwen3:3", 4096, 32, 250_000),
    Cell(False, "qwen3:3", 2048, 16, 125_000),
    Cell(True, "qwen3:7", 1024, 32, 500_000),
    Cell(False, "qwen3:3", 8192, 32, 500_000),
    Cell(True, "smollm2:8", 4608, 32, 300_000),
    Cell(False, "smollm2:16", 4608, 32, 300_000),
    Cell(True, "smollm2:16", 2304, 16, 300_000),
    Cell(False, "smollm2:8", 18432, 32, 150_000),
    Cell(True, "smollm2:16", 18432, 32, 75_000),
    Cell(False, "smollm2:8", 9216, 64, 75_000),
    Cell(True, "synthetic:1024", 4096, 32, 125_000),
    Cell(False, "synthetic:1024", 8192, 32, 75_000),
    Cell(True, "synthetic:1024", 4096, 32, 250_000, 1024),
    Cell(False, "synthetic:1024", 2048, 32, 250_000),
    Cell(True, "synthetic:2048", 8192, 32, 50_000),
    Cell(False, "synthetic:2048", 4096, 32, 75_000),
]


def main() -> None:
    """Read the arguments, train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", nargs="*", default=[], metavar="NAME=OUT", help="where the rows with that name are")
    parser.add_argument("--cells", nargs="*", metavar="WORD", help="only cells with one of these words in their name")
    parser.add_argument("--rule-only", action="store_true", help="only at the rate of the rule")
    parser.add_argument("--rates", nargs="*", type=float, help="only at these rates")
    parser.add_argument("--sae", type=json.loads, default={}, metavar="JSON", help="further keys of the SAEs")
    parser.add_argument("--train", type=json.loads, default={}, metavar="JSON", help="further keys of their training")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the file of results, one per line")
    parser.add_argument("--table", action="store_true", help="only print the existing results")
    arguments = parser.parse_args()
    if not arguments.table:
        stores = {name: Path(out) for name, out in (one.split("=") for one in arguments.store)}
        rates = [None] if arguments.rule_only else arguments.rates
        for cell in CELLS:
            if (cell.rows.split(":")[0] in (*stores, "synthetic")
                    and (arguments.cells is None or any(word in cell.name for word in arguments.cells))):
                changed = replace(cell, sae=arguments.sae, train=arguments.train)
                measure_cell(changed, stores, arguments.json, rates)
    print(table(read_results(arguments.json)))


def measure_cell(cell: Cell, stores: dict[str, Path], path: Path, rates: list[float | None] | None) -> None:
    """Train at the rates that are missing for a cell.

    Args:
        rates: an entry None means the rule's rate. None instead of a list: the search, and the rule's rate.
    """

    def nmse(lr: float) -> float:
        known = [one for one in read_results(path) if one["cell"] == cell.name and math.isclose(one["lr"], lr)
                 and changes_of(one) == cell.changes]
        if known:
            return float(known[0]["nmse"])
        result = {"cell": cell.name, "lr": lr, **cell.changes} | train(cell, stores, lr)
        print(json.dumps(result), flush=True)
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        return float(result["nmse"])

    if rates is None:
        search(nmse, START / width_of(cell))
    for lr in rates or [None]:
        nmse(rule_of(cell) if lr is None else lr)


def search(nmse: Callable[[float], float], start: float) -> None:
    """Find the least error over the rates start · 2^(n/2), by descent until both neighbours are worse."""
    best = 0
    while (better := min((best - 1, best, best + 1), key=lambda n: nmse(start * 2 ** (n / 2)))) != best:
        best = better


def recipe_of(cell: Cell) -> Recipe:
    """A recipe for an SAE of this shape."""
    sae = {"layer": 3, "d_sae": cell.d_sae, "k": cell.k, "weights": "untied"} | cell.sae
    train = {"batch": cell.batch, "epochs": cell.epochs} | cell.train
    return load_recipe(str(RECIPE), overrides=[f"saes=[{json.dumps(sae)}]", f"tokens.count={cell.tokens}",
                                               f"train={json.dumps(train)}"])


def rule_of(cell: Cell) -> float:
    """The rate that the package would use."""
    recipe = recipe_of(cell)
    return rate_of(recipe, recipe.saes[0], width_of(cell))


def width_of(cell: Cell) -> int:
    """The width of a cell's rows."""
    kind, what = cell.rows.split(":")
    return WIDTHS.get(kind) or int(what)


@torch.no_grad()
def train(cell: Cell, stores: dict[str, Path], lr: float) -> dict[str, Any]:
    """Train an SAE of a cell at a rate; returns its error and its dead latents on held-out rows."""
    x_ND, held_out_ND = rows_of(cell.rows, stores)
    recipe, count = recipe_of(cell), min(cell.tokens, len(x_ND))
    spec, settings = recipe.saes[0], settled(recipe, recipe.saes[0])
    step = Step(initialize(x_ND.shape[1], cell.d_sae, cell.k, "none", x_ND[:HELD_OUT].float().mean(dim=0), SEED,
                           cell.rows, tied=spec.weights == "tied"), Adam.of(settings), settings.auxiliary,
                activation=spec.activation, matryoshka=spec.matryoshka)
    batches = [part for epoch in range(cell.epochs) for part in torch.split(
        torch.randperm(count, generator=torch.Generator().manual_seed(SEED + epoch)), settings.batch)]
    for places in batches:
        step(x_ND[places].float(), learning_rate(lr, settings.decay, step.count, len(batches)))
    with tempfile.TemporaryDirectory() as folder:  # the opened SAE may have another class than the trained one
        save_checkpoint(Path(folder) / "last.safetensors", step, {})
        coder = read_checkpoint(Path(folder) / "last.safetensors")
    fired_F, error, rows = torch.zeros(cell.d_sae, dtype=torch.bool), 0.0, 0
    for part_BD in torch.split(held_out_ND, 2048):
        x_BD = part_BD.float()
        codes = coder.encode(x_BD)
        e_BD = (coder.decode(codes) - x_BD).double()
        error += float((e_BD.square().sum(dim=1) / x_BD.double().square().sum(dim=1)).sum())
        fired_F[codes.indices[codes.values > 0]] = True
        rows += len(x_BD)
    return {"nmse": error / rows, "dead": float((~fired_F).double().mean()), "steps": len(batches),
            "batch": settings.batch, "width": x_ND.shape[1]}


@lru_cache(1)
def _all_rows(name: str, out: Path | None) -> tuple[Tensor, Tensor]:
    _, what = name.split(":")
    if out is None:
        return _synthetic(int(what))
    found = []
    for split in ("train", "held_out"):
        store = open_store(out / "store" / split)
        site = next(site for site in store.manifest.sites if str(site) == f"layers.{what}")
        rounds = StoreRounds(store, [site], "shuffled", SEED, keep_of_store(Filter(), store, [site]))
        x_ND = torch.cat(list(_batches(rounds, site)))
        norm_N = torch.cat([part_BD.float().norm(dim=1) for part_BD in torch.split(x_ND, 2**14)])
        found.append(x_ND[norm_N <= OUTLIER * norm_N.median()])
    return found[0], found[1][:HELD_OUT]


def rows_of(name: str, stores: dict[str, Path]) -> tuple[Tensor, Tensor]:
    """Training rows and held-out rows, `[N, D]` each, bfloat16."""
    return _all_rows(name, stores.get(name.split(":")[0]))


def _batches(rounds: StoreRounds, site: Site) -> Iterator[Tensor]:
    size = 4096
    with contextlib.closing(Stream(rounds, size, 1)) as stream:
        for _ in range(-(-rounds.kept.rows // size)):
            yield stream.next_batch()[site].clone()


def _synthetic(width: int) -> tuple[Tensor, Tensor]:
    """Rows from a world of synthetic.py with 4 features for each dimension."""
    from synthetic import Size, world

    model = world(Size(4 * width, width, width // 32, 0, 0, 0, 0, 0), "cpu", apart=False)
    torch.manual_seed(SEED)
    parts = [model.sample(4096).bfloat16() for _ in range((250_000 + HELD_OUT) // 4096 + 1)]
    rows_ND = torch.cat(parts)
    return rows_ND[HELD_OUT:], rows_ND[:HELD_OUT]


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def changes_of(result: dict[str, Any]) -> dict[str, Any]:
    """How a result differs from the defaults, like `Cell.changes`."""
    return {name: result[name] for name in ("sae", "train") if name in result}


def table(results: list[dict[str, Any]]) -> str:
    """For each cell, the best rate, the rule's rate, and how much the rule loses."""
    lines = ["| cell | known | D | steps | best rate | NMSE | dead | rule | NMSE against the best | dead |",
             "|---|---|" + "--:|" * 8]
    for cell in CELLS:
        found = {one["lr"]: one for one in results if one["cell"] == cell.name and not changes_of(one)}
        if not found:
            continue
        best, rule = min(found.values(), key=lambda one: float(one["nmse"])), rule_of(cell)
        at_rule = next((one for lr, one in found.items() if math.isclose(lr, rule)), None)
        told = (f"{at_rule['nmse'] / best['nmse'] - 1:+.1%} | {at_rule['dead']:.1%}" if at_rule else "| ")
        lines.append(f"| {cell.name} | {'yes' if cell.known else ''} | {best['width']} | {best['steps']} "
                     f"| {best['lr']:.2e} | {best['nmse']:.4f} | {best['dead']:.1%} | {rule:.2e} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
