"""All stages of a recipe, one after the other, in one output folder.

    OUT/recipe.yaml     the resolved recipe
    OUT/store/          train/ and held_out/, the activation stores
    OUT/runs/           a folder for each SAE: its training, its evaluation, its export
    OUT/release/        what goes to the hub

Each function does what is missing and leaves the rest; calling it again does nothing.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from olmoscope.activations.collect.run import Collected, Split, collect
from olmoscope.activations.store.format import read_manifest
from olmoscope.activations.store.reader import Store, open_store
from olmoscope.activations.store.shares import Worker
from olmoscope.errors import UserError
from olmoscope.evaluate.evaluate import Setting, evaluate_on_store, forget_unfinished, identity
from olmoscope.evaluate.report import write_reports
from olmoscope.evaluate.results import EVALUATION, is_evaluated, write_evaluation
from olmoscope.evaluate.sequences import read_sequences
from olmoscope.files import read_json, write_text
from olmoscope.model.dtype import settle_model
from olmoscope.model.load import pick_device
from olmoscope.model.splice import load_causal_lm
from olmoscope.model_source import at_revision
from olmoscope.recipe.schema import SAE, Recipe
from olmoscope.release.validate import Validation, validate
from olmoscope.sae.io.open import open_sae
from olmoscope.site import Site
from olmoscope.tokens.tokenizer import load_tokenizer
from olmoscope.train.group import train_from_store, train_live
from olmoscope.train.run import run_folder
from olmoscope.train.trackers import TrackerName
from olmoscope.units import format_seconds

SPLITS: tuple[Split, ...] = ("train", "held_out")


def store_folder(out: Path, split: str) -> Path:
    """Where the store of a split lives."""
    return out / "store" / split


def settle_recipe(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with `model.dtype: auto` and `tokens.bos: auto` replaced: by those of the stores begun in `out`, else
    by what is fast here, and by what the model's tokenizer does.

    Args:
        out: the output folder.

    Raises:
        UserError: a manifest there is damaged, the recipe's device is absent, or the tokenizer cannot be had.
    """
    return _with_bos(_with_dtype(recipe, out), out)


def _with_dtype(recipe: Recipe, out: Path) -> Recipe:
    if recipe.model.dtype != "auto":
        return recipe
    for split in SPLITS:
        store = store_folder(out, split)
        if (store / "manifest.json").exists() and (begun := read_manifest(store).model_dtype) is not None:
            return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": begun})})
    return recipe.model_copy(update={"model": settle_model(recipe.model, pick_device(recipe.device))})


def _with_bos(recipe: Recipe, out: Path) -> Recipe:
    """Stores begun before this setting existed have no BOS, and are continued without it."""
    if recipe.tokens.bos != "auto":
        return recipe
    both = [recipe.with_bos(bos) for bos in ("no", "yes")]
    for split in SPLITS:
        path = store_folder(out, split) / "tokens" / "recipe.json"
        if path.exists():
            begun = read_json(path)
            for settled in both:
                if begun == {"tokens_hash": settled.tokens_hash()}:
                    return settled
    return both[bool(load_tokenizer(recipe.model).begin)]


def collect_stores(recipe: Recipe, out: Path, worker: Worker = Worker()) -> list[Collected]:  # noqa: B008 (frozen)
    """Collect the training rows and the held-out rows, or a worker's share of them."""
    recipe = settle_recipe(recipe, out)
    collected = [collect(recipe, split, store_folder(out, split), worker) for split in SPLITS]
    write_text(out / "recipe.yaml", recipe.to_yaml())
    return collected


def chosen(recipe: Recipe, only: list[str]) -> list[SAE]:
    """The SAEs of a recipe whose ids were named; all if none were.

    Raises:
        UserError: an id that the recipe does not have.
    """
    for sae_id in only:
        if sae_id not in (ids := [sae.id for sae in recipe.saes]):
            raise UserError(f"the recipe has no SAE {sae_id!r}; it has: {', '.join(ids)}")
    return [sae for sae in recipe.saes if not only or sae.id in only]


