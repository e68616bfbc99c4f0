"""A study: the runs of a recipe by setting, with mean and spread over seeds, and which settings are unbeaten.

Runs have the same setting if the seed of training is the only difference that affects the weights.
docs/metrics.md defines the figures; study.json has them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from olmoscope.errors import UserError
from olmoscope.evaluate.figures import DEAD, DECODER_COSINE, DELTA_CE, FVU, KL, L0, NMSE, RECOVERED
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.evaluate.stability import FIGURES as SAME_LATENTS
from olmoscope.evaluate.stability import SeedPair, read_stability
from olmoscope.files import read_json, write_text
from olmoscope.recipe.names import plain_text
from olmoscope.recipe.schema import CoderConfig, Recipe
from olmoscope.recipe.tree import leaves
from olmoscope.site import Site
from olmoscope.train.derived import settled
from olmoscope.train.run import run_folder

STUDY = "study.json"
FIGURES = (NMSE, FVU, L0, DEAD, DELTA_CE, RECOVERED, KL)
FRONTIERS = ("fvu", "delta_ce")
"""Errors that are compared against L0."""
SAME_L0 = 1.01
"""Two L0 whose ratio is below this count as equal: a few rows may have fewer than TopK's k active latents."""


@dataclass(frozen=True)
class StudyRun:
    """A run and its figures, by key; None if a figure is unknown."""

    id: str
    seed: int
    figures: Mapping[str, float | None]


@dataclass(frozen=True)
class Spread:
    """A figure over the runs of a setting; None if one of them does not have it."""

    mean: float | None
    sd: float | None
    """Sample standard deviation; None for a single run."""
    n: int


@dataclass(frozen=True)
class Setting:
    """Runs that differ only in the seed of training.

    Attributes:
        varies: what distinguishes it from the study's other settings, by the path of the key.
        unbeaten: for each error, whether no other setting of the site has a smaller error at the same or a smaller L0.
        pairs: the pairs of its runs whose latents were compared (stability.py).
    """

    name: str
    site: Site
    varies: Mapping[str, Any]
    runs: Sequence[StudyRun]
    figures: Mapping[str, Spread]
    unbeaten: Mapping[str, bool]
    pairs: Sequence[SeedPair] = ()

    def pairs_of_runs(self) -> list[tuple[str, str]]:
        """All pairs of its runs, by id."""
        return list(combinations([run.id for run in self.runs], 2))

    @property
    def stability(self) -> dict[str, Spread] | None:
        """The figures of `pairs`, by name; None unless all pairs were compared."""
        if not self.pairs or len(self.pairs) < len(self.pairs_of_runs()):
            return None
        return {key: _spread([getattr(pair, key) for pair in self.pairs]) for key in SAME_LATENTS}


@dataclass(frozen=True)
class Study:
    """All settings of an output folder."""

    recipe: str
    settings: Sequence[Setting]
    missing: Sequence[str]
    """Runs of the recipe that have no figures yet."""
    same_text: bool
    """Whether all runs were measured on the same tokens."""

    @property
    def seeds(self) -> bool:
        """Whether any setting has several runs."""
        return any(len(setting.runs) > 1 for setting in self.settings)

    @property
    def stability(self) -> bool:
        """Whether the latents of any setting's runs were compared."""
        return any(setting.stability for setting in self.settings)

    @property
    def compares(self) -> bool:
        """Whether there is anything to compare: seeds, or settings of one site."""
        sites = [setting.site for setting in self.settings]
        return self.seeds or len(set(sites)) < len(sites)


def study_of(recipe: Recipe, out: Path) -> Study:
    """The study of the evaluated runs of an output folder.

    Raises:
        UserError: no run is evaluated, or an evaluation is damaged.
    """
    evaluations = {sae.id: read_evaluation(path) for sae in recipe.saes
                   if (path := run_folder(out, sae) / EVALUATION).exists()}
    if not evaluations:
        raise UserError(f"no run of {out} is evaluated yet; run `olmoscope evaluate {out}` first")
    figures = {run: {figure.key: figure.value(evaluation) for figure in (*FIGURES, DECODER_COSINE)}
               for run, evaluation in evaluations.items()}
    texts = {(evaluation.text.tokens_hash, evaluation.rows, evaluation.language.rows)
             for evaluation in evaluations.values()}
    pairs = read_stability(out, {run: evaluation.run_hash for run, evaluation in evaluations.items()})
    return _study(recipe, figures, same_text=len(texts) == 1, pairs=pairs)


def study_of_training(recipe: Recipe, out: Path) -> Study:
    """The study of the finished runs of an output folder by the figures that training reports: NMSE, L0 and dead
    latents, on the training rows."""
    done = {sae.id: read_json(path) for sae in recipe.saes if (path := run_folder(out, sae) / "done.json").exists()}
    return _study(recipe, {run: {"nmse": one["nmse"], "l0": one["l0"], "dead": one["dead_share"]}
                           for run, one in done.items()}, same_text=True, pairs={})


