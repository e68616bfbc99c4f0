"""Checkpoints: everything that training needs to continue, and the SAE itself, in one safetensors file. An SAE that is
trained in shards has several files: each rank writes its shards; when all are written, the first rank writes the rest.

The tensors are those of `Step.tensors`, or of `ShardedStep.shared_tensors` and `Shard.tensors`. The metadata holds the
rest as JSON: the step, the position in the stream, the sums up to the last line of metrics, and the seconds that
training took (the only thing that differs between otherwise equal runs). sae/io/checkpoint.py defines the files
themselves, and reads the SAE in them.
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
    """The path of the checkpoint after `step` steps in a run folder: a file, or a folder if it has several shards."""
    return run / "checkpoints" / (f"step-{step:08d}.safetensors" if shards == 1 else f"step-{step:08d}")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if is_complete(path))


def clear_incomplete(run: Path) -> None:
    """Remove incomplete sharded checkpoints that a killed run left. The caller must hold the run folder's lock."""
    for path in (run / "checkpoints").glob("step-*"):
        if not is_complete(path):
            remove(path)


def is_kept(train: Train, step: int) -> bool:
    """Whether the checkpoint after `step` steps is kept when there is a newer one. A checkpoint that was written
    because of a signal is not kept: which ones are kept must not depend on when a run was stopped."""
    every = _kept_every(train)
    return every is not None and step % every == 0


def kept_checkpoints(train: Train, steps: int) -> int:
    """How many checkpoints a run of `steps` steps has in the end."""
    every = _kept_every(train)
    return 1 + (0 if every is None else (steps - 1) // every)


def _kept_every(train: Train) -> int | None:
    """The number of steps between kept checkpoints; None if only the last one is kept."""
    if train.checkpoints == "last":
        return None
    return train.checkpoint_every if train.checkpoints == "all" else train.checkpoints.every


def save_checkpoint(path: Path, step: Step, state: dict[str, Any], ends: Ends | None = None) -> None:
    """Write a checkpoint, atomically.

    Args:
        ends: the coder's ends; None for an SAE of one site.
        state: JSON values of the training loop, which `load_checkpoint` returns.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    write_checkpoint(path, step.sae, step.activation, step.tensors() | _tensors(ends),
                     {"step": step.count, "tokens": step.tokens, "loop": state} | _said(ends))


def save_sharded(path: Path, step: ShardedStep, state: dict[str, Any], ends: Ends | None = None) -> None:
    """Write a checkpoint in shards; all ranks must call this. The checkpoint is complete when its shared file is there.

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
    """The axes along which a checkpoint's SAE is trained, `[D, D]`; None if it is trained along the channels.

    Raises:
        UserError: damaged file.
    """
    with opened_checkpoint(path) as (_, file):
        return read_axes(file)


def scales_of(path: Path) -> tuple[float, ...]:
    """The factors by which a checkpoint's coder multiplies the rows of each site that it reads.

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
    """Metadata of a coder that is not an SAE of one site; sae/io/checkpoint.py reads it."""
    if ends is None or ends.is_plain:
        return {}
    return {"transcoder": ends.is_transcoder, "scales": ends.scales, "widths": ends.widths}


def load_checkpoint(path: Path, step: Step) -> dict[str, Any]:
    """Load a checkpoint into a fresh `Step` of the same SAE; return the state of the training loop.

    Raises:
        UserError: damaged file.
    """
    with opened_checkpoint(path) as (metadata, file):
        step.restore(metadata["step"], metadata["tokens"], file.get_tensor)
        return dict(metadata["loop"])


def load_sharded(path: Path, step: ShardedStep) -> dict[str, Any]:
    """Load this rank's shards, and what all ranks share, into a fresh step; return the state of the training loop.

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
