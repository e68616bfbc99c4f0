"""A torch checkpoint of the reference trainer, opened without conversion (inference weights only).

The trainer saves with `torch.save` a mapping with `model` (the state of an autoencoder in the form of OpenAI's
sparse_autoencoder: `encoder.weight [F, D]`, `pre_bias [D]`, `latent_bias [F]`, `activation`, the name of a class,
`activation_state_dict` {`k`, `postact_fn`, again a class name}, three statistics buffers) and beside it `optimizer`,
`layer`, `n_inputs`, `n_latents`, `top_k`, `normalize` and the settings of the run. The decoder is tied, so its weight
may be absent; if it is there, it must equal the encoder's. Nothing in the file is executed (torch_file.py).

Shapes: D d_model, F latents.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.files import sha256
from olmoscope.sae.io.headers import not_finite
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading
from olmoscope.sae.io.torch_file import is_torch_file, load_torch_file
from olmoscope.sae.normalize import Normalize
from olmoscope.sae.topk import TopK
from olmoscope.site import Site

NAME = "a checkpoint of the reference trainer"
MARK = "a torch file"
SEARCH: str | None = None

STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
"""Buffers that only the trainer uses."""

TIED = {"decoder.weight": True, "decoder.linear.weight": False}
"""Names under which a tied decoder is saved, and whether it is transposed there (`[D, F]`)."""

PARAMETERS = ("encoder.weight", "pre_bias", "latent_bias", "activation", "activation_state_dict")

NORMALIZE: dict[str, Normalize] = {"false": "none", "none": "none", "raw": "none", "true": "layer_norm",
                                   "layer_norm": "layer_norm", "layernorm": "layer_norm"}
"""Possible values of the trainer's `normalize`: a boolean or a text."""

SETTINGS = ("batch_size", "lr", "mean_loss", "epoch", "step", "seed")
"""Numbers beside the model that go into the metadata if they are there."""


def detect(place: Place) -> bool:
    """Whether it is a torch file that holds a `model`, as the trainer saves it."""
    if place.file is None or not is_torch_file(place.open(place.file)):
        return False
    header = place.header(place.file)
    return "model" in header.values or not header.shapes


def look(place: Place, site: Site | None = None) -> Reading:
    """How the SAE of a checkpoint is read. The file is loaded, since its tensors have to be compared.

    Raises:
        UserError: see `read`.
    """
    found = read(place, site)
    sae = found.sae
    assert isinstance(sae, TopK)
    return Reading(NAME, "topk", sae.d_in, sae.d_out, sae.d_sae, (str(place.file),), sae.reads, sae.writes, k=sae.k,
                   normalize=sae.normalize, dtype=found.dtype, metadata=found.metadata,
                   notes=("encoder and decoder are tied",))


