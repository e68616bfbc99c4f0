"""A layer of a circuit-tracer set of transcoders: a file for each layer, and settings of the whole set in config.yaml.

    config.yaml            model_name, feature_input_hook, feature_output_hook (TransformerLens' names within a layer),
                           perhaps activation (relu, topk) and k
    layer_7.safetensors    W_enc [F, D], W_dec [F, O], b_enc [F], b_dec [O], perhaps W_skip [O, D], and of a JumpReLU
                           activation_function.threshold [F]

b_dec is not subtracted. For a set without config.yaml (mwhanna's for Qwen3 14B), the repository's name gives the model.
circuit-tracer's topk keeps the k largest pre-activations of any sign; ours keeps only the positive ones. Source:
circuit-tracer 0.4.1, `utils/hf_utils.py`, `transcoder/single_layer_transcoder.py`; sae-lens 6.54.12,
`mwhanna_transcoder_huggingface_loader`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.files import atomic_path, write_text
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.layout import Layout, holds, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.outgoing import encoder_bias, refuse_not_finite
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, Rule, checked_k, site_from, stated
from olmoscope.sae.io.site_names import NORMALIZED, of_hook
from olmoscope.sae.normalize import Normalize
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.site import Site

NAME = "a transcoder of a circuit-tracer set"
MARK = "layer_L.safetensors"
SEARCH: str | None = "=**/layer_*.safetensors"

CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"

_FILE, _QWEN = re.compile(r"layer_(\d+)\.safetensors"), re.compile(r"qwen3-([\d.]+)b")

_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)/(?P<path>[^@]+)(?:@(?P<revision>.+))?")

_LAYOUT: Layout = {"W_enc": ("W_enc", "FD"), "b_enc": ("b_enc", "F"), "W_dec": ("W_dec", "FO"), "b_dec": ("b_dec", "O"),
                   "W_skip": ("W_skip", "OD"), THRESHOLD: ("threshold", "F")}


@dataclass(frozen=True)
class Hooks:
    """What config.yaml says about a layer; None where it says nothing."""

    model: str | None
    reads: Site | None
    writes: Site | None
    normalize: Normalize
    notes: tuple[str, ...]


def detect(place: Place) -> bool:
    """Whether it is a safetensors file with an encoder of one latent a row."""
    if place.file is None or not place.file.endswith(".safetensors"):
        return False
    return (holds(place, place.file, "W_enc", "W_dec", "b_enc")
            and place.header(place.file).shapes["W_enc"][:1] == place.header(place.file).shapes["b_enc"])


def listed(place: Place) -> list[str]:
    """The addresses of a set's transcoders, layer by layer, if config.yaml lists them; else an empty list.

    Raises:
        UserError: an entry is not an address.
    """
    if place.file is not None or not place.has(CONFIG):
        return []
    found = []
    for one in place.mapping(CONFIG).get("transcoders") or []:
        address = _ADDRESS.fullmatch(str(one))
        if address is None and str(one).startswith("hf://"):
            raise UserError(f"{place.where(CONFIG)}: transcoders: {one!r} is not an address "
                            "(hf://OWNER/NAME/PATH@REVISION)")
        revision = address["revision"] if address else None
        found.append(f"{address['repo']}{f'@{revision}' if revision else ''}:{address['path'].strip('/')}" if address
                     else place.at_name(str(one)))
    return found


def look(place: Place, site: Site | None = None) -> Reading:
    """How it is read.

    Raises:
        UserError: tensors that do not fit together, a config that is not understood, another site than `site`.
    """
    file, number = str(place.file), _FILE.fullmatch(place.file or "")
    found = sizes(place, file, _LAYOUT, NAME, optional=("W_skip", THRESHOLD))
    hooks = hooks_of(place, int(number[1])) if number else Hooks(None, None, None, "none", (
        f"its layer is not known: only a file's name ({MARK}) states it",))
    shapes, config = place.header(file).shapes, place.mapping(CONFIG) if place.has(CONFIG) else {}
    activation, k, notes = config.get("activation"), None, hooks.notes
    rule: Rule = "jumprelu" if THRESHOLD in shapes else "relu"
    if activation == "topk":
        rule, k = "topk", checked_k(config.get("k"), found["F"], f"{place.where(CONFIG)}: k")
        notes = (*notes, "circuit-tracer keeps the k largest pre-activations of any sign; here only positive ones "
                         "are active")
    elif activation not in (None, "relu", "jumprelu", "jump_relu"):
        raise UserError(f"{place.where(CONFIG)}: activation {activation!r} is not supported; supported are "
                        "relu, jumprelu, topk")
    return Reading(
        NAME, rule, found["D"], found["O"], found["F"], (file, CONFIG) if config else (file,),
        site_from(place.where(), hooks.reads, None), site_from(place.where(), hooks.writes, site, "writes"),
        hooks.model, k=k, transcoder=True, centred=False, normalize=hooks.normalize, skip="W_skip" in shapes,
        dtype=place.header(file).dtype, notes=notes, stated=stated(place), metadata=config)


def read(place: Place, site: Site | None = None) -> Opened:
    """Read it.

    Raises:
        UserError: as `look`; NaN; an unknown site.
    """
    reading = look(place, site)
    return opened(place, reading, load(place, reading.files[0], _LAYOUT))


def hooks_of(place: Place, layer: int) -> Hooks:
    """What the config.yaml beside a layer's file says about it.

    Raises:
        UserError: an unknown hook.
    """
    if not place.has(CONFIG):
        size = _QWEN.search(place.words)
        if size is None:
            return Hooks(None, None, None, "none", (f"it has no {CONFIG}",))
        return Hooks(f"Qwen/Qwen3-{size[1]}B", Site(layer, "mlp.in"), Site(layer, "mlp.out"), "none",
                     (f"it has no {CONFIG}; model and sites follow from the repository's name",))
    config, ends = place.mapping(CONFIG), list[tuple[Site, Normalize]]()
    for key in ("feature_input_hook", "feature_output_hook"):
        hook = config.get(key)
        found = of_hook(f"blocks.{layer}.{hook}")
        if found is None:
            raise UserError(f"{place.where(CONFIG)}: {key} {hook!r} is not a known site (mlp.hook_in, "
                            "hook_resid_mid, ln2.hook_normalized, hook_mlp_out)")
        ends.append(found)
    (reads, normalize), (writes, _) = ends
    return Hooks(config.get("model_name"), reads, writes, normalize, (NORMALIZED,) if normalize != "none" else ())


def config_of(opened_sae: Opened, folder: Path) -> dict[str, Any]:
    """What config.yaml says of a set with this transcoder in it, which is the same for all layers of a set.

    Args:
        folder: where it would be written, for messages.

    Raises:
        UserError: it is not a transcoder that circuit-tracer can express.
    """
    sae = opened_sae.sae
    rescaled = sae.normalize == "constant_norm_rescale" and sae.reads == (Site(sae.writes[0].layer, "mid"),)
    _refuse(opened_sae, folder, rescaled)
    (reads,), (writes,) = sae.reads, sae.writes
    config: dict[str, Any] = {
        "model_name": opened_sae.model_name, "model_kind": "transcoder_set",
        "feature_input_hook": "ln2.hook_normalized" if rescaled else _within(reads),
        "feature_output_hook": _within(writes)}
    if isinstance(sae, TopK):
        config |= {"activation": "topk", "k": sae.k}
    return config


def write_layer(opened_sae: Opened, folder: Path) -> Path:
    """Write one layer of a set, `layer_L.safetensors`, without its config.yaml (`write_config`).

    Raises:
        UserError: as `config_of`; weights that are not finite; no space.
    """
    config_of(opened_sae, folder)
    sae = opened_sae.sae
    refuse_not_finite(sae.state_dict(), folder)
    assert isinstance(sae, TopK | JumpReLU)
    tensors: dict[str, Tensor] = {"W_enc": sae.W_enc, "b_enc": encoder_bias(sae, None), "W_dec": sae.W_dec,
                                  "b_dec": sae.b_out}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    if isinstance(sae, JumpReLU) and sae.threshold.any():  # without thresholds it is a ReLU
        tensors[THRESHOLD] = sae.threshold
    path = folder / f"layer_{sae.writes[0].layer}.safetensors"
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().float().clone().contiguous() for name, tensor in tensors.items()}, temporary)
    return path


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.yaml beside the layers."""
    write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))


