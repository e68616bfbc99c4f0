"""All stages of a recipe, one after another, in one output folder.

    OUT/recipe.yaml     the resolved recipe
    OUT/store/          train/ and held_out/, the activation stores; or OUT/store.json, which says where they are
    OUT/runs/           a folder for each SAE: its training, its evaluation, its export
    OUT/release/        what goes to the hub

Each function does what is missing and leaves the rest; calling it again does nothing.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from olmoscope.activations.collect.refusals import refuse_another_store
from olmoscope.activations.collect.run import Collected, collect
from olmoscope.activations.store.format import read_manifest
from olmoscope.activations.store.growth import parts_for
from olmoscope.activations.store.place import (
    find_elsewhere,
    is_elsewhere,
    record_elsewhere,
    store_places,
)
from olmoscope.activations.store.place import store_folder as store_folder
from olmoscope.activations.store.reader import Store, open_store
from olmoscope.activations.store.shares import Worker
from olmoscope.distributed.launch import World
from olmoscope.errors import UserError
from olmoscope.evaluate.behaviour import NOTHING_MORE, Behaviour, measure_behaviour
from olmoscope.evaluate.evaluate import Setting, evaluate_on_store, forget_unfinished, identity
from olmoscope.evaluate.probing import Probed
from olmoscope.evaluate.report import write_reports
from olmoscope.evaluate.results import EVALUATION, is_evaluated, write_evaluation
from olmoscope.evaluate.sequences import read_sequences
from olmoscope.evaluate.stability import SeedPair, compare_latents, read_stability, write_stability
from olmoscope.evaluate.study import STUDY, study_of, write_study
from olmoscope.files import read_json, write_text
from olmoscope.model.dtype import settle_model
from olmoscope.model.load import pick_device
from olmoscope.model.splice import load_causal_lm
from olmoscope.model_source import at_revision
from olmoscope.progress import bar
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import SPLITS, CoderConfig, Model, Recipe, Split
from olmoscope.release.build import Built, build_release
from olmoscope.release.card import CARD
from olmoscope.release.validate import Validation, validate
from olmoscope.sae.io.checkpoint import read_alive
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.io.run_folder import read_run_folder
from olmoscope.site import Site
from olmoscope.tokens.identity import as_packed, identity_path, keep_wanted, refuse_other_tokens
from olmoscope.tokens.tokenizer import load_tokenizer
from olmoscope.train.derived import settled
from olmoscope.train.group import train_from_store, train_live
from olmoscope.train.refusals import refuse_other_run, refuse_other_store
from olmoscope.train.run import run_folder
from olmoscope.train.trackers import TrackerName
from olmoscope.units import format_seconds


def settle_recipe(recipe: Recipe, out: Path, places: Mapping[str, Path] | None = None) -> Recipe:
    """The recipe with `model.dtype: auto` (of all its models) and `tokens.bos: auto` replaced by the values of the
    stores begun in `out`; if there are none, by the dtype that is fast here and by what the model's tokenizer does.

    Args:
        out: the output folder.
        places: where its stores are, by split; None for where the folder says.

    Raises:
        UserError: a manifest there is damaged, the recipe's device is absent, or the tokenizer cannot be loaded.
    """
    stores = list((store_places(out) if places is None else places).values())
    return _with_bos(_with_dtype(recipe, stores), stores)


def _with_dtype(recipe: Recipe, stores: list[Path]) -> Recipe:
    if recipe.model.dtype != "auto":
        return recipe.in_dtype(recipe.model.dtype)
    for store in stores:
        if (store / "manifest.json").exists() and (begun := read_manifest(store).model_dtype) is not None:
            return recipe.in_dtype(begun)
    return recipe.in_dtype(settle_model(recipe.model, pick_device(recipe.device)).dtype)


def _with_bos(recipe: Recipe, stores: list[Path]) -> Recipe:
    """Stores begun before this setting existed have no BOS, and are continued without it."""
    if recipe.tokens.bos != "auto":
        return recipe
    both = [recipe.with_bos(bos) for bos in ("no", "yes")]
    for store in stores:
        if identity_path(store).exists():
            begun = read_json(identity_path(store))["tokens_hash"]
            for settled in both:
                if begun == as_packed(settled, store).tokens_hash():
                    return settled
    return both[bool(load_tokenizer(recipe.model).begin)]


def collect_stores(recipe: Recipe, out: Path, worker: Worker = Worker()) -> list[Collected]:  # noqa: B008 (frozen)
    """Collect the training rows and the held-out rows, or a worker's share of them. If the folder was collected for
    fewer sites or tokens, add what is missing.

    Raises:
        UserError: the folder was trained on a store elsewhere, or it holds another recipe's store.
    """
    if is_elsewhere(out):
        raise UserError(f"{out} was trained on the store {store_places(out)['train']}; collect there, or choose "
                        "another --out")
    recipe = settle_recipe(recipe, out)
    for split in SPLITS:
        for part in parts_for(recipe, store_folder(out, split)):
            refuse_another_store(part.folder, part.recipe)
            refuse_other_tokens(recipe, split, part.folder)
    for split in SPLITS:
        keep_wanted(recipe, store_folder(out, split))
    _keep_recipe(recipe, out)  # first: it says what the stores hold, even if collection is cut short
    return [one for split in SPLITS for one in _collect_parts(recipe, split, out, worker)]


def _collect_parts(recipe: Recipe, split: Split, out: Path, worker: Worker = Worker()) -> list[Collected]:  # noqa: B008
    first = store_folder(out, split)
    return [collect(part.recipe, split, part.folder, worker, first=None if part.folder == first else first, of=part.of)
            for part in parts_for(recipe, first)]


def _keep_recipe(recipe: Recipe, out: Path) -> None:
    """Write the resolved recipe, unless it is there already: on a full disk, the command that is run again then gets
    far enough to say what it lacks."""
    path, text = out / "recipe.yaml", recipe.to_yaml()
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def chosen(recipe: Recipe, only: list[str]) -> list[CoderConfig]:
    """The SAEs of a recipe whose ids were named; all if none were.

    Raises:
        UserError: an id that the recipe does not have.
    """
    for sae_id in only:
        if sae_id not in (ids := [sae.id for sae in recipe.saes]):
            raise UserError(f"the recipe has no SAE {sae_id!r}; it has: {', '.join(ids)}")
    return [sae for sae in recipe.saes if not only or sae.id in only]


def train_saes(recipe: Recipe, out: Path, only: list[str],
               tracker: TrackerName | None = None, elsewhere: Path | None = None,
               world: World = World()) -> Iterator[tuple[CoderConfig, bool]]:  # noqa: B008 (frozen)
    """Train SAEs, from the store or (`train.live`) straight from the model.

    Args:
        elsewhere: a training store, or an output folder with one, in place of one in `out`. The folder remembers it.
        world: the processes that train; each must call this (`distributed.launch.join`).

    Yields:
        Each SAE, and False if it was finished before. With several processes, those that wrote its folder yield it.
        All end when all SAEs are done.

    Raises:
        UserError: see `train_from_store` and `find_elsewhere`; or an SAE that trains live was given a store elsewhere.
    """
    with world.ranks.agreed():
        places = store_places(out) if elsewhere is None else find_elsewhere(out, elsewhere)
        recipe = settle_recipe(recipe, out, places)
        wanted = chosen(recipe, only)
        live = [sae for sae in wanted if recipe.train_of(sae).live]
        stored = [sae for sae in wanted if sae not in live]
        if live and (elsewhere is not None or is_elsewhere(out)):
            raise UserError(f"{live[0].id} trains straight from the model (train.live), not on the store "
                            f"{places['train']}; leave out one of the two")
        for sae in wanted:
            refuse_other_run(recipe, sae, run_folder(out, sae))
        if stored:
            store = open_store(places["train"] if elsewhere is not None else store_folder(out, "train"))
            for sae in stored:
                refuse_other_store(recipe, sae, store)
        else:
            refuse_another_store(store_folder(out, "train"), recipe)
    with world.ranks.agreed():  # no process writes before all have checked
        if world.ranks.leads:
            if elsewhere is not None:
                record_elsewhere(out, places)
            _keep_recipe(recipe, out)
    if stored:
        yield from train_from_store(recipe, stored, store, out, tracker, world)
    if live:
        yield from train_live(recipe, live, store_folder(out, "train"), out, tracker, world)


def evaluate_saes(recipe: Recipe, out: Path, only: list[str],
                  behaviour: Behaviour = NOTHING_MORE,
                  world: World = World()) -> Iterator[tuple[CoderConfig, bool]]:  # noqa: B008 (frozen)
    """Evaluate finished SAEs on the held-out store, into `evaluation.json` of each run.

    Args:
        behaviour: what else is measured.
        world: the processes that share the work, each of which must call this; the first writes.

    Yields:
        Each SAE, and False if the same evaluation was there already.

    Raises:
        UserError: a run is not finished.
    """
    ranks = world.ranks
    with ranks.agreed():
        recipe = settle_recipe(recipe, out)
        device, wanted = pick_device(recipe.device, world.place.local_index), chosen(recipe, only)
        # There may be no store yet for a live run; held-out rows are few.
        if ranks.leads and any(recipe.train_of(sae).live for sae in wanted):
            _collect_parts(recipe, "held_out", out)
    with ranks.agreed():
        store = open_store(store_folder(out, "held_out"))
        _refuse_untrained(wanted, out)
        wanted_model = at_revision(recipe.model, store.manifest.model.revision)
        tokenizer = load_tokenizer(wanted_model, recipe.tokens.bos)
        sequences = read_sequences(store.path, tokenizer, apart=recipe.tokens.documents == "apart",
                                   stored=tokenizer.begin)
        setting = Setting(sequences, recipe.evaluate.tokens, recipe.tokens.batch_tokens, f"{recipe.name}, held out",
                          recipe.model.dtype, out, store.manifest.recipe_hash, ranks)
        subjects = [open_sae(run_folder(out, sae)) for sae in wanted]
        identities = [identity(subject, store.manifest.model.revision, setting) for subject in subjects]
        pending = [number for number, sae in enumerate(wanted)
                   if not is_evaluated(run_folder(out, sae) / EVALUATION, identities[number])]
        sites = [site for number in pending for site in wanted[number].sites]
        models = {name: load_causal_lm(_at_revision_of(recipe, store, name), device,
                                       [site.of("") for site in sites if site.model == name])
                  for name in sorted({"", *(site.model for site in sites)} if pending else ())}
    found = []
    if pending:
        found = evaluate_on_store([subjects[number] for number in pending], store, models.pop(""), setting, models)
    with ranks.agreed():  # the first works on alone, and says how that went
        if ranks.leads:
            for number, evaluation in zip(pending, found, strict=True):
                write_evaluation(run_folder(out, wanted[number]) / EVALUATION, evaluation)
            forget_unfinished(out)
            if behaviour != NOTHING_MORE:
                evaluated = [Probed(subject, run_folder(out, sae))
                             for subject, sae in zip(subjects, wanted, strict=True)]
                measure_behaviour(evaluated, wanted_model, tokenizer, recipe.tokens.batch_tokens, device, behaviour)
    for number, sae in enumerate(wanted):
        yield sae, number in pending


def _at_revision_of(recipe: Recipe, store: Store, name: str) -> Model:
    """The recipe's model of this name, at the commit that produced its rows in a store."""
    folder = next(folder for folder, sites in store.parts.items() if sites[0].model == name)
    return at_revision(recipe.model_of(name), read_manifest(folder).model.revision)


