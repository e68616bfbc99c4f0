"""Checkpoints: one safetensors file holds everything that training needs to go on, and the SAE itself.

Tensors: `W [F, D]`, `b_latent [F]`, `b_pre [D]`; `adam.<name>.first` and `.second` for each, and `adam.W.updated [F]`
where only touched rows are updated; `last_fired [F]`. The rest (step, position in the stream, sums since the last
line of metrics) stands in the file's metadata as JSON.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.files import atomic_path
from olmoscope.sae.rows import Normalize
from olmoscope.sae.tied_topk import TiedTopK
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
    sae = step.sae
    tensors = {"W": sae.W_FD, "b_latent": sae.b_latent_F, "b_pre": sae.b_pre_D, "last_fired": step.last_fired_F,
               "sums": step.sums}
    for name, moments in step.moments.items():
        tensors |= {f"adam.{name}.{part}": tensor for part, tensor in vars(moments).items() if tensor is not None}
    metadata = {"k": sae.k, "normalize": sae.normalize, "step": step.count, "tokens": step.tokens, "loop": state}
    with atomic_path(path) as temporary:
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, temporary,
                  {"olmoscope": json.dumps(metadata)})


def load_checkpoint(path: Path, step: Step) -> dict[str, Any]:
    """Put a checkpoint into a fresh `Step` of the same SAE; returns the loop's own state.

    Raises:
        UserError: damaged file.
    """
    metadata, tensors = _read(path, None)
    sae = step.sae
    for target, name in ((sae.W_FD, "W"), (sae.b_latent_F, "b_latent"), (sae.b_pre_D, "b_pre"),
                         (step.last_fired_F, "last_fired"), (step.sums, "sums")):
        target.copy_(tensors[name])
    for name, moments in step.moments.items():
        for part, tensor in vars(moments).items():
            if tensor is not None:
                tensor.copy_(tensors[f"adam.{name}.{part}"])
    step.count, step.tokens = metadata["step"], metadata["tokens"]
    return dict(metadata["loop"])


def load_sae(path: Path) -> TiedTopK:
    """Only the SAE of a checkpoint, float32, on the CPU.

    Raises:
        UserError: damaged file.
    """
    metadata, tensors = _read(path, ("W", "b_latent", "b_pre"))
    normalize: Normalize = metadata["normalize"]
    return TiedTopK(tensors["W"], tensors["b_latent"], tensors["b_pre"], metadata["k"], normalize)


def _read(path: Path, names: tuple[str, ...] | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["olmoscope"])
            return metadata, {name: file.get_tensor(name) for name in names or file.keys()}
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged or not a checkpoint of ours ({error}); delete it and train again: "
                        "an earlier checkpoint is used if there is one") from error
