"""A finished run, for scripts that train something else on its rows: its recipe, its rows, its evaluation."""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from olmoscope.activations.store.reader import open_store
from olmoscope.activations.stream.batches import Stream
from olmoscope.activations.stream.filters import keep_of_store
from olmoscope.activations.stream.rounds import StoreRounds
from olmoscope.evaluate.evaluate import Setting, evaluate_on_store
from olmoscope.evaluate.results import EVALUATION, Evaluation, read_evaluation
from olmoscope.evaluate.sequences import read_sequences
from olmoscope.model.load import pick_device
from olmoscope.model.splice import load_causal_lm
from olmoscope.model_source import at_revision
from olmoscope.pipeline import store_folder
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import CoderConfig, Recipe
from olmoscope.tokens.tokenizer import load_tokenizer
from olmoscope.train.derived import settled


def recipe_and_coder(out: Path, run: str) -> tuple[Recipe, CoderConfig]:
    """The recipe and the SAE's settings of a run."""
    recipe = load_recipe(str(out / "runs" / run / "recipe.yaml"))
    return recipe, next(sae for sae in recipe.saes if sae.id == run)


def rounds_of(out: Path, run: str) -> StoreRounds:
    """The rows on which a run was trained, in its order."""
    recipe, spec = recipe_and_coder(out, run)
    train, store = settled(recipe, spec), open_store(store_folder(out, "train"))
    return StoreRounds(store, spec.sites, train.order, recipe.seed, keep_of_store(train.filter, store, spec.sites))


def rows_of(out: Path, run: str) -> tuple[torch.Tensor, int]:
    """The rows on which an SAE of one site was trained, in its order, `[N, D]`, and the batch size."""
    recipe, spec = recipe_and_coder(out, run)
    rounds, batch = rounds_of(out, run), settled(recipe, spec).batch
    with contextlib.closing(Stream(rounds, batch, 1)) as stream:
        steps = -(-rounds.kept.rows // batch)
        return torch.cat([stream.next_batch()[spec.site].clone() for _ in range(steps)]), batch


def evaluate(out: Path, subject: Any) -> Evaluation:
    """Evaluate an SAE as `olmoscope evaluate OUT` does with the runs of OUT."""
    recipe, store = load_recipe(str(out / "recipe.yaml")), open_store(store_folder(out, "held_out"))
    model = at_revision(recipe.model, store.manifest.model.revision)
    tokenizer = load_tokenizer(model, recipe.tokens.bos)
    sequences = read_sequences(store.path, tokenizer, apart=recipe.tokens.documents == "apart", stored=tokenizer.begin)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(sequences, recipe.evaluate.tokens, recipe.tokens.batch_tokens, f"{recipe.name}, held out",
                          recipe.model.dtype, Path(folder), store.manifest.recipe_hash)
        loaded = load_causal_lm(model, pick_device("auto"), subject.reads)
        return evaluate_on_store([subject], store, loaded, setting)[0]


def means(out: Path, runs: Sequence[str], others: Sequence[Path]) -> str:
    """A Markdown table of means over runs that differ in their seed, ± sample standard deviation, and of the
    evaluations that the folders of all these runs have.

    Args:
        others: the folder of each run.
    """
    names = sorted(set.intersection(*({path.stem for path in folder.glob("*.json")} for folder in others)))
    paths = {"olmoscope": [out / "runs" / run / EVALUATION for run in runs]}
    paths |= {name: [folder / f"{name}.json" for folder in others] for name in names}
    lines = [f"\n**{len(runs)} runs**\n", "| | NMSE | FVU | L0 | dead | ΔCE | KL |", "|---|" + "--:|" * 6]
    forms = (".4f", ".4f", ".1f", ".1%", ".3f", ".3f")
    for name, evaluations in paths.items():
        figures = [(one.usual.nmse, one.usual.fvu, one.l0.mean, one.dead.share, one.language.delta_ce, one.language.kl)
                   for one in map(read_evaluation, evaluations)]
        columns = zip(*figures, strict=True)
        lines.append(f"| {name} | " + " | ".join(f"{mean(column):{form}} ± {stdev(column):{form}}"
                                                 for column, form in zip(columns, forms, strict=True)) + " |")
    return "\n".join(lines)


def table(out: Path, run: str, others: Path) -> str:
    """A Markdown table of a run and of the evaluations in a folder."""
    paths = [out / "runs" / run / EVALUATION, *sorted(others.glob("*.json"))]
    lines = [f"\n**{run}**\n", "| | NMSE | FVU | L0 | dead | ΔCE | ΔCE, outliers kept | KL |", "|---|" + "--:|" * 7]
    for path in paths:
        one = read_evaluation(path)
        name = "olmoscope" if path == paths[0] else path.stem
        language = one.language
        lines.append(f"| {name} | {one.usual.nmse:.4f} | {one.usual.fvu:.3f} | {one.l0.mean:.1f} "
                     f"| {one.dead.share:.1%} | {language.delta_ce:+.3f} | {language.delta_ce_outliers_kept:+.3f} "
                     f"| {language.kl:.3f} |")
    return "\n".join(lines)
