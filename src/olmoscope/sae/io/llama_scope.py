"""Llama Scope (OpenMOSS), for Llama 3.1 8B, and Llama-Scope-R1-Distill, for DeepSeek-R1-Distill-Llama-8B: JumpReLU.

    Llama3_1-8B-Base-L15R-8x/hyperparams.json                    d_model, d_sae, hook_point_in, hook_point_out,
                                                                 jump_relu_threshold, dataset_average_activation_norm
    Llama3_1-8B-Base-L15R-8x/checkpoints/final.safetensors       encoder.weight [F, D], encoder.bias [F],
                                                                 decoder.weight [D, F], decoder.bias [D]
    .../L15R/config.json, .../L15R/sae_weights.safetensors       of R1-Distill, with log_jumprelu_threshold [F] too

They were trained on rows times s = √D / (mean norm of the training data). b_dec is not subtracted. Codes here are in
the scale of training, as in SAELens and Neuronpedia. The single threshold of Llama Scope is for codes in the rows' own
scale, so it is multiplied by s (as in SAELens since its pull request 645). The thresholds of R1-Distill are in the
scale of training already, but its s is stated only in SAELens' registry. Source: He et al. 2024, arXiv:2410.20526;
sae-lens 6.54.12, `llama_scope_sae_huggingface_loader`, `llama_scope_r1_distill_sae_huggingface_loader`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from olmoscope.errors import UserError
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.layout import Layout, holds, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, site_from, stated
from olmoscope.sae.io.site_names import of_hook
from olmoscope.site import Site

NAME = "a Llama Scope SAE"
MARK = "hyperparams.json"
SEARCH: str | None = "**/hyperparams.json"

FINAL = "checkpoints/final.safetensors"
R1_CONFIG, R1_WEIGHTS, R1_THRESHOLD = "config.json", "sae_weights.safetensors", "log_jumprelu_threshold"

_LAYOUT: Layout = {"encoder.weight": ("W_enc", "FD"), "encoder.bias": ("b_enc", "F"), "decoder.weight": ("W_dec", "DF"),
                   "decoder.bias": ("b_dec", "D")}
_R1_LAYOUT: Layout = {**_LAYOUT, R1_THRESHOLD: ("threshold", "F")}


def detect(place: Place) -> bool:
    """Whether a folder has the files of either release."""
    return place.file is None and (place.has(MARK) or (
        place.has(R1_CONFIG) and place.has(R1_WEIGHTS) and holds(place, R1_WEIGHTS, "encoder.weight", R1_THRESHOLD)))


def look(place: Place, site: Site | None = None) -> Reading:
    """How it is read.

    Raises:
        UserError: tensors that do not fit together or to the settings, missing settings, another site than
            `site`.
    """
    return _look_scope(place, site) if place.has(MARK) else _look_distilled(place, site)


def read(place: Place, site: Site | None = None) -> Opened:
    """Read it.

    Raises:
        UserError: as `look`; NaN; an unknown site.
    """
    reading = look(place, site)
    tensors = load(place, reading.files[0], _LAYOUT if reading.files[0] == FINAL else _R1_LAYOUT)
    if reading.files[0] == FINAL:
        threshold = torch.tensor(place.mapping(MARK)["jump_relu_threshold"] * reading.scale)
    else:
        threshold = tensors["threshold"].exp()
    return opened(place, reading, tensors | {"threshold": threshold})


def _look_scope(place: Place, site: Site | None) -> Reading:
    config, where = place.mapping(MARK), place.where(MARK)
    if not place.has(FINAL):
        raise UserError(f"{place.where(FINAL)} is missing: download the SAE's whole folder again")
    found = sizes(place, FINAL, _LAYOUT, NAME)
    _same_size(config, where, {"d_model": found["D"], "d_sae": found["F"]})
    norms = config.get("dataset_average_activation_norm")
    scales = {}
    for end in ("in", "out"):
        norm = norms.get(end) if isinstance(norms, dict) else None
        if not isinstance(norm, int | float) or not 0 < norm < math.inf:
            raise UserError(f"{where}: dataset_average_activation_norm.{end} must be a positive number, not {norm!r}: "
                            "without it the scale of the rows is unknown")
        scales[end] = math.sqrt(found["D"]) / norm
    if not isinstance(config.get("jump_relu_threshold"), int | float):
        raise UserError(f"{where}: jump_relu_threshold must be a number, not {config.get('jump_relu_threshold')!r}")
    reads, writes = (_site(place, config, key) for key in ("hook_point_in", "hook_point_out"))
    transcoder = reads != writes
    return Reading(
        NAME, "jumprelu", found["D"], found["D"], found["F"], (FINAL, MARK),
        site_from(place.where(), reads, None if transcoder else site), site_from(place.where(), writes, site, "writes"),
        "meta-llama/Llama-3.1-8B", transcoder=transcoder, centred=False, scale=scales["in"], scale_out=scales["out"],
        bos="yes", context_size=1024, dtype=place.header(FINAL).dtype,
        notes=("its threshold is for rows in their own scale, so it is multiplied by the same factor as they are",),
        stated=stated(place), metadata=config)


def _look_distilled(place: Place, site: Site | None) -> Reading:
    config, where = place.mapping(R1_CONFIG), place.where(R1_CONFIG)
    found = sizes(place, R1_WEIGHTS, _R1_LAYOUT, NAME)
    _same_size(config, where, {"d_model": found["D"]})
    scale = None if place.registered is None else place.registered.scale
    if scale is None:
        raise UserError(f"{place.where()} does not state the scale of its rows, only SAELens' registry does: open it "
                        "as saelens:llama_scope_r1_distill/ID")
    sites = site_from(place.where(), _site(place, config, "hook_point_in"), site)
    return Reading(
        NAME, "jumprelu", found["D"], found["D"], found["F"], (R1_WEIGHTS, R1_CONFIG), sites, sites,
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", centred=False, scale=scale, scale_out=scale, bos="yes",
        context_size=1024, dtype=place.header(R1_WEIGHTS).dtype,
        notes=("the scale of its rows is from SAELens' registry; SAELens' loader names its model Llama-3.1-8B",),
        stated=stated(place), metadata=config)


def _same_size(config: Mapping[str, Any], where: str, found: Mapping[str, int]) -> None:
    for key, size in found.items():
        if config.get(key, size) != size:
            raise UserError(f"{where}: {key} is {config[key]}, but the tensors have {size}")


def _site(place: Place, config: Mapping[str, Any], key: str) -> Site | None:
    hook = config.get(key) or config.get("hook_point_in")
    found = None if hook is None else of_hook(str(hook))
    if hook is not None and (found is None or found[1] != "none"):
        raise UserError(f"{place.where()}: {key} {hook!r} is not a known site")
    return None if found is None else found[0]