def compare_seeds(recipe: Recipe, out: Path) -> Iterator[tuple[SeedPair, bool]]:
    """Compare, pair by pair, the latents of evaluated runs that differ only in the seed of training. Write
    `stability.json` after each pair.

    Yields:
        Each pair, and False if it was compared before.

    Raises:
        UserError: no setting has two evaluated runs; a run or stability.json is damaged.
    """
    wanted = [two for setting in study_of(recipe, out).settings for two in setting.pairs_of_runs()]
    if not wanted:
        raise UserError(f"--stability compares runs that differ only in the seed of training, and {out} has no two "
                        "such runs that are evaluated; give an SAE of the recipe a list, such as train: {seed: [0, 1]}")
    configs, device = {sae.id: sae for sae in recipe.saes}, pick_device(recipe.device)
    runs = {run: read_run_folder(run_folder(out, configs[run])) for run in dict.fromkeys(sum(wanted, ()))}
    known = read_stability(out, {run: folder.done.run_hash for run, folder in runs.items()})
    for two in wanted:
        if fresh := frozenset(two) not in known:
            first, second = (runs[run] for run in two)
            first_sae, second_sae = (run.load().to(device) for run in (first, second))
            alive = [read_alive(run.checkpoint, settled(run.recipe, run.sae).dead_window) for run in (first, second)]
            with bar("same latents", int(alive[0].sum()), "latents") as advance:
                figures = compare_latents(first_sae, second_sae, alive[0], alive[1], advance)
            known[frozenset(two)] = SeedPair(runs=two, hashes=(first.done.run_hash, second.done.run_hash),
                                             latents=(int(alive[0].sum()), int(alive[1].sum())), **figures)
            write_stability(out, known.values())
        yield known[frozenset(two)], fresh


