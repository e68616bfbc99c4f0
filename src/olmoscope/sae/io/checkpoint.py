"""The checkpoint files of our own runs: the SAE's tensors beside the trainer's, and metadata about the SAE.

    W, or W_enc and W_dec, b_latent, b_pre     the parameters, as `SparseCoder.state_dict` names them; a transcoder has
                                               b_in, b_out and perhaps W_skip instead of b_pre
    sinks.directions_SD, ...                   for an SAE with latents for attention sinks (sae/sinks.py)
    axes                                       for an SAE that is trained along principal axes (sae/axes.py)
    ACTIVATION.threshold or .log_threshold     the threshold, if the rule has one (`THRESHOLDS`)

checkpoint_file.py describes their layout on disk. All other tensors are the trainer's own (train/checkpoint.py). The
metadata is JSON: `activation`, `k`, `normalize`; for a coder that is not an SAE of one site, `transcoder`, and the
`scales` and `widths` of the sites that it reads, which are folded into the weights here; and the trainer's own keys.
docs/formats.md lists everything.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.sae.axes import fold_axes
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.io.checkpoint_file import opened_checkpoint, write_tensors
from olmoscope.sae.scales import fold_scales
from olmoscope.sae.sinks import Sinks, fold_sinks
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK

PARAMETERS = ("W", "W_enc", "W_dec", "b_latent", "b_pre", "b_in", "b_out", "W_skip")
"""All parameters that a coder in training may have; a file has those that its kind needs."""

SINKS = "sinks"
"""Prefix of the names of the tensors for the sinks' latents."""

AXES = "axes"
"""The name of the axes along which an SAE is trained."""

THRESHOLDS = {"batchtopk": "threshold", "jumprelu": "log_threshold"}
"""The name of a rule's threshold: one threshold for all latents, or the logarithm of each latent's."""


def step_of(path: Path) -> int:
    """The number of steps after which a checkpoint was written, from its name: `step-00004883.safetensors`.

    Raises:
        UserError: it does not have such a name.
    """
    number = path.stem.removeprefix("step-")
    if not number.isdecimal():
        raise UserError(f"{path} is not a checkpoint: these have names like checkpoints/step-00001000.safetensors")
    return int(number)


def rule_tensor(activation: str, name: str) -> str:
    """The name in the file for the tensor `name` of an activation rule."""
    return f"{activation}.{name}"


def write_checkpoint(path: Path, sae: TopK, activation: str, tensors: Mapping[str, Tensor],
                     said: Mapping[str, Any]) -> None:
    """Write a checkpoint that is one file, or the shared file of a checkpoint in shards, atomically.

    Args:
        sae: the SAE in training; for shards, any one of them.
        activation: its activation rule.
        tensors: all tensors, including the SAE's parameters.
        said: further metadata, as JSON values.
    """
    write_tensors(path, tensors, {"activation": activation, "k": sae.k, "normalize": sae.normalize, **said})


def read_checkpoint(path: Path) -> TopK | JumpReLU:
    """Only the SAE of a checkpoint, float32, on the CPU, in its form for inference: an SAE trained by BatchTopK is a
    JumpReLU whose latents share a threshold.

    Raises:
        UserError: damaged file.
    """
    with opened_checkpoint(path) as (metadata, file):
        parameters = {name: file.get_tensor(name) for name in PARAMETERS if name in set(file.keys())}
        activation = metadata["activation"]
        kind = GroupMax if activation == "groupmax" else TopK
        sae = kind.from_state_dict(parameters, k=metadata["k"], normalize=metadata["normalize"],
                                   transcoder=metadata.get("transcoder", False))
        sae = fold_scales(sae, metadata.get("scales", []), metadata.get("widths", []))
        sae = fold_axes(sae, read_axes(file))
        trained, sinks = sae.d_sae, read_sinks(file)
        sae = fold_sinks(sae, sinks)
        if activation not in THRESHOLDS:
            return sae
        threshold = file.get_tensor(rule_tensor(activation, THRESHOLDS[activation]))
        threshold_F = threshold.exp() if activation == "jumprelu" else threshold.float().repeat(trained)
        if sinks is not None:
            threshold_F = torch.cat([torch.zeros(sinks.count), threshold_F])
        return JumpReLU(sae.W_enc, sae.W_dec, sae.b_in, sae.normalize, sae.b_latent, threshold_F, b_out=sae.b_out,
                        W_skip=sae.W_skip, transcoder=sae.transcoder)


def read_alive(path: Path, window: int) -> Tensor:
    """Which latents of a checkpoint's SAE fired in the last `window` training tokens (in all of them, if there were
    fewer), bool `[F]`. Latents for sinks are not trained and count as alive.

    Raises:
        UserError: damaged file.
    """
    with opened_checkpoint(path) as (metadata, file):
        alive_F = metadata["tokens"] - file.get_tensor("last_fired") < min(window, metadata["tokens"])
        sinks = read_sinks(file)
        return alive_F if sinks is None else torch.cat([torch.ones(sinks.count, dtype=torch.bool), alive_F])


def read_sinks(file: Any) -> Sinks | None:
    """The sinks in an open checkpoint; None if its SAE has none."""
    names = [name for name in file.keys() if name.startswith(f"{SINKS}.")]  # noqa: SIM118  (the file is no mapping)
    return Sinks(**{name.removeprefix(f"{SINKS}."): file.get_tensor(name) for name in names}) if names else None


def read_axes(file: Any) -> Tensor | None:
    """The axes in an open checkpoint; None if its SAE is trained along the channels."""
    return file.get_tensor(AXES) if AXES in set(file.keys()) else None
