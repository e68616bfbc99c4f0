"""The checkpoint files of our own runs: an SAE's tensors among the trainer's, and what the file says of the SAE.

    W, or W_enc and W_dec, b_latent, b_pre     the parameters, as `SparseCoder.state_dict` names them; of a transcoder
                                               b_in, b_out and perhaps W_skip in place of b_pre
    sinks.directions_SD, ...                   of an SAE with latents for attention sinks (sae/sinks.py)
    ACTIVATION.threshold or .log_threshold     the threshold of a rule that has one (`THRESHOLDS`)

How they lie on disk says checkpoint_file.py. The rest is the trainer's own (train/checkpoint.py). What the file says
stands in its metadata as JSON: `activation`, `k`, `normalize`; of a coder that is no SAE of one site `transcoder`, and
`scales` and `widths` of the sites that it reads, which are folded into the weights here; and the trainer's own again.
docs/formats.md lists everything.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.io.checkpoint_file import opened_checkpoint, write_tensors
from olmoscope.sae.scales import fold_scales
from olmoscope.sae.sinks import Sinks, fold_sinks
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK

PARAMETERS = ("W", "W_enc", "W_dec", "b_latent", "b_pre", "b_in", "b_out", "W_skip")
"""All that a coder in training may have; a file has those that its kind needs."""

SINKS = "sinks"
"""What the tensors of the sinks' latents begin with."""

THRESHOLDS = {"batchtopk": "threshold", "jumprelu": "log_threshold"}
"""What the threshold of a rule is called: one for all latents, or the logarithm of each latent's."""


def step_of(path: Path) -> int:
    """After how many steps a checkpoint was written: its name says it, `step-00004883.safetensors`.

    Raises:
        UserError: it is not called so.
    """
    number = path.stem.removeprefix("step-")
    if not number.isdecimal():
        raise UserError(f"{path} is not a checkpoint (checkpoints/step-00001000.safetensors)")
    return int(number)


def rule_tensor(activation: str, name: str) -> str:
    """The name in the file of a tensor that an activation rule calls `name`."""
    return f"{activation}.{name}"


def write_checkpoint(path: Path, sae: TopK, activation: str, tensors: Mapping[str, Tensor],
                     said: Mapping[str, Any]) -> None:
    """Write a checkpoint of one file, or the shared file of one in shards, atomically.

    Args:
        sae: the SAE in training; of shards any.
        activation: its rule.
        tensors: everything, the SAE's parameters among it.
        said: what else the metadata says, as JSON values.
    """
    write_tensors(path, tensors, {"activation": activation, "k": sae.k, "normalize": sae.normalize, **said})


def read_checkpoint(path: Path) -> TopK | JumpReLU:
    """Only the SAE of a checkpoint, float32, on the CPU, as its training leaves it: one trained by BatchTopK is a
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
    """Which latents of a checkpoint's SAE fired in the last `window` tokens that it was trained on (in all of them, if
    they were fewer), bool `[F]`. Latents for sinks are not trained, and count as alive.

    Raises:
        UserError: damaged file.
    """
    with opened_checkpoint(path) as (metadata, file):
        alive_F = metadata["tokens"] - file.get_tensor("last_fired") < min(window, metadata["tokens"])
        sinks = read_sinks(file)
        return alive_F if sinks is None else torch.cat([torch.ones(sinks.count, dtype=torch.bool), alive_F])


def read_sinks(file: Any) -> Sinks | None:
    """The sinks in an open checkpoint; None: its SAE has none."""
    names = [name for name in file.keys() if name.startswith(f"{SINKS}.")]  # noqa: SIM118  (the file is no mapping)
    return Sinks(**{name.removeprefix(f"{SINKS}."): file.get_tensor(name) for name in names}) if names else None