def report_saes(recipe: Recipe, out: Path) -> list[Path]:
    """Write `report.html` for every evaluated SAE into its run. If there are several, also write one for all of them
    into `out`, with `study.json` if they can be compared by setting.

    Returns:
        The pages, including those that were there already.
    """
    study = study_of(recipe, out)
    if study.compares:
        write_study(out / STUDY, study)
    runs = [run for sae in recipe.saes if ((run := run_folder(out, sae)) / EVALUATION).exists()]
    card = out / "release" / CARD
    return write_reports(runs, out, study if study.compares else None, card if card.is_file() else None)


def release_saes(out: Path, repo: str | None = None) -> Built:
    """Build the release (`build_release`), then write the reports again: now they link to its model card."""
    built = build_release(out, repo)
    report_saes(load_recipe(str(out / "recipe.yaml")), out)
    return built


def _refuse_untrained(wanted: Sequence[CoderConfig], out: Path) -> None:
    """Refuse to evaluate SAEs of which some are not trained.

    Raises:
        UserError: the run of an SAE is not finished.
    """
    missing = [sae for sae in wanted if not (run_folder(out, sae) / "done.json").exists()]
    if not missing:
        return
    more = f", nor are {len(missing) - 1} more of {len(wanted)} SAEs" if len(missing) > 1 else ""
    others = "" if len(missing) == len(wanted) else ", or evaluate the finished SAEs with --only"
    raise UserError(f"{missing[0].id} is not trained yet ({run_folder(out, missing[0])}){more}; run `olmoscope train` "
                    f"first{others}")


def validate_folder(folder: Path) -> Validation:
    """Check a release, an output folder's release or one SAE with the real SAELens, on held-out rows if they are near.

    Raises:
        UserError: there is nothing to check, or SAELens is not installed.
    """
    if (folder / "release").is_dir():
        folder = folder / "release"
    store = store_places(folder.parent).get("held_out")
    return validate(folder, rows=None if store is None or not (store / "manifest.json").exists()
                    else _first_rows(open_store(store)))


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
