"""Llamascopium (OpenMOSS' current library): an SAE's folder.

    config.json                  sae_type, d_model, expansion_factor, act_fn, top_k, norm_activation, hook_point_in, ...
    sae_weights.safetensors      W_E [D, F], b_E [F], W_D [F, D], b_D [D], of a JumpReLU
                                 activation_function.log_jumprelu_threshold [F], and
                                 dataset_average_activation_norm.HOOK []; also checkpoints/final.safetensors, or .pt
                                 with all of it under the key `sae`

b_D is not subtracted. With `sparsity_include_decoder_norm` pre-activations are multiplied by the norm of the decoder
row before the activation function, and codes are divided by it afterwards. For topk the codes here are not divided, and
the decoder has unit rows: the same reconstruction. `dataset-wise` multiplies all rows by √D / (mean norm), `token-wise`
scales each row to norm √D, and in an `inference` file the scale is folded in.

Thresholds are in the scale of training: the trainer calls `normalize_activations` before `encode`, which compares
scaled pre-activations with them. Source: llamascopium 2.0.0b34, `models/sparse_dictionary.py`, `models/sae.py`,
`trainer.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

from olmoscope.errors import UserError
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.headers import read_tensors
from olmoscope.sae.io.layout import Layout, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, Rule, checked_k, site_from, stated
from olmoscope.sae.io.refused import refuse_kind
from olmoscope.sae.io.site_names import of_hook
from olmoscope.sae.normalize import Normalize
from olmoscope.site import Site

NAME = "a Llamascopium SAE"
MARK = "config.json with sae_type"
SEARCH: str | None = "**/sae_weights.safetensors"

CONFIG = "config.json"
_WEIGHTS = ("sae_weights.safetensors", "checkpoints/pruned.safetensors", "checkpoints/final.safetensors",
            "checkpoints/final.pt")
_NORM, _THRESHOLD = "dataset_average_activation_norm.", "activation_function.log_jumprelu_threshold"
_RULES: dict[str, Rule] = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk"}
_ROWS: dict[str, Normalize] = {"token-wise": "constant_norm_rescale", "dataset-wise": "none", "inference": "none"}


def detect(place: Place) -> bool:
    """Whether a folder's config.json says its `sae_type`."""
    if place.file is not None or not place.has(CONFIG):
        return False
    config = place.json(CONFIG)
    return isinstance(config, dict) and "sae_type" in config


def look(place: Place, site: Site | None = None) -> Reading:
    """How it is read.

    Raises:
        UserError: an unsupported kind, tensors that do not fit together or to config.json, another site than
            `site`.
    """
    config, where = place.mapping(CONFIG), place.where(CONFIG)
    refuse_kind(where, "sae_type", config["sae_type"], ("sae",))
    for key, known in (("act_fn", (*_RULES, None)), ("norm_activation", (*_ROWS, None)),
                       ("use_glu_encoder", (False, None))):
        if config.get(key) not in known:
            raise UserError(f"{where}: {key} {config[key]!r} is not supported; supported is "
                            f"{' or '.join(str(one) for one in known if one is not None)}")
    file = next((name for name in _WEIGHTS if place.has(name)), None)
    if file is None:
        raise UserError(f"{place.where(_WEIGHTS[0])} is missing, and so are {', '.join(_WEIGHTS[1:])}")
    rule, layout = _RULES[config.get("act_fn") or "relu"], _layout(config, file)
    shapes = place.header(file).shapes
    prefix = _prefix(file)
    found = sizes(place, file, layout, NAME, ignored=[
        name for name in shapes if name.startswith(f"{prefix}{_NORM}") or (rule != "jumprelu" and _THRESHOLD in name)])
    wanted = (config.get("d_model"), int((config.get("d_model") or 0) * (config.get("expansion_factor") or 0)))
    if wanted != (found["D"], found["F"]):
        raise UserError(f"{place.where(file)} has d_model {found['D']} and {found['F']} latents; {CONFIG} says "
                        f"{wanted[0]} and {wanted[1]}")
    reads, writes = (_site(config, key, where) for key in ("hook_point_in", "hook_point_out"))
    transcoder = reads != writes
    scales = _scales(place, config, file)
    by_norm = bool(config.get("sparsity_include_decoder_norm", True))
    notes = []
    if by_norm and rule == "topk":
        notes.append("codes are for unit decoder rows; Llamascopium divides them by the norm of the row again")
    if rule == "jumprelu" and scales != (1.0, 1.0):
        notes.append("codes and thresholds are in the scale of training; Llamascopium's own fold_activation_scale does "
                     "not rescale the thresholds, so after it other latents fire")
    return Reading(
        NAME, rule, found["D"], found["D"], found["F"], (file, CONFIG),
        site_from(place.where(), reads, None if transcoder else site), site_from(place.where(), writes, site, "writes"),
        k=checked_k(config.get("top_k"), found["F"], f"{where}: top_k") if rule == "topk" else None,
        transcoder=transcoder, centred=False,
        normalize=_ROWS[config.get("norm_activation") or "dataset-wise"], scale=scales[0], scale_out=scales[1],
        by_decoder_norm=by_norm and rule != "relu", unit_rows=by_norm and rule == "topk",
        dtype=place.header(file).dtype, notes=tuple(notes), stated=stated(place), metadata=config)


def read(place: Place, site: Site | None = None) -> Opened:
    """Read it.

    Raises:
        UserError: as `look`; NaN; an unknown site.
    """
    reading = look(place, site)
    tensors = load(place, reading.files[0], _layout(place.mapping(CONFIG), reading.files[0]))
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].exp()
    return opened(place, reading, tensors)


def _prefix(file: str) -> str:
    return "sae." if file.endswith(".pt") else ""


def _layout(config: Mapping[str, Any], file: str) -> Layout:
    layout = {"W_E": ("W_enc", "DF"), "b_E": ("b_enc", "F"), "W_D": ("W_dec", "FD")}
    if config.get("use_decoder_bias", True):
        layout["b_D"] = ("b_dec", "D")
    if config.get("act_fn") == "jumprelu":
        layout[_THRESHOLD] = ("threshold", "F")
    return {f"{_prefix(file)}{name}": stored for name, stored in layout.items()}


def _scales(place: Place, config: Mapping[str, Any], file: str) -> tuple[float, float]:
    """The factor on rows before encoding, and the divisor of the decoder's output."""
    if (config.get("norm_activation") or "dataset-wise") != "dataset-wise":
        return 1.0, 1.0
    hooks = [str(config.get(key)) for key in ("hook_point_in", "hook_point_out")]
    names = [f"{_prefix(file)}{_NORM}{hook}" for hook in hooks]
    if missing := [name for name in names if name not in place.header(file).shapes]:
        raise UserError(f"{place.where(file)} has no {missing[0]}: norm_activation is dataset-wise, which needs the "
                        "mean norm of the training data")
    there = place.header(file).values
    if names[0] not in there:  # a torch file's header has no numbers
        there = read_tensors(place.fetch(file))
    first, second = (math.sqrt(config["d_model"]) / float(there[name]) for name in names)
    return first, second


def _site(config: Mapping[str, Any], key: str, where: str) -> Site:
    hook = str(config.get(key) or config.get("hook_point_in"))
    found = of_hook(hook)
    if found is None or found[1] != "none":
        raise UserError(f"{where}: {key} {hook!r} is not a known site")
    return found[0]
