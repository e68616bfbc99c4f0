"""Commands of a recipe's stages: demo, plan, collect, train."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from olmoscope.cli.options import FormOption, OnlyOption, OutOption, RecipeArgument, SetOption, WorkerOption
from olmoscope.errors import UserError
from olmoscope.terminal import say


def demo(out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("olmoscope-demo")) -> None:
    """The whole way once, on this machine: a tiny model reads Python's standard library."""
    from olmoscope.cli.demo import run_demo

    run_demo(out)


def plan(recipe: RecipeArgument, form: FormOption = None, changes: SetOption = None, out: OutOption = None,
         measure: Annotated[bool, typer.Option(
             "--measure", help="Time a few batches and training steps here, and say how many hours it takes.")] = False,
         ) -> None:
    """Check a recipe and say what it will cost, before anything starts; exits with 1 if the disk cannot hold it."""
    from olmoscope.cli import tables
    from olmoscope.cost.measure import measure as measure_rates
    from olmoscope.cost.plan import plan as make_plan
    from olmoscope.cost.plan import refuse_full_disk
    from olmoscope.recipe.load import find_recipe

    resolved, folder = find_recipe(recipe, out, form, changes or ())
    made = make_plan(resolved, folder, measure_rates(resolved) if measure else None)
    tables.show_plan(made)
    refuse_full_disk(made, folder)


def collect(recipe: RecipeArgument, form: FormOption = None, changes: SetOption = None, out: OutOption = None,
            worker: WorkerOption = None) -> None:
    """Run the model over the text and store its residual stream."""
    from olmoscope.activations.store.shares import parse_worker, worker_from_environment
    from olmoscope.cli import tables
    from olmoscope.pipeline import collect_stores
    from olmoscope.recipe.load import find_recipe

    resolved, folder = find_recipe(recipe, out, form, changes or ())
    who = parse_worker(worker) if worker else worker_from_environment(os.environ)
    if who.told_by:
        say(f"worker {who.index}/{who.count}, as {who.told_by} says", err=True)
    collected = collect_stores(resolved, folder, who)
    tables.show_stores(collected)
    tables.show_statistics(collected)


def train(recipe: RecipeArgument, form: FormOption = None, changes: SetOption = None, out: OutOption = None,
          only: OnlyOption = None,
          store: Annotated[Path | None, typer.Option("--store", help=(
              "Train on the activations of another output folder, or on one training store."))] = None,
          live: Annotated[bool, typer.Option("--live", help="Straight from the model: no store is needed.")] = False,
          log: Annotated[Literal["wandb", "tensorboard"] | None, typer.Option(
              "--log", help="Send metrics to a tracker as well.")] = None,
          ranks: Annotated[int, typer.Option("--ranks", metavar="N", min=1, help=(
              "In N processes on this machine, each with a GPU of its own; for several machines use torchrun."))] = 1,
          ) -> None:
    """Train the recipe's SAEs on the stored activations, or straight from the model."""
    from olmoscope.cli.study_tables import show_training_study
    from olmoscope.distributed.launch import join, leave
    from olmoscope.evaluate.study import study_of_training
    from olmoscope.pipeline import train_saes
    from olmoscope.progress import console
    from olmoscope.recipe.load import find_recipe, made_live

    if ranks > 1:
        _train_in_processes(ranks, recipe, form, changes, out, only)
        return
    world = join()
    console.quiet = not world.ranks.leads
    with world.ranks.agreed():
        resolved, folder = find_recipe(recipe, out, form, changes or ())
        if live and store is not None:
            raise UserError("--live and --store exclude each other: a live stream reads the model, not a store")
        if live and resolved.train.live is None:
            resolved = made_live(resolved)
    for sae, fresh in train_saes(resolved, folder, only or [], log, store, world):
        say(f"{sae.id}: trained" if fresh else f"{sae.id}: finished before, nothing to do")
    if world.ranks.leads and (study := study_of_training(resolved, folder)).seeds:
        show_training_study(study)
    leave()


def _train_in_processes(count: int, recipe: str, form: str | None, changes: list[str] | None, out: Path | None,
                        only: list[str] | None) -> None:
    """Give this same command, without `--ranks`, to several processes; what is wrong with it is said before."""
    import torch

    from olmoscope.distributed.launch import start
    from olmoscope.distributed.place import place_from_environment
    from olmoscope.model.load import pick_device
    from olmoscope.pipeline import chosen
    from olmoscope.recipe.load import find_recipe
    from olmoscope.train.teams import refuse_idle_ranks

    if told_by := place_from_environment(os.environ).told_by:
        raise UserError(f"--ranks {count}: {told_by} started this process as one of several already; leave out one of "
                        "the two")
    resolved, _ = find_recipe(recipe, out, form, changes or ())
    refuse_idle_ranks(resolved, chosen(resolved, only or []), count)
    if pick_device(resolved.device).type == "cuda" and count > torch.cuda.device_count():
        raise UserError(f"--ranks {count}: this machine has {torch.cuda.device_count()} GPUs, one for each process; "
                        "start no more than that, or set device=cpu")
    arguments = sys.argv[1:]
    place = next(number for number, argument in enumerate(arguments) if argument.partition("=")[0] == "--ranks")
    del arguments[place : place + (1 if "=" in arguments[place] else 2)]
    start(count, arguments)
