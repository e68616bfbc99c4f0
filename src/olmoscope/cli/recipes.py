"""Commands that run the stages of a recipe: demo, plan, collect, train."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from olmoscope.cli.options import (
    FormOption,
    OnlyOption,
    OutOption,
    RanksOption,
    RecipeArgument,
    SetOption,
    WorkerOption,
)
from olmoscope.errors import UserError
from olmoscope.terminal import say


def demo(out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("olmoscope-demo")) -> None:
    """Run every stage once on this machine: a tiny model reads Python's standard library."""
    from olmoscope.cli.demo import run_demo

    run_demo(out)


def plan(recipe: RecipeArgument, form: FormOption = None, changes: SetOption = None, out: OutOption = None,
         measure: Annotated[bool, typer.Option(
             "--measure", help="Time a few batches and training steps on this machine; estimate the hours.")] = False,
         store: Annotated[Path | None, typer.Option("--store", help=(
             "Plan to train on this store, as `train --store` does, instead of making one."))] = None,
         ranks: Annotated[int, typer.Option("--ranks", metavar="N", min=1, help=(
             "Show how N processes would share the training, what memory each needs, and how much it sends."))] = 1,
         nodes: Annotated[int, typer.Option("--nodes", metavar="M", min=1, help=(
             "The number of machines that the N processes are on."))] = 1,
         ) -> None:
    """Check a recipe and show what it will cost, before anything runs; exits with 1 if the disk is too small."""
    from olmoscope.cli.plan_tables import show_plan
    from olmoscope.cost.measure import measure as measure_rates
    from olmoscope.cost.plan import plan as make_plan
    from olmoscope.cost.plan import refuse_full_disk
    from olmoscope.files import nearest_folder
    from olmoscope.recipe.load import find_recipe

    resolved, folder = find_recipe(recipe, out, form, changes or ())
    rates = measure_rates(resolved, store=nearest_folder(store or folder)) if measure else None
    made = make_plan(resolved, folder, rates, ranks, store, nodes)
    show_plan(made)
    refuse_full_disk(made, folder)


def collect(recipe: RecipeArgument, form: FormOption = None, changes: SetOption = None, out: OutOption = None,
            worker: WorkerOption = None, ranks: RanksOption = 1) -> None:
    """Run the model over the text and store its activations at the recipe's sites."""
    from olmoscope.activations.store.shares import Worker, parse_worker, worker_from_environment
    from olmoscope.cli import tables
    from olmoscope.cli.processes import by_us, one_tells, start_here
    from olmoscope.pipeline import collect_stores
    from olmoscope.progress import console
    from olmoscope.recipe.load import find_recipe

    if ranks > 1 and worker:
        raise UserError("--ranks and --worker exclude each other: with --ranks each process is a worker; leave out one "
                        "of the two")
    resolved, folder = find_recipe(recipe, out, form, changes or ())
    if ranks > 1:
        before = {path.parent: _segments(path.parent) for path in (folder / "store").rglob("manifest.json")}
        start_here(ranks, resolved.device, "finished segments are kept; run the same command again to make the rest")
        who = Worker()  # makes what is left, if anything, and reports on all of it
    else:
        who = parse_worker(worker) if worker else worker_from_environment(os.environ)
    if by_us():
        console.quiet = who.index > 0
        with one_tells():
            collect_stores(resolved, folder, who)
        return
    if who.told_by:
        say(f"worker {who.index}/{who.count}, as set by {who.told_by}", err=True)
    collected = collect_stores(resolved, folder, who)
    if ranks > 1:
        collected = [replace(one, segments_made=_segments(one.store) - before.get(one.store, 0)) for one in collected]
    tables.show_stores(collected)
    tables.show_statistics(collected)


def _segments(store: Path) -> int:
    """How many segments of a store are finished."""
    from olmoscope.activations.store.inspect import finished_segments

    return len(finished_segments(store))


def train(recipe: RecipeArgument, form: FormOption = None, changes: SetOption = None, out: OutOption = None,
          only: OnlyOption = None,
          store: Annotated[Path | None, typer.Option("--store", help=(
              "Train on the activations of another output folder, or on one training store."))] = None,
          live: Annotated[bool, typer.Option("--live", help="Train straight from the model, without a store.")] = False,
          log: Annotated[Literal["wandb", "tensorboard"] | None, typer.Option(
              "--log", help="Also send metrics to this tracker.")] = None,
          ranks: Annotated[int, typer.Option("--ranks", metavar="N", min=1, help=(
              "Run N processes on this machine, each with its own GPU; for several machines use torchrun."))] = 1,
          ) -> None:
    """Train the recipe's SAEs on the stored activations, or straight from the model."""
    from olmoscope.cli.processes import join_quietly
    from olmoscope.cli.study_tables import show_training_study
    from olmoscope.distributed.launch import leave
    from olmoscope.evaluate.study import study_of_training
    from olmoscope.pipeline import train_saes
    from olmoscope.recipe.load import find_recipe, made_live

    if ranks > 1:
        _train_in_processes(ranks, recipe, form, changes, out, only)
        return
    world = join_quietly()
    with world.ranks.agreed():
        resolved, folder = find_recipe(recipe, out, form, changes or ())
        if live and store is not None:
            raise UserError("--live and --store exclude each other: a live stream reads the model, not a store")
        if live and resolved.train.live is None:
            resolved = made_live(resolved)
    for sae, fresh in train_saes(resolved, folder, only or [], log, store, world):
        say(f"{sae.id}: trained" if fresh else f"{sae.id}: already trained, nothing to do")
    if world.ranks.leads and (study := study_of_training(resolved, folder)).seeds:
        show_training_study(study)
    leave()


def _train_in_processes(count: int, recipe: str, form: str | None, changes: list[str] | None, out: Path | None,
                        only: list[str] | None) -> None:
    """Run this command, without `--ranks`, in several processes, after checking it for mistakes."""
    from olmoscope.cli.processes import refuse_started, start_here
    from olmoscope.pipeline import chosen
    from olmoscope.recipe.load import find_recipe
    from olmoscope.train.teams import refuse_idle_ranks

    refuse_started(count)
    resolved, _ = find_recipe(recipe, out, form, changes or ())
    refuse_idle_ranks(resolved, chosen(resolved, only or []), count)
    start_here(count, resolved.device, "the checkpoints are whole: run the same command again to continue from the "
               "last one")
