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

from olmoscope.errors import UserError
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.layout import Layout, holds, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, Rule, checked_k, site_from, stated
from olmoscope.sae.io.site_names import NORMALIZED, of_hook
from olmoscope.sae.normalize import Normalize
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
