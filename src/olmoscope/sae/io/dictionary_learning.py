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
from pathlib import Path
from typing import Any

import torch

from olmoscope.errors import UserError
from olmoscope.files import atomic_path, make_folder, write_json
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.layout import Layout, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.outgoing import encoder_bias, refuse_inexpressible
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, Rule, checked_k, site_from, stated
from olmoscope.sae.io.refused import refuse_kind
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
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
            raise UserError(f"{place.where(file)}: {key} is {found[letter]}; {CONFIG} says {trainer[key]}: they are "
                            "not of one SAE; download both again")
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


def write(opened_sae: Opened, path: Path) -> Path:
    """Write an SAE for dictionary_learning, as `AutoEncoderTopK` or `JumpReluAutoEncoder`.

    Returns:
        `path`, which `dictionary_learning.utils.load_dictionary` reads.

    Raises:
        UserError: a kind that it does not have, weights that are not finite, no space.
    """
    sae = opened_sae.sae
    refuse_inexpressible(sae, path, "dictionary_learning", "SAEs of one site with the k largest latents or thresholds",
                         isinstance(sae, TopK | JumpReLU) and not isinstance(sae, GroupMax) and not sae.transcoder
                         and len(sae.reads) <= 1)
    assert isinstance(sae, TopK | JumpReLU)
    trainer: dict[str, Any] = {"activation_dim": sae.d_in, "dict_size": sae.d_sae, "lm_name": opened_sae.model_name,
                               **_place_of(opened_sae.site)}
    if isinstance(sae, TopK):
        trainer |= {"dict_class": "AutoEncoderTopK", "k": sae.k}
        tensors = {"b_dec": sae.b_out.float(), "k": torch.tensor(sae.k), "threshold": torch.tensor(-1.0),
                   "encoder.weight": sae.W_enc.float(), "encoder.bias": encoder_bias(sae, sae.b_out),
                   "decoder.weight": sae.W_dec.float().T}
    else:
        trainer["dict_class"] = "JumpReluAutoEncoder"
        tensors = {"W_enc": sae.W_enc.float().T, "b_enc": encoder_bias(sae, None), "W_dec": sae.W_dec.float(),
                   "b_dec": sae.b_out.float(), "threshold": sae.threshold.float()}
    make_folder(path)
    (path / CONFIG).unlink(missing_ok=True)  # it must not be read while new weights replace old ones
    with atomic_path(path / MARK) as temporary:
        torch.save({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
                   temporary)
    write_json(path / CONFIG, {"trainer": trainer, "buffer": {"ctx_len": opened_sae.context_size}})
    return path


def _place_of(site: Site) -> dict[str, Any]:
    """The settings that state a site."""
    words = {part: word for word, part in _PARTS.items() if word != "attention"}
    word = words.get(site.part) if site.layer_or_none is not None else None
    if word is None:  # one that its trainers do not have: stated by our own name
        return {"layer": site.layer_or_none, "submodule_name": str(site)}
    return {"layer": site.layer, "submodule_name": f"{word}_{'post' if word == 'resid' else 'out'}_layer_{site.layer}"}


def _kind(place: Place, trainer: Mapping[str, Any]) -> _Kind:
    name = trainer["dict_class"]
    refuse_kind(place.where(CONFIG), "trainer.dict_class", name, _KINDS)
    return _KINDS[name]


def _site(trainer: Mapping[str, Any]) -> Site | None:
    """The site that it was trained on; None if the settings do not state it, or it is not a site here."""
    layer, word = trainer.get("layer"), re.match(r"[a-z]*", str(trainer.get("submodule_name") or "resid"))
    part = _PARTS.get(word[0] if word else "")
    return None if not isinstance(layer, int) or part is None else Site(layer, part)
