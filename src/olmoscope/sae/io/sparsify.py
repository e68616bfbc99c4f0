"""sparsify (EleutherAI): a folder for each module of the model, with the module's name.

    layers.10/cfg.json           activation (topk, groupmax), k, num_latents (0: d_in · expansion_factor), transcode
    layers.10/sae.safetensors    encoder.weight [F, D], encoder.bias [F], W_dec [F, D], b_dec [D], perhaps W_skip [D, D]
    config.json                  settings of the whole run: model, ctx_len, ...

An SAE reads the module's output, a transcoder its input. An SAE subtracts b_dec, a transcoder does not. SAELens' loader
transposes W_dec, which is in the right order already, and subtracts b_dec only if `normalize_decoder` is false; this
reader does the same as sparsify's own class. Source: eai-sparsify 1.3.3, `sparse_coder.py`, `config.py`,
`fused_encoder.py`.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file

from olmoscope.errors import UserError
from olmoscope.files import atomic_path, make_folder, write_json
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.layout import Layout, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.outgoing import encoder_bias, refuse_inexpressible
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, Rule, checked_k, site_from, stated
from olmoscope.sae.io.site_names import POST_NORM, of_module
from olmoscope.sae.topk import TopK
from olmoscope.site import EMBED, Site

NAME = "a sparsify SAE"
MARK = "sae.safetensors"
SEARCH: str | None = "**/sae.safetensors"

CONFIG, OF_RUN = "cfg.json", "../config.json"
_RULES: dict[str, Rule] = {"topk": "topk", "groupmax": "groupmax"}
_LAYOUT: Layout = {"encoder.weight": ("W_enc", "FD"), "encoder.bias": ("b_enc", "F"), "W_dec": ("W_dec", "FO"),
                   "b_dec": ("b_dec", "O"), "W_skip": ("W_skip", "OD")}
_NOTE = ("SAELens' loader for sparsify differs from sparsify: it transposes W_dec, subtracts b_dec depending on "
         "normalize_decoder, and takes num_latents 0 literally; this reader does as sparsify")


def detect(place: Place) -> bool:
    """Whether there are both files."""
    return place.file is None and place.has(CONFIG) and place.has(MARK)


def look(place: Place, site: Site | None = None) -> Reading:
    """How it is read.

    Raises:
        UserError: tensors that do not fit together or to cfg.json, an unsupported kind, another site than `site`.
    """
    config, run = place.mapping(CONFIG), place.mapping(OF_RUN) if place.has(OF_RUN) else {}
    if config.get("signed"):
        raise UserError(f"{place.where(CONFIG)}: signed: latents with negative codes are not supported")
    activation = config.get("activation", "topk")
    if activation not in _RULES:
        raise UserError(f"{place.where(CONFIG)}: activation {activation!r} is not supported; supported are "
                        f"{', '.join(_RULES)}")
    found, transcoder = sizes(place, MARK, _LAYOUT, NAME, optional=("W_skip",)), bool(config.get("transcode"))
    _check(place, config, found)
    model = run.get("model")
    reads, writes = _ends(place, transcoder, model)
    skip = "W_skip" in place.header(MARK).shapes
    if found["D"] != found["O"] or (skip and not transcoder):
        raise UserError(f"{place.where(MARK)} reads width {found['D']}, writes {found['O']}"
                        f"{' and has a W_skip' if skip else ''}: this does not fit transcode {transcoder}")
    context = run.get("ctx_len")
    return Reading(
        NAME, _RULES[activation], found["D"], found["O"], found["F"],
        (MARK, CONFIG, *([OF_RUN] if run else [])), site_from(place.where(), reads, None if transcoder else site),
        site_from(place.where(), writes, site, "writes"), model, k=config["k"], transcoder=transcoder,
        centred=not transcoder, skip=skip, context_size=context if isinstance(context, int) else None,
        dtype=place.header(MARK).dtype, notes=(_NOTE,), stated=stated(place), metadata=run | {"cfg": config})


def read(place: Place, site: Site | None = None) -> Opened:
    """Read it.

    Raises:
        UserError: as `look`; NaN; an unknown site.
    """
    return opened(place, look(place, site), load(place, MARK, _LAYOUT))


def write(opened_sae: Opened, path: Path) -> Path:
    """Write an SAE or transcoder for sparsify: `path/MODULE/`, and `path/config.json` beside it.

    Returns:
        The module's folder, which `SparseCoder.load_from_disk` reads.

    Raises:
        UserError: a kind or site that sparsify does not have, weights that are not finite, no space.
    """
    sae = opened_sae.sae
    refuse_inexpressible(sae, path, "sparsify", "the k largest latents (topk) and those of groups (groupmax)",
                         isinstance(sae, TopK) and len(sae.reads) == 1)
    assert isinstance(sae, TopK)
    if sae.d_in != sae.d_out:
        raise UserError(f"{path} was not written: sparsify writes the width that it reads; this transcoder reads "
                        f"{sae.d_in} and writes {sae.d_out}")
    folder = path / _module_of(opened_sae, path)
    tensors = {"encoder.weight": sae.W_enc.float(), "W_dec": sae.W_dec.float(), "b_dec": sae.b_out.float(),
               "encoder.bias": encoder_bias(sae, None if sae.transcoder else sae.b_out)}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.float()
    config = {"activation": "groupmax" if isinstance(sae, GroupMax) else "topk", "d_in": sae.d_in, "k": sae.k,
              "num_latents": sae.d_sae, "expansion_factor": max(1, sae.d_sae // sae.d_in), "normalize_decoder": False,
              "multi_topk": False, "skip_connection": sae.W_skip is not None, "transcode": sae.transcoder}
    make_folder(folder)
    (folder / CONFIG).unlink(missing_ok=True)  # it must not be read while new weights replace old ones
    with atomic_path(folder / MARK) as temporary:
        save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
                  temporary)
    write_json(folder / CONFIG, config)
    write_json(path / "config.json", {"model": opened_sae.model_name, "ctx_len": opened_sae.context_size})
    return folder


def _module_of(opened_sae: Opened, path: Path) -> str:
    """The module whose output an SAE reads, or whose input a transcoder reads and whose output it writes."""
    site = opened_sae.site
    module = {"": "layers.{}", "mlp.out": "layers.{}.mlp", "attn.out": "layers.{}.self_attn"}.get(site.part)
    if module is None or site == EMBED:
        raise UserError(f"{path} was not written: {site} is not the output of a module, as sparsify needs it")
    found = module.format(site.layer)
    given = _ends_of(site, opened_sae.sae.transcoder)
    if opened_sae.reads != (given,):
        raise UserError(f"{path} was not written: a sparsify transcoder of {site} reads {given}; this one reads "
                        f"{', '.join(map(str, opened_sae.reads))}")
    return found


def _check(place: Place, config: Mapping[str, Any], found: Mapping[str, int]) -> None:
    """Refuse settings that contradict the tensors."""
    d_in = config.get("d_in")
    latents = config.get("num_latents") or (d_in or 0) * config.get("expansion_factor", 32)
    if (d_in, latents) != (found["D"], found["F"]):
        raise UserError(f"{place.where(MARK)} has d_in {found['D']} and {found['F']} latents; {CONFIG} says {d_in} "
                        f"and {latents}: they are not of one SAE; download both again")
    k = checked_k(config.get("k"), latents, f"{place.where(CONFIG)}: k")
    if config.get("activation") == "groupmax" and latents % k:
        raise UserError(f"{place.where(CONFIG)}: groupmax: {latents} latents cannot be split into {k} equal groups")


def _ends(place: Place, transcoder: bool, model: str | None) -> tuple[Site | None, Site | None]:
    """The sites that it reads and writes, by the folder's name, which is a module's; None if it is not a site."""
    name = PurePosixPath(place.words).name
    gives = of_module(name)
    if gives is None:
        return None, None
    if gives.part in ("mlp.out", "attn.out") and POST_NORM.search(model or ""):
        raise UserError(f"{place.where()}: in {model} a norm follows {name}, so its output is not what is added to the "
                        "residual stream, and it is not a known site")
    return _ends_of(gives, transcoder), gives


def _ends_of(gives: Site, transcoder: bool) -> Site | None:
    """The site that an SAE or transcoder reads if it writes `gives`."""
    if not transcoder:
        return gives
    if gives == EMBED:
        return None
    return {"mlp.out": Site(gives.layer, "mlp.in"), "attn.out": Site(gives.layer, "attn.in"),
            "": Site(gives.layer - 1)}.get(gives.part)