def train_saes(recipe: Recipe, out: Path, only: list[str],
               tracker: TrackerName | None = None) -> Iterator[tuple[SAE, bool]]:
    """Train SAEs, from the store or (`train.live`) straight from the model.

    Yields:
        Each SAE, and False if it was finished before.
    """
    recipe = settle_recipe(recipe, out)
    wanted, store = chosen(recipe, only), store_folder(out, "train")
    if recipe.train.live:
        trained = train_live(recipe, wanted, store, out, tracker)
    else:
        trained = train_from_store(recipe, wanted, open_store(store), out, tracker)
    for sae, fresh in trained:
        write_text(out / "recipe.yaml", recipe.to_yaml())
        yield sae, fresh


def evaluate_saes(recipe: Recipe, out: Path, only: list[str]) -> Iterator[tuple[SAE, bool]]:
    """Evaluate finished SAEs on the held-out store, into `evaluation.json` of each run.

    Yields:
        Each SAE, and False if the same evaluation was there already.

    Raises:
        UserError: a run that is not finished.
    """
    recipe = settle_recipe(recipe, out)
    if recipe.train.live:  # nobody collected anything; held-out rows are few
        collect(recipe, "held_out", store_folder(out, "held_out"))
    store = open_store(store_folder(out, "held_out"))
    wanted = chosen(recipe, only)
    for sae in wanted:
        finished(run_folder(out, sae), sae)
    wanted_model = at_revision(recipe.model, store.manifest.model.revision)
    tokenizer = load_tokenizer(wanted_model, recipe.tokens.bos)
    sequences = read_sequences(store.path, tokenizer, apart=recipe.tokens.documents == "apart", stored=tokenizer.begin)
    setting = Setting(sequences, recipe.evaluate.tokens, recipe.tokens.batch_tokens, f"{recipe.name}, held out",
                      recipe.model.dtype, out, store.manifest.recipe_hash)
    subjects = [open_sae(run_folder(out, sae)) for sae in wanted]
    identities = [identity(subject, store.manifest.model.revision, setting) for subject in subjects]
    pending = [number for number, sae in enumerate(wanted)
               if not is_evaluated(run_folder(out, sae) / EVALUATION, identities[number])]
    if pending:
        model = load_causal_lm(wanted_model, pick_device(recipe.device), [sae.site for sae in wanted])
        found = evaluate_on_store([subjects[number] for number in pending], store, model, setting)
        for number, evaluation in zip(pending, found, strict=True):
            write_evaluation(run_folder(out, wanted[number]) / EVALUATION, evaluation)
    forget_unfinished(out)
    for number, sae in enumerate(wanted):
        yield sae, number in pending


def report_saes(recipe: Recipe, out: Path) -> list[Path]:
    """Write `report.html` of every evaluated SAE into its run, and, if they are several, one of them all into `out`.

    Returns:
        The pages, those that stood there already among them.
    """
    runs = [run for sae in recipe.saes if ((run := run_folder(out, sae)) / EVALUATION).exists()]
    return write_reports(runs, out)


def finished(run: Path, sae: SAE) -> dict[str, Any]:
    """The `done.json` of a run.

    Raises:
        UserError: it is not finished.
    """
    if not (run / "done.json").exists():
        raise UserError(f"{sae.id} is not trained yet ({run}); run `olmoscope train` first")
    return dict(read_json(run / "done.json"))


def validate_folder(folder: Path) -> Validation:
    """Check a release (or an output folder's, or one SAE) with the real SAELens, on held-out rows where they are near.

    Raises:
        UserError: nothing to check there, or SAELens is not installed.
    """
    if (folder / "release").is_dir():
        folder = folder / "release"
    store = store_folder(folder.parent, "held_out")
    return validate(folder, rows=_first_rows(open_store(store)) if (store / "manifest.json").exists() else None)


def _first_rows(store: Store) -> dict[Site, Tensor]:
    """Up to 256 rows of each site, `[rows, D]`; a segment's rows are permuted, so they are a random sample."""
    part = slice(0, min(256, store.segment_rows[0]))
    return {site: store.read(site, 0, part) for site in store.manifest.sites}


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __str__(self) -> str:
        return format_seconds(time.monotonic() - self._start)
