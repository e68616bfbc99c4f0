"""SAELens' folder of one SAE: what stands in it and how it is written.

    cfg.json                   every setting, never one left to SAELens' defaults; written last: the SAE exists
    sae_weights.safetensors    W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D], threshold [F] of a jumprelu; float32

Shapes: D d_model, F latents. Source: SAELens 6.54.12, `sae_lens/saes/topk_sae.py`, `jumprelu_sae.py` and its loaders. A
missing `k` silently becomes 100 there, a missing `apply_b_dec_to_input` true, and metadata without a
`sae_lens_version` of 6 or more is silently discarded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.files import atomic_path, write_json
from olmoscope.sae.saelens_folder import CONFIG, WEIGHTS
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK

VERSION = "6.54.12"
"""The version of SAELens whose format this is."""

FIXED = {"dtype": "float32", "apply_b_dec_to_input": True, "reshape_activations": "none"}
"""Settings that are the same for every SAE."""

KEYS = {"topk": (*FIXED, "architecture", "d_in", "d_sae", "normalize_activations", "device", "metadata", "k",
                 "rescale_acts_by_decoder_norm"),
        "jumprelu": (*FIXED, "architecture", "d_in", "d_sae", "normalize_activations", "device", "metadata")}
"""Every key of cfg.json, by architecture; one that is absent would be left to SAELens' defaults."""

METADATA = ("sae_lens_version", "model_name", "hook_name", "hf_hook_name", "prepend_bos", "training_architecture")
"""Metadata without which nobody can tell which activations the SAE reads."""


def hook_names(layers_path: str, layer: int) -> dict[str, str]:
    """The residual stream after a layer, as TransformerLens and as the Hugging Face model name it.

    Args:
        layers_path: where the model keeps its layers, e.g. `model.layers`.
    """
    return {"hook_name": f"blocks.{layer}.hook_resid_post", "hf_hook_name": f"{layers_path}.{layer}"}


def saelens_config(sae: TopK | JumpReLU, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of cfg.json."""
    tied = "tied_" if sae.W_enc is sae.W_dec else ""
    architecture = "topk" if isinstance(sae, TopK) else "jumprelu"
    own = {"k": sae.k, "rescale_acts_by_decoder_norm": False} if isinstance(sae, TopK) else {}
    return {
        "architecture": architecture,
        **FIXED,
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        **own,
        "normalize_activations": sae.normalize,
        "device": "cpu",
        "metadata": {"sae_lens_version": VERSION, "sae_lens_training_version": None,
                     "training_architecture": tied + architecture, **metadata},
    }


def saelens_tensors(sae: TopK | JumpReLU) -> dict[str, Tensor]:
    """SAELens' names for the parameters, float32; `W_enc` is a transposed view."""
    thresholds = {"threshold": sae.threshold.float()} if isinstance(sae, JumpReLU) else {}
    return {"W_enc": sae.W_enc.float().T, "b_enc": sae.b_latent.float(), "W_dec": sae.W_dec.float(),
            "b_dec": sae.b_out.float()} | thresholds


def sae_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TopK | JumpReLU | None:
    """The SAE that `saelens_config` and `saelens_tensors` are of; None of an architecture that they do not write.

    Raises:
        KeyError: a tensor or key is absent.
    """
    W_enc_FD, W_dec_FD = tensors["W_enc"].float().T.contiguous(), tensors["W_dec"].float()
    b_latent_F, b_pre_D = tensors["b_enc"].float(), tensors["b_dec"].float()
    normalize = config.get("normalize_activations", "none")
    if config["architecture"] == "topk":
        return TopK(W_enc_FD, W_dec_FD, b_pre_D, normalize, b_latent_F, config["k"])
    if config["architecture"] == "jumprelu":
        return JumpReLU(W_enc_FD, W_dec_FD, b_pre_D, normalize, b_latent_F, tensors["threshold"].float())
    return None


def write_saelens(sae: TopK | JumpReLU, folder: Path, metadata: Mapping[str, Any]) -> bool:
    """Write an SAE as SAELens reads it, unless it already stands there, value by value.

    Args:
        metadata: JSON values; must name what `METADATA` lists, except for the two that are known here
            (`sae_lens_version`, and `training_architecture` if it is no other than what SAELens is given).

    Returns:
        Whether anything was written.

    Raises:
        UserError: weights that are not finite; no space.
    """
    config, tensors = saelens_config(sae, metadata), saelens_tensors(sae)
    absent = [key for key in METADATA if key not in config["metadata"]]
    assert not absent, f"metadata must name {absent}"
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{folder} was not written: {name} of its SAE holds NaN or inf, so it cannot be used")
    if already_there(sae, folder, metadata):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    # Without its cfg.json nothing takes the folder for an SAE while new weights replace old ones.
    (folder / CONFIG).unlink(missing_ok=True)
    with atomic_path(folder / WEIGHTS) as temporary:
        # A matrix of one row, transposed, is contiguous already: without a copy a tied one would be two names for one
        # piece of memory, which safetensors refuses.
        tensors["W_enc"] = tensors["W_enc"].clone(memory_format=torch.contiguous_format)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"})
    write_json(folder / CONFIG, config)
    return True


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an SAE folder.

    Raises:
        OSError, SafetensorError: missing or damaged.
    """
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (the file is no mapping)


def already_there(sae: TopK | JumpReLU, folder: Path, metadata: Mapping[str, Any]) -> bool:
    """Whether `folder` holds exactly what `write_saelens` would write there; false if absent or damaged."""
    config, tensors = saelens_config(sae, metadata), saelens_tensors(sae)
    try:
        # Through JSON, so that a tuple equals the list that it becomes.
        if json.loads((folder / CONFIG).read_text(encoding="utf-8")) != json.loads(json.dumps(config)):
            return False
        there = read_tensors(folder)
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return there.keys() == tensors.keys() and all(
        there[name].dtype == torch.float32 and torch.equal(there[name], tensor.cpu())
        for name, tensor in tensors.items())
