"""The training loop: several SAEs share one pass over the activations, and each trains as if it were alone.

With a store, the SAEs of the same site share a pass; with the live model, all SAEs share its forward passes. SAEs whose
batches differ (`STREAM`: size, order, epochs, filter) cannot share a pass, so such groups train one after the other.
After a kill, the SAEs of a group may be at different checkpoints. The stream then resumes from the earliest one, and
SAEs that are ahead skip the batches that they have already seen.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from olmoscope.activations.store.reader import Store
from olmoscope.activations.stream.batches import Stream
from olmoscope.activations.stream.filters import keep_of_store
from olmoscope.activations.stream.live import open_live
from olmoscope.activations.stream.rounds import Rounds, StoreRounds
from olmoscope.distributed.launch import World
from olmoscope.distributed.ranks import Ranks
from olmoscope.errors import LostRankError, UserError
from olmoscope.files import clean_temporary, locked
from olmoscope.kernels.dispatch import kernels_for
from olmoscope.kernels.prepare import prepare_kernels
from olmoscope.model.load import pick_device
from olmoscope.model.splice import load_causal_lm
from olmoscope.model_source import at_revision
from olmoscope.progress import bar, console
from olmoscope.recipe.schema import CoderConfig, Recipe, Train
from olmoscope.site import Site
from olmoscope.train.checkpoint import clear_incomplete
from olmoscope.train.derived import Settled, settled
from olmoscope.train.finish import SequenceReader
from olmoscope.train.interrupt import deferred_interrupts
from olmoscope.train.memory import training_memory
from olmoscope.train.refusals import refuse_other_run, refuse_other_store
from olmoscope.train.run import Run, run_folder
from olmoscope.train.shared_batches import shared_batches
from olmoscope.train.teams import assign
from olmoscope.train.trackers import Tracker, TrackerName, open_tracker

FIT_SHARE = 0.9
"""The share of the free memory that training may take. The rest is for batches in transfer and for libraries."""


LOOK_STEPS = 8
"""Every how many steps the ranks ask each other whether one of them has received a signal."""

STREAM = ("batch", "order", "epochs", "filter", "live", "together")
"""Keys of `train` that must be equal for SAEs to share a pass."""


def train_from_store(recipe: Recipe, saes: list[CoderConfig], store: Store, out: Path,
                     tracker: TrackerName | None = None,
                     world: World = World()) -> Iterator[tuple[CoderConfig, bool]]:  # noqa: B008 (frozen)
    """Train SAEs of a recipe from a store; the SAEs of a site train together.

    Args:
        tracker: where metrics go besides the run folder.
        world: the processes that train; each must call this.

    Yields:
        Each SAE when it is done, and whether it was trained now; False if it was finished before. With several
        processes, only the process that wrote an SAE's folder yields it.

    Raises:
        UserError: the store belongs to another recipe or is damaged; a folder holds another run; another process trains
            in it; or a loss is not finite (the other SAEs of its group are finished first).
        KeyboardInterrupt: a signal stopped training; checkpoints were saved first.
    """
    device = pick_device(recipe.device, world.place.local_index)
    with world.ranks.agreed():
        for sae in saes:
            refuse_other_store(recipe, sae, store)
            refuse_other_run(recipe, sae, run_folder(out, sae))
    assigned, finished = _assigned(recipe, saes, out, device, world)
    yield from ((sae, False) for sae in finished)
    with world.ranks.agreed():  # a team that fails waits for the others
        for ranks, mine in assigned:
            share = ranks.index, ranks.count
            for sites in sorted({tuple(sae.sites) for sae in mine}):
                for train, group in by_stream(recipe, [sae for sae in mine if tuple(sae.sites) == sites]):

                    def open_rounds(sites: list[Site], train: Train = train,
                                    share: tuple[int, int] = share) -> Rounds:
                        kept = keep_of_store(train.filter, store, recipe.activations.sites)
                        return StoreRounds(store, sites, train.order, recipe.seed, kept, share)

                    yield from _train(recipe, group, open_rounds, out, tracker, device, ranks)


def train_live(recipe: Recipe, saes: list[CoderConfig], store: Path, out: Path,
               tracker: TrackerName | None = None,
               world: World = World()) -> Iterator[tuple[CoderConfig, bool]]:  # noqa: B008 (frozen)
    """Train SAEs of a recipe directly from its model. All SAEs of a team of processes train together, and each team
    runs the model for itself.

    Args:
        store: the folder of the training split's store, which will hold tokens only.
        tracker: where metrics go besides the run folder.
        world: the processes that train; each must call this.

    Yields, Raises: as `train_from_store`.
    """
    device = pick_device(recipe.device, world.place.local_index)
    with world.ranks.agreed():
        for sae in saes:
            refuse_other_run(recipe, sae, run_folder(out, sae))
    assigned, finished = _assigned(recipe, saes, out, device, world)
    yield from ((sae, False) for sae in finished)
    with world.ranks.agreed():  # a team that fails waits for the others
        for ranks, mine in assigned:
            for train, group in by_stream(recipe, mine):
                like_these = recipe.model_copy(update={"train": train})

                def open_rounds(sites: list[Site], like_these: Recipe = like_these, ranks: Ranks = ranks) -> Rounds:
                    return open_live(like_these, sites, "train", store, device, ranks)

                yield from _train(recipe, group, open_rounds, out, tracker, device, ranks)


def _assigned(recipe: Recipe, saes: list[CoderConfig], out: Path, device: torch.device,
              world: World) -> tuple[list[tuple[Ranks, list[CoderConfig]]], list[CoderConfig]]:
    """Compile, then return the result of `assign`, and on the first rank also the finished SAEs that no team has."""
    if world.ranks.count > 1:
        with world.ranks.agreed():
            if world.place.local_index == 0:  # one process per machine compiles
                _prepare(recipe, saes, device)
    assigned = assign(recipe, saes, lambda sae: _is_done(out, sae), device, world)
    mine = [sae for _, group in assigned for sae in group]
    first = world.ranks.count > 1 and world.ranks.leads
    return assigned, [sae for sae in saes if first and sae not in mine and _is_done(out, sae)]


def by_stream(recipe: Recipe, saes: list[CoderConfig]) -> list[tuple[Train, list[CoderConfig]]]:
    """SAEs in groups that can share a pass, each with the settings of its first SAE: the keys in `STREAM` are equal."""
    groups: list[tuple[Settled, list[CoderConfig]]] = []
    for sae in saes:
        train = settled(recipe, sae)
        for other, group in groups:
            if all(getattr(train, key) == getattr(other, key) for key in STREAM):
                group.append(sae)
                break
        else:
            groups.append((train, [sae]))
    return list(groups)


def _train(recipe: Recipe, saes: list[CoderConfig], open_rounds: Callable[[list[Site]], Rounds], out: Path,
           tracker: TrackerName | None, device: torch.device, ranks: Ranks) -> Iterator[tuple[CoderConfig, bool]]:
    """Train SAEs that share a pass, as many at once as fit into memory."""
    missing = [sae for sae in saes if not _is_done(out, sae)]
    yield from ((sae, False) for sae in saes if sae not in missing)
    if not missing:
        return
    with ranks.agreed():
        _prepare(recipe, missing, device)
        rounds = open_rounds(sorted({site for sae in missing for site in sae.sites}))
    reader = SequenceReader(cache(lambda: load_causal_lm(at_revision(recipe.model, rounds.manifest.model.revision),
                                                         device)),
                            [site for site in rounds.sites if not site.model], rounds.tokens,
                            recipe.tokens.documents == "apart", ranks, rounds.manifest.width)
    while missing:
        count = min(ranks.ask(how_many(recipe, missing, rounds.manifest.width, device, ranks.count)))
        group, missing = missing[:count], missing[count:]
        with contextlib.ExitStack() as held:
            trackers: list[Tracker | None] = [None] * len(group)
            with ranks.agreed():
                if ranks.leads:
                    trackers = [_hold(held, tracker, recipe, sae, run_folder(out, sae)) for sae in group]
            runs = []
            for sae, each in zip(group, trackers, strict=True):
                with ranks.agreed():
                    runs.append(Run(recipe, sae, rounds, run_folder(out, sae), device, reader, each, ranks))
            _train_group(runs, rounds, device, ranks)
        if ranks.leads:
            yield from ((sae, True) for sae in group)


def _prepare(recipe: Recipe, saes: list[CoderConfig], device: torch.device) -> None:
    """Compile the kernels that the steps of these SAEs call."""
    prepare_kernels(device, candidates=any(recipe.train_of(sae).candidates is not None for sae in saes))


def _is_done(out: Path, sae: CoderConfig) -> bool:
    return (run_folder(out, sae) / "done.json").exists()


def _hold(held: contextlib.ExitStack, tracker: TrackerName | None, recipe: Recipe, sae: CoderConfig,
          run: Path) -> Tracker | None:
    """Lock a run folder until `held` ends, remove what a killed process left in it, and open its tracker."""
    held.enter_context(locked(run, "training"))
    clean_temporary(run)
    clear_incomplete(run)
    return held.enter_context(open_tracker(tracker, recipe, sae, run))


def _train_group(runs: list[Run], rounds: Rounds, device: torch.device, ranks: Ranks) -> None:
    """Train all SAEs of a group to the end. An SAE whose loss is not finite drops out, and its error is raised when the
    others are done.

    All ranks stop if one of them cannot read a round. Every `LOOK_STEPS` steps, they ask each other whether one has
    received a signal; if so, all of them stop.
    """
    steps, settings = runs[0].steps, runs[0].settings
    behind = min(runs, key=lambda run: run.step.count)
    done = behind.step.count
    failures: list[UserError] = []
    console.print(f"training {', '.join(run.spec.id for run in runs)}", highlight=False)
    _say_notices(runs)
    lines: dict[Run, dict[str, Any]] = {}
    stream = Stream(rounds, settings.batch, settings.epochs)
    stream.restore(behind.position)
    look_every = 1 if ranks.count == 1 else LOOK_STEPS
    with contextlib.closing(stream), \
            contextlib.closing(shared_batches(stream, device, steps - done, ranks)) as batches, \
            deferred_interrupts() as interrupted, \
            bar("training", stream.rows * settings.epochs, "tokens", done=behind.step.tokens) as advance:
        while done < steps and runs:
            try:
                batch = next(batches)
            except LostRankError:
                raise
            except UserError as error:
                _stop(runs, str(error))
                raise
            for run in [run for run in runs if run.step.count == done]:
                try:
                    if line := run.train_on(batch.rows, batch.position):
                        lines[run] = line
                except UserError as error:
                    run.log(str(error))
                    failures.append(error)
                    runs = [other for other in runs if other is not run]
            done += 1
            advance(len(next(iter(batch.rows.values()))), _note(list(lines.values())))
            if done % look_every == 0 and any(ranks.ask(interrupted())):
                _stop(runs, "stopped by a signal")
                raise KeyboardInterrupt
    for run in runs:
        run.finish()
    if failures:
        raise failures[0]


def _say_notices(runs: list[Run]) -> None:
    """Print what to know about each run, and what is the same for several runs only once."""
    for notice in dict.fromkeys(notice for run in runs for notice in run.notices):
        ids = [run.spec.id for run in runs if notice in run.notices]
        who = f"each of these {len(ids)}" if len(ids) == len(runs) > 1 else ", ".join(ids)
        console.print(f"{who}: {notice.text}", style="yellow" if notice.warning else None, markup=False,
                      highlight=False, soft_wrap=True)


def _note(lines: list[dict[str, Any]]) -> str:
    """The latest metrics of a group, short enough for the end of a progress bar; ranges if there are several SAEs."""
    def span(name: str, form: str) -> str:
        texts = [f"{value:{form}}" for value in sorted(line[name] for line in lines if line[name] is not None)]
        if not texts:
            return "-"  # dead latents, before the window is full
        return texts[0] if texts[0] == texts[-1] else f"{texts[0]}-{texts[-1]}"

    return f"loss {span('loss', '.3f')} L0 {span('l0', '.1f')} dead {span('dead_share', '.1%')}" if lines else ""


def _stop(runs: list[Run], why: str) -> None:
    for run in runs:
        run.save()
        run.log(f"{why} after step {run.step.count}")


def how_many(recipe: Recipe, saes: list[CoderConfig], width: Callable[[Site], int], device: torch.device,
             ranks: int = 1) -> int:
    """How many of these SAEs, which share a pass, to train at once, counted from the first SAE; at least one.

    Args:
        width: gives the width of a site's rows.
        ranks: how many ranks train them together.
    """
    together = recipe.train_of(saes[0]).together
    if together != "fit":
        return together
    free = FIT_SHARE * _free_memory(device)
    count = held = step = 0
    for sae in saes:
        needed = training_memory(recipe, sae, width, kernels_for(device), ranks)
        held, step = held + needed.held, max(step, needed.step)
        if held + step > free:
            break
        count += 1
    return max(1, count)


def _free_memory(device: torch.device) -> int:
    """How many bytes this process may still allocate on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # MemAvailable includes what the page cache would give back
        lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
