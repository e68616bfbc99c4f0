"""dictionary_learning (saprmarks): a folder for each trainer, with a state dict and the trainer's settings.

    trainer_0/ae.pt          the state dict of one of seven classes
    trainer_0/config.json    trainer: dict_class, activation_dim, dict_size, k, layer, lm_name, submodule_name, ...
                             buffer: ctx_len, ...

The classes differ in what they subtract and in how they choose latents (`_KINDS`). The trainer folds its normalisation
of activations into the weights before it saves them. Source: dictionary-learning 0.1.0, `dictionary.py` and
`trainers/*.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from olmoscope.errors import UserError
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.layout import Layout, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, Rule, checked_k, site_from, stated
from olmoscope.site import Site

NAME = "a dictionary_learning SAE"
MARK = "ae.pt"
SEARCH: str | None = "**/ae.pt"

CONFIG = "config.json"

_LINEAR: Layout = {"encoder.weight": ("W_enc", "FD"), "encoder.bias": ("b_enc", "F"), "decoder.weight": ("W_dec", "DF")}
_MATRICES: Layout = {"W_enc": ("W_enc", "DF"), "b_enc": ("b_enc", "F"), "W_dec": ("W_dec", "FD"),
                     "b_dec": ("b_dec", "D")}
_SCALAR: Layout = {"threshold": ("threshold", "")}


@dataclass(frozen=True)
class _Kind:
    """One class."""

    rule: Rule
    layout: Layout
    centred: bool = True
    ignored: tuple[str, ...] = ()
    note: str | None = None


_KINDS = {
    "AutoEncoder": _Kind("relu", {**_LINEAR, "bias": ("b_dec", "D")}, note=(
        "from_pretrained of its class scales decoder rows to unit norm by default, and codes with them; here both stay "
        "as they were saved")),
    "AutoEncoderNew": _Kind("relu", {**_LINEAR, "decoder.bias": ("b_dec", "D")}, centred=False),
    "AutoEncoderTopK": _Kind("topk", {**_LINEAR, "b_dec": ("b_dec", "D")}, ignored=("k", "threshold")),
    "BatchTopKSAE": _Kind("jumprelu", {**_LINEAR, "b_dec": ("b_dec", "D"), **_SCALAR}, ignored=("k",)),
    "MatryoshkaBatchTopKSAE": _Kind("jumprelu", {**_MATRICES, **_SCALAR}, ignored=("k", "group_sizes")),
    "GatedAutoEncoder": _Kind("gated", {
        "encoder.weight": ("W_enc", "FD"), "decoder.weight": ("W_dec", "DF"), "decoder_bias": ("b_dec", "D"),
        "r_mag": ("r_mag", "F"), "gate_bias": ("b_gate", "F"), "mag_bias": ("b_mag", "F")}),
    "JumpReluAutoEncoder": _Kind("jumprelu", {**_MATRICES, "threshold": ("threshold", "F")}, centred=False),
}

_PARTS = {"resid": "", "mlp": "mlp.out", "attn": "attn.out", "attention": "attn.out"}
"""The sites, by the first word of `submodule_name`."""


def detect(place: Place) -> bool:
    """Whether a config.json beside an ae.pt (or the torch file named) says the class of its trainer's dictionary."""
    if place.only(".pt") is None or not place.has(CONFIG):
        return False
    config = place.json(CONFIG)
    return isinstance(config, dict) and isinstance(config.get("trainer"), dict) and "dict_class" in config["trainer"]


def look(place: Place, site: Site | None = None) -> Reading:
    """How it is read.

    Raises:
        UserError: an unsupported class, tensors that do not fit together or to config.json, another site than
            `site`.
    """
    file, config = str(place.only(".pt")), place.mapping(CONFIG)
    trainer, buffer = config["trainer"], config.get("buffer") or {}
    kind = _kind(place, trainer)
    found = sizes(place, file, kind.layout, f"a {trainer['dict_class']}", ignored=kind.ignored)
    for key, letter in (("activation_dim", "D"), ("dict_size", "F")):
        if trainer.get(key, found[letter]) != found[letter]:
            raise UserError(f"{place.where(file)}: {key} is {found[letter]}; {CONFIG} says {trainer[key]}")
    k = None
    if kind.rule == "topk":
        k = checked_k(trainer.get("k"), found["F"], f"{place.where(CONFIG)}: trainer.k")
    sites = site_from(place.where(), _site(trainer), site)
    context = buffer.get("ctx_len")
    return Reading(
        NAME, kind.rule, found["D"], found["D"], found["F"], (file, CONFIG), sites, sites, trainer.get("lm_name"),
        k=k, centred=kind.centred,
        context_size=context if isinstance(context, int) else None, dtype=place.header(file).dtype,
        notes=() if kind.note is None else (kind.note,), stated=stated(place), metadata=config)


def read(place: Place, site: Site | None = None) -> Opened:
    """Read it.

    Raises:
        UserError: as `look`; NaN; an unknown site.
    """
    reading = look(place, site)
    kind = _kind(place, place.mapping(CONFIG)["trainer"])
    return opened(place, reading, load(place, reading.files[0], kind.layout))


def _kind(place: Place, trainer: Mapping[str, Any]) -> _Kind:
    name = trainer["dict_class"]
    if name not in _KINDS:
        raise UserError(f"{place.where(CONFIG)}: trainer.dict_class {name!r} is not supported; supported are "
                        f"{', '.join(_KINDS)}")
    return _KINDS[name]


def _site(trainer: Mapping[str, Any]) -> Site | None:
    """The site that it was trained on; None if the settings do not state it, or it is not a site here."""
    layer, word = trainer.get("layer"), re.match(r"[a-z]*", str(trainer.get("submodule_name") or "resid"))
    part = _PARTS.get(word[0] if word else "")
    return None if not isinstance(layer, int) or part is None else Site(layer, part)
