"""Checkpoints: one safetensors file holds everything that training needs to go on, and the SAE itself.

Tensors: those of `Step.tensors`. The rest (step, position in the stream, sums up to the last line of metrics, and the
seconds that it took: all that differs between runs which are otherwise the same) stands in the file's metadata as JSON.
The file itself, and the SAE in it, are the business of sae/io/checkpoint.py.
"""

from pathlib import Path
from typing import Any

from olmoscope.sae.io.checkpoint import opened_checkpoint, write_checkpoint
from olmoscope.train.step import Step


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps stands in a run folder."""
    return run / "checkpoints" / f"step-{step:08d}.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted((run / "checkpoints").glob("step-*.safetensors"))


def save_checkpoint(path: Path, step: Step, state: dict[str, Any]) -> None:
    """Write a checkpoint, atomically.

    Args:
        state: JSON values of the loop's own, given back by `load_checkpoint`.
    """
    write_checkpoint(path, step.sae, step.activation, step.tensors(),
                     {"step": step.count, "tokens": step.tokens, "loop": state})


def load_checkpoint(path: Path, step: Step) -> dict[str, Any]:
    """Put a checkpoint into a fresh `Step` of the same SAE; returns the loop's own state.

    Raises:
        UserError: damaged file.
    """
    with opened_checkpoint(path) as (metadata, file):
        step.restore(metadata["step"], metadata["tokens"], file.get_tensor)
        return dict(metadata["loop"])
