"""Checkpoints: one safetensors file holds everything that training needs to go on, and the SAE itself.

Tensors: those of `Step.tensors`. The rest (step, position in the stream, sums up to the last line of metrics, and the
seconds that it took: all that differs between runs which are otherwise the same) stands in the file's metadata as JSON.
The file itself, and the SAE in it, are the business of sae/io/checkpoint.py.
"""

from pathlib import Path
from typing import Any

from olmoscope.recipe.training import Train
from olmoscope.sae.io.checkpoint import SINKS, opened_checkpoint, read_sinks, write_checkpoint
from olmoscope.sae.sinks import Sinks
from olmoscope.train.ends import Ends
from olmoscope.train.step import Step


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps stands in a run folder."""
    return run / "checkpoints" / f"step-{step:08d}.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted((run / "checkpoints").glob("step-*.safetensors"))


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
    sinks = {} if ends is None or ends.sinks is None else {
        f"{SINKS}.{name}": tensor for name, tensor in ends.sinks.tensors().items()}
    write_checkpoint(path, step.sae, step.activation, step.tensors() | sinks,
                     {"step": step.count, "tokens": step.tokens, "loop": state} | _said(ends))


def sinks_of(path: Path) -> Sinks | None:
    """The sinks of a checkpoint's SAE.

    Raises:
        UserError: damaged file.
    """
    with opened_checkpoint(path) as (_, file):
        return read_sinks(file)


def scales_of(path: Path) -> tuple[float, ...]:
    """What a checkpoint's coder has the rows of each site read multiplied by.

    Raises:
        UserError: damaged file.
    """
    with opened_checkpoint(path) as (metadata, _):
        return tuple(metadata.get("scales", (1.0,)))


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
