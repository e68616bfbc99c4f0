"""sparsify (EleutherAI): a folder for each module of the model, called as the module is.

    layers.10/cfg.json           activation (topk, groupmax), k, num_latents (0: d_in · expansion_factor), transcode
    layers.10/sae.safetensors    encoder.weight [F, D], encoder.bias [F], W_dec [F, D], b_dec [D], perhaps W_skip [D, D]
    config.json                  of the whole run: model, ctx_len, ...

What a module gives is read, and by a transcoder what it is given. b_dec is subtracted, but not by a transcoder. Source:
eai-sparsify 1.3.3, `sparse_coder.py`, `config.py`, `fused_encoder.py`. SAELens' loader for it turns W_dec round though
it stands the right way, and subtracts b_dec only where `normalize_decoder` is false: sparsify's own class is right.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from olmoscope.errors import UserError
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.layout import Layout, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, Rule, settled, stated
from olmoscope.sae.io.site_names import POST_NORM, of_module
from olmoscope.site import EMBED, Site

NAME = "a sparsify SAE"
MARK = "sae.safetensors"
SEARCH: str | None = "**/sae.safetensors"

CONFIG, OF_RUN = "cfg.json", "../config.json"
_RULES: dict[str, Rule] = {"topk": "topk", "groupmax": "groupmax"}
_LAYOUT: Layout = {"encoder.weight": ("W_enc", "FD"), "encoder.bias": ("b_enc", "F"), "W_dec": ("W_dec", "FO"),
                   "b_dec": ("b_dec", "O"), "W_skip": ("W_skip", "OD")}
_NOTE = ("SAELens' loader for sparsify differs: it turns W_dec round, ties the subtraction of b_dec to "
         "normalize_decoder, and takes num_latents 0 literally; here it is read as by sparsify itself")


def detect(place: Place) -> bool:
    """Whether there are both files."""
    return place.file is None and place.has(CONFIG) and place.has(MARK)


def look(place: Place, site: Site | None = None) -> Reading:
    """How it is read.

    Raises:
        UserError: tensors that do not fit together or to cfg.json, a kind that is not read, another site than `site`.
    """
    config, run = place.mapping(CONFIG), place.mapping(OF_RUN) if place.has(OF_RUN) else {}
    if config.get("signed"):
        raise UserError(f"{place.where(CONFIG)}: signed: latents that fire negatively are not read")
    activation = config.get("activation", "topk")
    if activation not in _RULES:
        raise UserError(f"{place.where(CONFIG)}: activation {activation!r} is not read; those are {', '.join(_RULES)}")
    found, transcoder = sizes(place, MARK, _LAYOUT, NAME, optional=("W_skip",)), bool(config.get("transcode"))
    _check(place, config, found)
    model = run.get("model")
    reads, writes = _ends(place, transcoder, model)
    skip = "W_skip" in place.header(MARK).shapes
    if found["D"] != found["O"] or (skip and not transcoder):
        raise UserError(f"{place.where(MARK)} reads width {found['D']}, writes {found['O']}"
                        f"{' and has a W_skip' if skip else ''}: that is no SAE, and transcode is {transcoder}")
    context = run.get("ctx_len")
    return Reading(
        NAME, _RULES[activation], found["D"], found["O"], found["F"],
        (MARK, CONFIG, *([OF_RUN] if run else [])), settled(place.where(), reads, None if transcoder else site),
        settled(place.where(), writes, site, "writes"), model, k=config["k"], transcoder=transcoder,
        centred=not transcoder, skip=skip, context_size=context if isinstance(context, int) else None,
        dtype=place.header(MARK).dtype, notes=(_NOTE,), stated=stated(place), metadata=run | {"cfg": config})


def read(place: Place, site: Site | None = None) -> Opened:
    """Read it.

    Raises:
        UserError: as `look`; NaN; a site that nothing says.
    """
    return opened(place, look(place, site), load(place, MARK, _LAYOUT))


def _check(place: Place, config: Mapping[str, Any], found: Mapping[str, int]) -> None:
    """The settings must be those of the tensors."""
    d_in, k = config.get("d_in"), config.get("k")
    latents = config.get("num_latents") or (d_in or 0) * config.get("expansion_factor", 32)
    if (d_in, latents) != (found["D"], found["F"]):
        raise UserError(f"{place.where(MARK)} is of d_in {found['D']} and {found['F']} latents; {CONFIG} says {d_in} "
                        f"and {latents}")
    if not isinstance(k, int) or not 0 < k <= latents:
        raise UserError(f"{place.where(CONFIG)}: k must be a number from 1 to {latents}, not {k!r}")
    if config.get("activation") == "groupmax" and latents % k:
        raise UserError(f"{place.where(CONFIG)}: groupmax: {latents} latents are not {k} groups of one size")


def _ends(place: Place, transcoder: bool, model: str | None) -> tuple[Site | None, Site | None]:
    """What the module that the folder is called after gives, and what it is given; None: it is no site."""
    name = PurePosixPath(place.words).name
    gives = of_module(name)
    if gives is None:
        return None, None
    if gives.part in ("mlp.out", "attn.out") and POST_NORM.search(model or ""):
        raise UserError(f"{place.where()}: what {name} of {model} gives is not what is added to the residual stream, "
                        "since a norm follows it: it is no site that is known here")
    if not transcoder:
        return gives, gives
    given = {"mlp.out": Site(gives.layer, "mlp.in"), "attn.out": Site(gives.layer, "attn.in"),
             "": Site(gives.layer - 1)}.get(gives.part) if gives != EMBED else None
    return given, gives