def read(place: Place, site: Site | None = None) -> Opened:
    """Read the SAE of a checkpoint.

    Args:
        site: the site that it reads, if the checkpoint does not say.

    Raises:
        UserError: the file is missing, damaged or executable; it has another kind of SAE; its parts disagree; weights
            are not finite; or it has another site than `site`.
    """
    if place.file is None:
        raise UserError(f"{place.where()} is a folder; name the checkpoint file in it")
    path = place.fetch(place.file)
    tree = load_torch_file(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, not the mapping with `model` that the trainer saves")
    model = _mapping(tree, "model", path)
    sae, checksum = _read_sae(model, tree, path), sha256(path)
    return Opened(
        sae.at([_site(tree, site, path)]), path.name, None, None, "topk", path, "file",
        f"sha256:{checksum[:32]}", bos="auto", context_size=None, dtype=model["encoder.weight"].dtype,
        metadata={name: tree[name] for name in SETTINGS
                  if isinstance(tree.get(name), int | float) and math.isfinite(tree[name])},
        files={path.name: checksum})


def _read_sae(model: Mapping[str, Any], tree: Mapping[str, Any], path: Path) -> TopK:
    absent = [name for name in PARAMETERS if name not in model]
    if absent:
        raise UserError(f"{path}: model has no {absent[0]}; a checkpoint of the reference trainer holds "
                        f"{', '.join(PARAMETERS)}")
    unknown = [name for name in model if name not in (*PARAMETERS, *STATISTICS, *TIED)]
    if unknown:
        raise UserError(f"{path}: model has {unknown[0]!r}, which a tied TopK autoencoder does not have: importing "
                        "without it would change what the SAE computes")
    W_FD = _tensor(model, "encoder.weight", 2, path)
    latents, inputs = W_FD.shape
    b_pre_D, b_latent_F = _tensor(model, "pre_bias", 1, path), _tensor(model, "latent_bias", 1, path)
    for what, said, found in (("pre_bias", len(b_pre_D), inputs), ("latent_bias", len(b_latent_F), latents),
                              ("n_inputs", tree.get("n_inputs", inputs), inputs),
                              ("n_latents", tree.get("n_latents", latents), latents)):
        if said != found:
            raise UserError(f"{path}: {what} says {said}, encoder.weight is [{latents}, {inputs}]: the parts are of "
                            "different checkpoints")
    for name, transposed in TIED.items():
        if name in model:
            decoder = _tensor(model, name, 2, path)
            if not torch.equal(decoder.T if transposed else decoder, W_FD):
                raise UserError(f"{path}: {name} differs from encoder.weight: the SAE is not tied, which is not "
                                "supported")
    return TopK(W_FD, W_FD, b_pre_D, _normalize(tree, path), b_latent_F, _k(model, tree, latents, path))


def _k(model: Mapping[str, Any], tree: Mapping[str, Any], latents: int, path: Path) -> int:
    activation = _class_name(model["activation"])
    if activation != "TopK":
        raise UserError(f"{path}: activation is {activation!r}; only TopK can be imported")
    state = _mapping(model, "activation_state_dict", path)
    for name in ("k", "postact_fn"):
        if name not in state:
            raise UserError(f"{path}: activation_state_dict has no {name}")
    if _class_name(state["postact_fn"]).lower() != "relu":
        raise UserError(f"{path}: postact_fn is {state['postact_fn']!r}; SAELens' TopK applies ReLU after the "
                        "top-k, so another function cannot be exported")
    k = _whole(state["k"], "activation_state_dict.k", path)
    if not 1 <= k <= latents:
        raise UserError(f"{path}: activation_state_dict.k is {k}, which is not between 1 and {latents} latents")
    if "top_k" in tree and _whole(tree["top_k"], "top_k", path) != k:
        raise UserError(f"{path}: top_k is {tree['top_k']}, activation_state_dict.k is {k}; correct the wrong one")
    return k


def _normalize(tree: Mapping[str, Any], path: Path) -> Normalize:
    if "normalize" not in tree:
        raise UserError(f"{path} does not say `normalize`, and guessing the input normalisation would give a "
                        "wrong SAE")
    said = tree["normalize"]
    if not isinstance(said, bool | str) or str(said).lower() not in NORMALIZE:
        raise UserError(f"{path}: normalize is {said!r}; it must be one of {', '.join(NORMALIZE)}")
    return NORMALIZE[str(said).lower()]


def _site(tree: Mapping[str, Any], site: Site | None, path: Path) -> Site:
    """The residual stream that it was trained on."""
    layer = None if tree.get("layer") is None else _whole(tree["layer"], "layer", path)
    if layer is not None and layer < 0:
        raise UserError(f"{path}: layer {layer} does not exist")
    said = None if layer is None else Site(layer)
    if said is not None and site not in (None, said):
        raise UserError(f"{path} was trained on {said}, not {site}")
    found = said or site
    if found is None:
        raise UserError(f"{path} does not say which layer it was trained on; name it (--site)")
    return found


def _tensor(model: Mapping[str, Any], name: str, dimensions: int, path: Path) -> Tensor:
    value = model[name]
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != dimensions:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{path}: {name} must be a floating-point tensor of {dimensions} dimensions, not {found}")
    if not torch.isfinite(value).all():
        raise UserError(not_finite(str(path), name))
    return value.detach().float().contiguous()


def _mapping(tree: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    value = tree.get(name)
    if not isinstance(value, Mapping):
        raise UserError(f"{path} has no mapping `{name}`: it is not a checkpoint of the reference trainer")
    return value


def _class_name(value: Any) -> str:
    """`ReLU` from `ReLU`, `ReLU()` or `torch.nn.ReLU`."""
    return str(value).removesuffix("()").rpartition(".")[2]


def _whole(value: Any, name: str, path: Path) -> int:
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point():
        value = value.item()
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{path}: {name} must be a whole number, not {value!r}")
    return value
