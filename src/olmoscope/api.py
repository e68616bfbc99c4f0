"""What the commands collect, train, evaluate and index do, from Python: the same results, in the same places.

Each does what is missing and leaves the rest, so calling it again does nothing; each can be stopped at any moment and
called again. The commands are in cli/, the stages themselves in pipeline.py.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from olmoscope.activations.collect.run import Collected
from olmoscope.activations.store.shares import parse_worker, worker_from_environment
from olmoscope.distributed.launch import World, join
from olmoscope.errors import UserError
from olmoscope.evaluate import anywhere
from olmoscope.evaluate.behaviour import NOTHING_MORE, Behaviour
from olmoscope.evaluate.report import write_reports
from olmoscope.evaluate.results import EVALUATION, Evaluation, read_evaluation
from olmoscope.features.build import Indexed
from olmoscope.features.rows_of import index_sae
from olmoscope.pipeline import chosen, collect_stores, compare_seeds, evaluate_saes, report_saes, train_saes
from olmoscope.recipe.load import Overrides, find_recipe, made_live
from olmoscope.recipe.schema import Filter, Recipe
from olmoscope.sae.io.open import few, find_saes, is_run
from olmoscope.site import Site
from olmoscope.train.run import run_folder
from olmoscope.train.trackers import TrackerName

INDEXED_TOKENS = 1_000_000
"""How many tokens of a text are indexed by default."""


def collect(recipe: str | Path | Recipe, out: str | Path | None = None, *, form: str | None = None,
            overrides: Overrides = (), worker: str | None = None) -> list[Collected]:
    """Run a recipe's model over its text, and store the activations of its sites.

    Args:
        recipe: a YAML file, the name of a recipe in the package (`tiny`), or an output folder.
        out: the output folder; by default the one given as `recipe`, else one named after the recipe.
        form: a form of the recipe, e.g. `reference`.
        overrides: values that replace the recipe's, by the path of the key: `{"tokens.count": 1_000_000}`.
        worker: `I/N` collects only share I of N, counted from 0; by default the rank that torchrun or srun gives.

    Returns:
        The training store and the held-out one: where each is (`store`), what it holds (`manifest`), and how many
        segments this call made (`segments_made`; 0 if all were there).

    Raises:
        UserError: the recipe has a mistake; the model or the text cannot be loaded; `out` holds another recipe's store.

    Example:
        >>> import olmoscope
        >>> for collected in olmoscope.collect("olmoscope-demo"):
        ...     print(collected.manifest.split, collected.segments_made)
        train 0
        held_out 0
    """
    found, folder = find_recipe(recipe, out, form, overrides)
    return collect_stores(found, folder, parse_worker(worker) if worker else worker_from_environment(os.environ))


def train(recipe: str | Path | Recipe, out: str | Path | None = None, *, form: str | None = None,
          overrides: Overrides = (), only: Sequence[str] = (), store: str | Path | None = None, live: bool = False,
          log: TrackerName | None = None) -> list[Path]:
    """Train a recipe's SAEs, transcoders and crosscoders. Processes that torchrun or srun started share the work.

    Args:
        recipe, out, form, overrides: as in `collect`.
        only: ids of the SAEs to train; by default all.
        store: another output folder, or a training store, to read in place of the one in `out`.
        live: train straight from the model, without a store.
        log: also send metrics to `wandb` or `tensorboard`.

    Returns:
        The folder of each run, which `load` opens.

    Raises:
        UserError: the recipe has a mistake; there is no store; a run in `out` belongs to another recipe.

    Example:
        >>> import olmoscope
        >>> runs = olmoscope.train("olmoscope-demo")
        >>> olmoscope.load(runs[0]).d_sae
        4096
    """
    found, folder = find_recipe(recipe, out, form, overrides)
    if live and store is not None:
        raise UserError("--live and --store exclude each other: a live stream reads the model, not a store")
    if live and found.train.live is None:
        found = made_live(found)
    for _ in train_saes(found, folder, list(only), log, None if store is None else Path(store), join()):
        pass
    return [run_folder(folder, sae) for sae in chosen(found, list(only))]


def evaluate(saes: str | Path | Sequence[str | Path], *, only: Sequence[str] = (), text: str | Path | None = None,
             tokens: int | None = None, model: str | Path | None = None,
             dtype: Literal["auto", "bfloat16", "float32"] | None = None, site: Site | str | int | None = None,
             batch_tokens: int | None = None, bos: bool | None = None, behaviour: Behaviour = NOTHING_MORE,
             out: str | Path | None = None, stability: bool = False) -> list[Evaluation]:
    """Measure SAEs: how well they reconstruct, and how well the language model works with their reconstructions.
    Processes that torchrun or srun started share the work.

    Args:
        saes: an output folder, to evaluate its SAEs on its held-out text as its recipe says. Or one or several
            addresses that `load` opens, or whole releases; then the other arguments say how to evaluate them.
        only: ids of some SAEs of the output folder.
        text: a file, a folder, a dataset on the hub, or an output folder, to use its held-out text; by default the
            held-out text of the output folder near an SAE.
        tokens: how many tokens of the text to use at most; by default 100,000.
        model: the language model, if the SAEs do not name it, or the path of a copy of it.
        dtype: the language model's dtype; by default bfloat16 where the hardware has it, else float32.
        site: what the SAEs read, if they do not say.
        batch_tokens: tokens in one pass of the model; by default 16,384.
        bos: whether sequences begin with BOS, if the SAEs do not say; by default the tokenizer decides.
        behaviour: what else to measure (`olmoscope.evaluate.behaviour.Behaviour`): probing, absorption.
        out: where the results of SAEs from outside an output folder go; by default `evaluation`.
        stability: also compare the latents of an output folder's SAEs that differ only in the seed; the figures go
            to `study.json` there.

    Returns:
        The figures of each SAE, as `evaluation.json` holds them; docs/metrics.md defines them. Reports are written too.

    Raises:
        UserError: an SAE, a model or a text cannot be loaded, or they do not fit each other.

    Example:
        >>> import olmoscope
        >>> for one in olmoscope.evaluate("olmoscope-demo"):
        ...     print(one.site, one.d_sae, one.l0.mean <= 32, one.fvu < 1, one.language.kl >= 0)
        layers.3 4096 True True True
        layers.7 4096 True True True
    """
    job = evaluation_job([str(saes)] if isinstance(saes, str | Path) else [str(one) for one in saes], only=only,
                         text=text, tokens=tokens, model=model, dtype=dtype, site=site, batch_tokens=batch_tokens,
                         bos=bos, behaviour=behaviour, out=out, stability=stability)
    return [read_evaluation(one.folder / EVALUATION) for one in job.run(join()).saes]


@dataclass(frozen=True)
class EvaluationJob:
    """Which SAEs to evaluate, and how; `evaluation_job` has checked it.

    Attributes:
        saes: their addresses; with a recipe, its output folder.
        only: ids of some SAEs of the recipe.
        recipe: says how to evaluate the SAEs of an output folder; None for SAEs from anywhere.
        options: say how to evaluate SAEs from anywhere.
        behaviour: what else to measure.
        stability: whether to compare the SAEs that differ only in the seed.
    """

    saes: list[str]
    only: list[str]
    recipe: Recipe | None
    options: anywhere.Options
    behaviour: Behaviour
    stability: bool

    def run(self, world: World, tell: Callable[[str], object] = lambda line: None) -> "EvaluationDone":
        """Evaluate the SAEs and write the reports. All processes must call this.

        Args:
            tell: is given a line for each SAE and each pair of seeds, in the first process.
        """
        leads = world.ranks.leads
        if self.recipe is None:
            saes = anywhere.evaluate_anywhere(self.saes, self.options, world)
        else:
            folder = Path(self.saes[0])
            saes = [anywhere.Evaluated(sae.id, run_folder(folder, sae), fresh) for sae, fresh in
                    evaluate_saes(self.recipe, folder, self.only, self.behaviour, world)]
        with world.ranks.agreed():
            if not leads:
                return EvaluationDone(saes, [])
            for one in saes:
                where = f", {one.folder}" if self.recipe is None else ""
                tell(f"{one.name}: " + (f"evaluated{where}" if one.fresh else "already evaluated, nothing to do"))
            if self.recipe is None:
                return EvaluationDone(saes, write_reports([one.folder for one in saes], self.options.out))
            for pair, fresh in compare_seeds(self.recipe, folder) if self.stability else ():
                tell(f"{pair.runs[0]}, {pair.runs[1]}: "
                     + ("compared" if fresh else "already compared, nothing to do"))
            return EvaluationDone(saes, report_saes(self.recipe, folder))


@dataclass(frozen=True)
class EvaluationDone:
    """The evaluated SAEs, and in the first process the reports; the last report has all SAEs."""

    saes: list[anywhere.Evaluated]
    reports: list[Path]


def evaluation_job(saes: list[str], *, only: Sequence[str] = (), text: str | Path | None = None,
                   tokens: int | None = None, model: str | Path | None = None,
                   dtype: Literal["auto", "bfloat16", "float32"] | None = None, site: Site | str | int | None = None,
                   batch_tokens: int | None = None, bos: bool | None = None, behaviour: Behaviour = NOTHING_MORE,
                   out: str | Path | None = None, stability: bool = False,
                   spelled: Callable[[str], str] = str) -> EvaluationJob:
    """Check what `evaluate` was asked; its arguments.

    Args:
        spelled: how the user spells the name of an argument, for messages.

    Raises:
        UserError: arguments that exclude each other or do nothing; or a damaged recipe.
    """
    here = is_output_folder(saes)
    if (only or stability) and not here and len(saes) == 1 and text is model is out is None:
        raise UserError(f"{saes[0]} is not an output folder, and {spelled('only' if only else 'stability')} is for "
                        "one: give the folder that `olmoscope train` wrote, with a recipe.yaml in it")
    if stability and (only or not here or not text is model is out is None):
        raise UserError(f"{spelled('stability')} compares all seeds of an output folder's settings; give one output "
                        f"folder, and no {spelled('only')}, {spelled('text')}, {spelled('model')} or {spelled('out')}")
    settings = {"site": site, "tokens": tokens, "dtype": dtype, "batch_tokens": batch_tokens, "bos": bos}
    given = {name: value for name, value in settings.items() if value is not None}
    by_recipe = here and text is model is out is None
    if by_recipe and given:
        raise UserError(f"{spelled(next(iter(given)))} does nothing here: the SAEs of {saes[0]} are evaluated as its "
                        f"recipe says; give {spelled('text')} (a text, or the output folder again) to evaluate them "
                        "otherwise")
    if only and not by_recipe:
        raise UserError(f"{spelled('only')} is for the SAEs of one output folder; name the SAEs themselves instead")
    if site is not None:
        given["site"] = Site.parse(site)
    options = anywhere.Options(Path(out or "evaluation"), None if text is None else str(text),
                               model=None if model is None else str(model), behaviour=behaviour,
                               **given)  # type: ignore[arg-type]
    recipe = find_recipe(saes[0])[0] if by_recipe else None
    return EvaluationJob(saes, list(only), recipe, options, behaviour, stability)


def is_output_folder(saes: Sequence[str]) -> bool:
    """Whether `saes` names one output folder; its recipe then says how to evaluate its SAEs."""
    first = Path(saes[0]) if saes else Path()
    return len(saes) == 1 and (first / "recipe.yaml").is_file() and not (first / "done.json").is_file()


def index(sae: str | Path, *, store: str | Path | None = None, text: str | Path | None = None,
          out: str | Path | None = None, model: str | Path | None = None, site: Site | str | int | None = None,
          tokens: int | None = None, bos: bool | None = None, skip_first: int = 0, skip_special: bool = False,
          max_norm: float | None = None) -> list[Indexed]:
    """Index what each feature of an SAE fires on, for `olmoscope browse`. Processes that torchrun or srun started share
    the work.

    Args:
        sae: any address that `load` opens; for an output folder or a release, all SAEs in it.
        store: the activation store to index; by default the training store of the SAE's output folder.
        text: a file, a folder or a dataset on the hub for the model to read now, in place of a store.
        out: the index's folder; by default `index` in the run's folder.
        model: the language model, if the SAE does not name it, or the path of a copy of it.
        site: what the SAE reads, if it does not say.
        tokens: how many tokens of a text to index at most; by default 1,000,000.
        bos: whether sequences of a text begin with BOS, if the SAE does not say; by default the tokenizer decides.
        skip_first: leave out this many positions at the start of each sequence.
        skip_special: leave out tokens that the tokenizer calls special.
        max_norm: leave out rows whose norm is more than this many times the median at any site of the store.

    Returns:
        For each SAE, where its index is (`folder`), what is in it (`info`) and whether this call made it (`fresh`).

    Raises:
        UserError: an SAE, a model, a store or a text cannot be loaded, or they do not fit each other; `out` holds
            another index.

    Example:
        >>> import olmoscope
        >>> [one] = olmoscope.index("olmoscope-demo/runs/layer_07/width_4096/topk_32_raw_untied")
        >>> one.info.sae.name, one.info.sae.d_sae
        ('layer_07/width_4096/topk_32_raw_untied', 4096)
    """
    if text is None and tokens is not None:
        raise UserError("--tokens is for --text: a store is indexed whole")
    if max_norm is not None and max_norm <= 1:
        raise UserError(f"--max-norm {max_norm:g}: it is a multiple of the median norm, so it must be over 1")
    named = find_saes(str(sae))
    if len(named) > 1 and not all(map(is_run, named)):
        raise UserError(f"{sae} holds {len(named)} SAEs of other tools; index one at a time, with --out for its index: "
                        f"{few(named)}")
    if out is not None and len(named) > 1:
        raise UserError(f"{sae} holds {len(named)} SAEs, which cannot share the index {out}; name one, or leave "
                        "out --out")
    filter_ = Filter(special_tokens=skip_special, first_positions=skip_first, max_norm=max_norm)
    world = join()
    return [index_sae(one, store=None if store is None else Path(store), text=None if text is None else str(text),
                      out=None if out is None else Path(out), model_name=None if model is None else str(model),
                      site=None if site is None else Site.parse(site), tokens=tokens or INDEXED_TOKENS, bos=bos,
                      filter_=filter_, world=world) for one in named]
