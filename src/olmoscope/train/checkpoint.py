"""Checkpoints: everything that training needs to go on, and the SAE itself, in one safetensors file; or in several, of
an SAE that is trained in shards: each rank writes its shards, and the first one the rest when all are there.

Tensors: those of `Step.tensors`, or of `ShardedStep.shared_tensors` and `Shard.tensors`. The rest (step, position in
the stream, sums up to the last line of metrics, and the seconds that it took: all that differs between runs which are
otherwise the same) stands in the metadata as JSON. The files themselves, and the SAE in them, are the business of
sae/io/checkpoint.py.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.files import remove
from olmoscope.recipe.training import Train
from olmoscope.sae.io.checkpoint import AXES, SINKS, read_axes, read_sinks, write_checkpoint
from olmoscope.sae.io.checkpoint_file import (
    SHARED,
    is_complete,
    opened_checkpoint,
    opened_shard,
    shard_path,
    write_tensors,
)
from olmoscope.sae.sinks import Sinks
from olmoscope.train.ends import Ends
from olmoscope.train.sharded_step import ShardedStep
from olmoscope.train.step import Step


def checkpoint_path(run: Path, step: int, shards: int = 1) -> Path:
    """Where the checkpoint after `step` steps stands in a run folder: a file, or of several shards a folder."""
    return run / "checkpoints" / (f"step-{step:08d}.safetensors" if shards == 1 else f"step-{step:08d}")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if is_complete(path))


def clear_incomplete(run: Path) -> None:
    """Remove what a killed run left of checkpoints in shards; call it while holding the run folder."""
    for path in (run / "checkpoints").glob("step-*"):
        if not is_complete(path):
            remove(path)


def is_kept(train: Train, step: int) -> bool:
    """Whether the checkpoint after `step` steps stays when there is a newer one. One that a signal made in between does
    not: what is kept must not depend on when a run was stopped."""
    every = _kept_every(train)
    return every is not None and step % every == 0


def kept_checkpoints(train: Train, steps: int) -> int:
    """How many checkpoints a run of so many steps has in the end."""
    every = _kept_every(train)
    return 1 + (0 if every is None else (steps - 1) // every)


def _kept_every(train: Train) -> int | None:
    """Steps between checkpoints that stay; None: only the last one does."""
    if train.checkpoints == "last":
        return None
    return train.checkpoint_every if train.checkpoints == "all" else train.checkpoints.every


def save_checkpoint(path: Path, step: Step, state: dict[str, Any], ends: Ends | None = None) -> None:
    """Write a checkpoint, atomically.

    Args:
        ends: of the coder; None: those of an SAE of one site.
        state: JSON values of the loop's own, given back by `load_checkpoint`.
    """
    write_checkpoint(path, step.sae, step.activation, step.tensors() | _tensors(ends),
                     {"step": step.count, "tokens": step.tokens, "loop": state} | _said(ends))


def save_sharded(path: Path, step: ShardedStep, state: dict[str, Any], ends: Ends | None = None) -> None:
    """Write a checkpoint in shards; all ranks must do so. It is there when its shared file is.

    Args:
        ends, state: as in `save_checkpoint`.

    Raises:
        UserError: a rank cannot write (`Ranks.agreed`).
    """
    shards = step.shards[0].of
    with step.ranks.agreed():
        for shard in step.shards:
            write_tensors(shard_path(path, shard.number, shards), shard.tensors(), {"step": step.count})
    with step.ranks.agreed():
        if step.ranks.leads:
            write_checkpoint(path / SHARED, step.shards[0].sae, step.activation, step.shared_tensors() | _tensors(ends),
                             {"step": step.count, "tokens": step.tokens, "shards": shards, "loop": state} | _said(ends))


def sinks_of(path: Path) -> Sinks | None:
    """The sinks of a checkpoint's SAE.

    Raises:
        UserError: damaged file.
    """
    with opened_checkpoint(path) as (_, file):
        return read_sinks(file)


def axes_of(path: Path) -> Tensor | None:
    """The axes along which a checkpoint's SAE is trained; None: along the channels.

    Raises:
        UserError: damaged file.
    """
    with opened_checkpoint(path) as (_, file):
        return read_axes(file)


def scales_of(path: Path) -> tuple[float, ...]:
    """What a checkpoint's coder has the rows of each site read multiplied by.

    Raises:
        UserError: damaged file.
    """
    with opened_checkpoint(path) as (metadata, _):
        return tuple(metadata.get("scales", (1.0,)))


def _tensors(ends: Ends | None) -> dict[str, Tensor]:
    """The tensors of the sinks and of the axes, if there are any."""
    if ends is None:
        return {}
    sinks = {} if ends.sinks is None else ends.sinks.tensors()
    axes = {} if ends.axes_DD is None else {AXES: ends.axes_DD}
    return {f"{SINKS}.{name}": tensor for name, tensor in sinks.items()} | axes


def _said(ends: Ends | None) -> dict[str, Any]:
    """What the metadata says of a coder that is no SAE of one site; sae/io/checkpoint.py reads it."""
    if ends is None or ends.is_plain:
        return {}
    return {"transcoder": ends.is_transcoder, "scales": ends.scales, "widths": ends.widths}


def load_checkpoint(path: Path, step: Step) -> dict[str, Any]:
    """Put a checkpoint into a fresh `Step` of the same SAE; returns the loop's own state.

    Raises:
        UserError: damaged file.
    """
    with opened_checkpoint(path) as (metadata, file):
        step.restore(metadata["step"], metadata["tokens"], file.get_tensor)
        return dict(metadata["loop"])


def load_sharded(path: Path, step: ShardedStep) -> dict[str, Any]:
    """Put the shards of this rank, and what all share, into a fresh step; returns the loop's own state.

    Raises:
        UserError: a file is missing or damaged, or in another number of shards.
    """
    with opened_checkpoint(path) as (metadata, file):
        if metadata["shards"] != step.shards[0].of:
            raise UserError(f"{path} is in {metadata['shards']} shards, and train.shards is {step.shards[0].of}; set "
                            f"train.shards={metadata['shards']}, or choose another --out")
        for shard in step.shards:
            with opened_shard(path, shard.number, metadata) as own:
                shard.restore(metadata["step"], own.get_tensor)
        step.restore(metadata["step"], metadata["tokens"], file.get_tensor)
        return dict(metadata["loop"])