def _refuse(opened_sae: Opened, folder: Path, rescaled: bool) -> None:
    """Refuse what circuit-tracer has no class for."""
    sae = opened_sae.sae
    plain = type(sae) in (TopK, JumpReLU) and len(sae.reads) == len(sae.writes) == 1
    if not sae.transcoder or not plain:
        raise UserError(f"{folder}: {opened_sae.name} was not written: circuit-tracer replaces MLPs by transcoders "
                        "(ReLU, JumpReLU, TopK) and takes nothing else; write an SAE for SAELens (`olmoscope export` "
                        "without --to)")
    if sae.normalize != "none" and not rescaled:
        raise UserError(f"{folder}: {opened_sae.name} was not written: circuit-tracer does not normalise rows "
                        f"({sae.normalize}) before it encodes; write it for SAELens (`olmoscope export` without --to)")
    reads, writes = sae.reads[0], sae.writes[0]
    if reads.layer != writes.layer or reads.model or writes.model or sae.d_in != sae.d_out:
        raise UserError(f"{folder}: {opened_sae.name} was not written: a transcoder of circuit-tracer reads and writes "
                        f"one layer and one width; this one reads {reads} ({sae.d_in}) and writes {writes} "
                        f"({sae.d_out})")


def _within(site: Site) -> str:
    """The hook within its layer: `mlp.hook_in` of `blocks.7.mlp.hook_in`."""
    return site.transformer_lens.partition(".")[2].partition(".")[2]
