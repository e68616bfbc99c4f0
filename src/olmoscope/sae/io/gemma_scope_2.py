"""Gemma Scope 2, for Gemma 3: JumpReLU SAEs, transcoders (some with an affine skip) and cross-layer transcoders.

    google/gemma-scope-2-4b-pt:resid_post/layer_17_width_65k_l0_medium/{params.safetensors, config.json}
    google/gemma-scope-2-1b-it:clt/.../layer_7.safetensors

config.json names the modules that are read and written; without it, the folder's name does. b_dec is not subtracted,
and nothing is normalised. A layer of a cross-layer transcoder writes the MLP outputs of this layer and all later ones:
`w_dec [F, L, D]`. Source: sae-lens 6.54.12, `gemma_3_sae_huggingface_loader`, which sums those outputs into one.
"""

import re
from collections.abc import Mapping
from typing import Any

from olmoscope.errors import UserError
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.clt import CLT_NOTE, flat, written
from olmoscope.sae.io.layout import Layout, holds, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, site_from, stated
from olmoscope.sae.io.site_names import of_module
from olmoscope.site import Site

NAME = "a Gemma Scope 2 SAE"
MARK = "params.safetensors"
SEARCH: str | None = "**/params.safetensors"

CONFIG = "config.json"
_LAYER, _REPOSITORY = re.compile(r"layer_(\d+)"), re.compile(r"gemma-scope-2-(\w+)-(pt|it)")
_MODULES = {"resid_post": ("output", None), "attn_out": ("self_attn.o_proj.input", None),
            "mlp_out": ("post_feedforward_layernorm.output", None),
            "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
            "clt": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")}
"""The modules that are read and written, by the folder's name; None: an SAE writes what it reads."""


def detect(place: Place) -> bool:
    """Whether there is a safetensors file with an encoder and thresholds, named in lower case."""
    return holds(place, place.only(".safetensors"), "w_enc", "w_dec", "threshold")


def look(place: Place, site: Site | None = None) -> Reading:
    """How it is read.

    Raises:
        UserError: tensors that do not fit together, a config of another architecture, another site than `site`.
    """
    file = str(place.only(".safetensors"))
    config = place.mapping(CONFIG) if place.has(CONFIG) else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise UserError(f"{place.where(CONFIG)}: architecture {config['architecture']!r} is not supported; Gemma "
                        "Scope 2 has jump_relu")
    names = _places(place, config)
    across = len(place.header(file).shapes["w_dec"]) == 3
    transcoder = across or names[1] is not None or "affine_skip_connection" in place.header(file).shapes
    found = sizes(place, file, _layout(transcoder, across), NAME, optional=("affine_skip_connection",))
    ends = [None if name is None else of_module(name) for name in names]
    reads = site_from(place.where(), ends[0], None if transcoder else site)
    writes = site_from(place.where(), ends[1] if transcoder else ends[0], site, "writes")
    if across:
        writes = written(place, reads, found["L"], sum(1 for name in place.beside if _LAYER.fullmatch(
            name.removesuffix(".safetensors"))))
    return Reading(
        NAME, "jumprelu", found["D"], found.get("O", found["D"]) * found.get("L", 1), found["F"],
        (file, CONFIG) if config else (file,), reads, writes, _model(place, config), transcoder=transcoder,
        centred=False, skip="affine_skip_connection" in place.header(file).shapes, bos="yes", context_size=1024,
        dtype=place.header(file).dtype, notes=(CLT_NOTE,) if across else (), stated=stated(place),
        metadata=config)


def read(place: Place, site: Site | None = None) -> Opened:
    """Read it.

    Raises:
        UserError: as `look`; NaN; an unknown site.
    """
    reading = look(place, site)
    file = reading.files[0]
    across = len(place.header(file).shapes["w_dec"]) == 3
    tensors = load(place, file, _layout(reading.transcoder, across))
    return opened(place, reading, flat(tensors, reading.d_out) if across else tensors)


def _layout(transcoder: bool, across: bool) -> Layout:
    out = "O" if transcoder else "D"
    return {"w_enc": ("W_enc", "DF"), "b_enc": ("b_enc", "F"), "w_dec": ("W_dec", "FLO" if across else f"F{out}"),
            "b_dec": ("b_dec", out), "threshold": ("threshold", "F"), "affine_skip_connection": ("W_skip", "DO")}


def _places(place: Place, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The modules that it reads and writes; None if not stated, or if an SAE writes what it reads."""
    if "hf_hook_point_in" in config:
        return config["hf_hook_point_in"], config.get("hf_hook_point_out")
    layer = _LAYER.search(place.words)
    kind = next((kind for kind in _MODULES if re.search(rf"(^|/){kind}(_all)?/", place.words)), None)
    if layer is None or kind is None:
        return None, None
    reads, writes = _MODULES[kind]
    return f"model.layers.{layer[1]}.{reads}", writes and f"model.layers.{layer[1]}.{writes}"


def _model(place: Place, config: Mapping[str, Any]) -> str | None:
    repository = _REPOSITORY.search(place.words)
    name = config.get("model_name") or (repository and f"gemma-3-{repository[1]}-{repository[2]}")
    if name is None:
        return None
    name = str(name).replace("-v3", "-3")
    name = name if "/" in name else f"google/{name}"
    return name.removesuffix("-pt") if "270m" in name else name
