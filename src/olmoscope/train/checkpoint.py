"""Checkpoints: one safetensors file holds everything that training needs to go on, and the SAE itself.

Tensors: those of `Step.tensors`. The rest (step, position in the stream, sums up to the last line of metrics, and the
seconds that it took: all that differs between runs which are otherwise the same) stands in the file's metadata as JSON.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from olmoscope.errors import UserError
from olmoscope.files import atomic_path
from olmoscope.recipe.training import Train
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.train.step import Step


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps stands in a run folder."""
    return run / "checkpoints" / f"step-{step:08d}.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted((run / "checkpoints").glob("step-*.safetensors"))


def step_of(path: Path) -> int:
    """After how many steps a checkpoint was written."""
    return int(path.stem.removeprefix("step-"))


def is_kept(train: Train, step: int) -> bool:
    """Whether the checkpoint after `step` steps stays when there is a newer one. One that a signal made in between does
    not: what is kept must not depend on when a run was stopped."""
    if train.checkpoints == "last":
        return False
    return step % (train.checkpoint_every if train.checkpoints == "all" else train.checkpoints.every) == 0


def kept_checkpoints(train: Train, steps: int) -> int:
    """How many checkpoints a run of so many steps has in the end."""
    return 1 + sum(is_kept(train, step) for step in range(1, steps))


def save_checkpoint(path: Path, step: Step, state: dict[str, Any]) -> None:
    """Write a checkpoint, atomically.

    Args:
        state: JSON values of the loop's own, given back by `load_checkpoint`.
    """
    sae = step.sae
    metadata = {"activation": step.activation, "k": sae.k, "normalize": sae.normalize, "step": step.count,
                "tokens": step.tokens, "loop": state}
    with atomic_path(path) as temporary:
        save_file({name: tensor.cpu() for name, tensor in step.tensors().items()}, temporary,
                  {"olmoscope": json.dumps(metadata)})


def load_checkpoint(path: Path, step: Step) -> dict[str, Any]:
    """Put a checkpoint into a fresh `Step` of the same SAE; returns the loop's own state.

    Raises:
        UserError: damaged file.
    """
    with _opened(path) as (metadata, file):
        step.restore(metadata["step"], metadata["tokens"], file.get_tensor)
        return dict(metadata["loop"])


def load_sae(path: Path) -> TopK | JumpReLU:
    """Only the SAE of a checkpoint, float32, on the CPU, as its training leaves it: one trained by BatchTopK is a
    JumpReLU whose latents share a threshold.

    Raises:
        UserError: damaged file.
    """
    with _opened(path) as (metadata, file):
        matrices = ("W",) if "W" in file.keys() else ("W_enc", "W_dec")  # noqa: SIM118  (the file is no mapping)
        parameters = {name: file.get_tensor(name) for name in (*matrices, "b_latent", "b_pre")}
        activation = metadata["activation"]
        kind = GroupMax if activation == "groupmax" else TopK
        sae = kind.of(parameters, metadata["k"], metadata["normalize"])
        if activation == "jumprelu":
            threshold_F = file.get_tensor("jumprelu.log_threshold").exp()
        elif activation == "batchtopk":
            threshold_F = file.get_tensor("batchtopk.threshold").float().repeat(sae.d_sae)
        else:
            return sae
        return JumpReLU(sae.W_enc_FD, sae.W_dec_FD, sae.b_pre_D, sae.normalize, sae.b_latent_F, threshold_F)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """A checkpoint's metadata and its file; what turns out to be wrong with it while it is open is a UserError."""
    try:
        with safe_open(path, "pt") as file:
            yield json.loads((file.metadata() or {})["olmoscope"]), file
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged or not a checkpoint of ours ({error}); delete it and train again: "
                        "an earlier checkpoint is used if there is one") from error