def write_study(path: Path, study: Study) -> bool:
    """Write study.json, atomically; False if the same content was there already."""
    text = json.dumps(_tree(study), indent=2, allow_nan=False) + "\n"
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    write_text(path, text)
    return True


def _study(recipe: Recipe, figures: Mapping[str, Mapping[str, float | None]], same_text: bool,
           pairs: Mapping[frozenset[str], SeedPair]) -> Study:
    groups: dict[str, list[CoderConfig]] = {}
    for sae in recipe.saes:
        if sae.id in figures:
            groups.setdefault(json.dumps(_setting(recipe, sae), sort_keys=True), []).append(sae)
    trees = [dict(leaves(_setting(recipe, group[0]))) for group in groups.values()]
    varying = [key for key in dict.fromkeys(key for tree in trees for key in tree)
               if len({json.dumps(tree.get(key)) for tree in trees}) > 1]
    settings = []
    for name, group, tree in zip(_names(recipe, list(groups.values()), trees, varying), groups.values(), trees,
                                 strict=True):
        runs = [StudyRun(sae.id, settled(recipe, sae).seed, figures[sae.id]) for sae in group]
        setting = Setting(name, group[0].site, {key: tree.get(key) for key in varying}, runs,
                          {key: _spread([run.figures[key] for run in runs]) for key in runs[0].figures}, {})
        known = [pairs[both] for two in setting.pairs_of_runs() if (both := frozenset(two)) in pairs]
        settings.append(replace(setting, pairs=known))
    return Study(recipe.name, [_with_frontiers(setting, settings) for setting in settings],
                 [sae.id for sae in recipe.saes if sae.id not in figures], same_text)


def _setting(recipe: Recipe, sae: CoderConfig) -> dict[str, Any]:
    """Everything that affects the weights of a run, except the seed."""
    tree = recipe.run_identity(sae)
    tree["train"].pop("seed", None)
    return tree


def _names(recipe: Recipe, groups: list[list[CoderConfig]], trees: list[dict[str, Any]],
           varying: list[str]) -> list[str]:
    """The names of settings: those of their runs without the seeds or, if these differ within a setting, what
    varies."""
    found = []
    for group, tree in zip(groups, trees, strict=True):
        names = {re.sub(rf"_seed-{settled(recipe, sae).seed}(?=_|$)", "", sae.id) for sae in group}
        said = [f"{key.removeprefix('train.').removeprefix('sae.')}-{plain_text(tree.get(key))}" for key in varying
                if key.startswith("train.")]
        found.append(names.pop() if len(names) == 1 else "_".join([group[0].default_id, *said]))
    return [name if found.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(found, 1)]


def _spread(values: list[float | None]) -> Spread:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Spread(None, None, len(values))
    return Spread(mean(known), stdev(known) if len(known) > 1 else None, len(known))


def _with_frontiers(setting: Setting, all_: list[Setting]) -> Setting:
    unbeaten = {}
    for error in FRONTIERS:
        mine = _point(setting, error)
        if mine is not None:
            others = [point for other in all_ if other.site == setting.site and other is not setting
                      and (point := _point(other, error)) is not None]
            unbeaten[error] = not any(l0 <= SAME_L0 * mine[0] and value < mine[1] for l0, value in others)
    return replace(setting, unbeaten=unbeaten)


def _point(setting: Setting, error: str) -> tuple[float, float] | None:
    """Mean L0 and mean error."""
    l0, value = (setting.figures[key].mean if key in setting.figures else None for key in ("l0", error))
    return None if l0 is None or value is None else (l0, value)


def _tree(study: Study) -> dict[str, Any]:
    return {
        "format": "olmoscope study", "version": 1, "recipe": study.recipe, "same_text": study.same_text,
        "missing": list(study.missing),
        "settings": [{"setting": setting.name, "site": str(setting.site), "varies": dict(setting.varies),
                      "runs": [run.id for run in setting.runs], "seeds": [run.seed for run in setting.runs],
                      "figures": {key: vars(spread) for key, spread in setting.figures.items()},
                      "unbeaten": dict(setting.unbeaten), "stability": _stability_tree(setting)}
                     for setting in study.settings],
        "runs": [{"run": run.id, "setting": setting.name, "site": str(setting.site), "seed": run.seed, **run.figures}
                 for setting in study.settings for run in setting.runs]}


def _stability_tree(setting: Setting) -> dict[str, Any] | None:
    if (figures := setting.stability) is None:
        return None
    return {"figures": {key: vars(spread) for key, spread in figures.items()},
            "pairs": [pair.model_dump(mode="json", exclude={"hashes"}) for pair in setting.pairs]}
