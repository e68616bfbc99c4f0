"""SAELens' folder for one SAE: reading and writing.

    cfg.json                   every setting; written last: the SAE exists
    sae_weights.safetensors    W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D], threshold [F] for a jumprelu; float32;
                               for a transcoder W_dec [F, D_out], b_dec [D_out], and W_skip [D_out, D] if it has one

Reading supports `topk`, `standard` (ReLU), `jumprelu`, `gated`, the `batchtopk` and `matryoshka_batchtopk` that
SAELens' trainer keeps as checkpoints, and `transcoder` (ReLU), `skip_transcoder`, `jumprelu_transcoder` and
`jumprelu_skip_transcoder`, in the layouts before and since version 6. A folder that lacks a necessary setting is
refused; nothing is guessed. Writing supports `topk`, `jumprelu` and the transcoders, and leaves no setting to SAELens'
defaults: there a missing `k` silently becomes 100, a missing `apply_b_dec_to_input` becomes true, and metadata without
a `sae_lens_version` of 6 or more is silently discarded. SAELens has no transcoder of the k largest latents. If such a
transcoder reads and writes rows of one width and has no skip, it is written as a `topk` SAE with a `hook_name_out` in
its metadata: this computes the same, and SAELens puts the output at that hook. Settings are in saelens_settings.py,
tensors in saelens_tensors.py, hook names in saelens_places.py.

Shapes: D d_model, D_out width written, F latents. Source: SAELens 6.54.12, `sae_lens/saes/*_sae.py` and
`transcoder.py`, `sae_lens/loading/pretrained_sae_loaders.py`, `sae_lens/analysis/hooked_sae_transformer.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from olmoscope.errors import UserError
from olmoscope.files import atomic_path, make_folder, sha256, write_json
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.outgoing import refuse_not_finite
from olmoscope.sae.io.place import Here, Place
from olmoscope.sae.io.reading import Reading, Rule, stated
from olmoscope.sae.io.refused import refuse_kind
from olmoscope.sae.io.saelens_places import begins_with_bos, ends, is_transcoder, refuse_unstated, unread
from olmoscope.sae.io.saelens_settings import (
    CONFIG,
    raw_settings,
    read_settings,
    row_normalisation,
    row_scale,
    weights_dtype,
)
from olmoscope.sae.io.saelens_tensors import (
    KINDS,
    WEIGHTS,
    check_tensors,
    is_centred,
    raw_tensors,
    read_coder,
    rescales,
    tensors_of,
)
from olmoscope.sae.normalize import Normalize
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.site import Site

NAME = "an SAE in SAELens' format"
MARK = CONFIG
SEARCH: str | None = f"**/{CONFIG}"

VERSION = "6.54.12"
"""The version of SAELens whose format this is."""

FIXED = {"dtype": "float32", "apply_b_dec_to_input": True, "reshape_activations": "none"}
"""Settings that are the same for every SAE that we write; a transcoder's `b_dec` does not belong to the rows that it
reads."""

_KEYS = (*FIXED, "architecture", "d_in", "d_sae", "normalize_activations", "device", "metadata")
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")

KEYS = {"topk": (*_KEYS, "k", "rescale_acts_by_decoder_norm"), "jumprelu": _KEYS} | dict.fromkeys(
    _TRANSCODERS, (*_KEYS, "d_out"))
"""Every key of cfg.json, by architecture; SAELens would replace an absent key by its default."""

METADATA = ("sae_lens_version", "model_name", "hook_name", "hf_hook_name", "prepend_bos", "training_architecture")
"""Metadata without which it is unclear which activations the SAE reads."""

METADATA_OUT = ("hook_name_out", "hf_hook_name_out")
"""The same for the activations that a transcoder writes."""


def fixed(uncentred: bool) -> dict[str, Any]:
    """The settings that are the same for all SAEs, or for all transcoders and the SAEs that subtract nothing."""
    return FIXED | {"apply_b_dec_to_input": not uncentred}


def architecture_of(sae: SparseCoder) -> str:
    """SAELens' name for an SAE or transcoder.

    Raises:
        UserError: SAELens has no architecture that computes the same.
    """
    kind = type(sae).__name__
    if not isinstance(sae, TopK | JumpReLU) or isinstance(sae, GroupMax):
        raise UserError(f"a {kind} SAE cannot be written in SAELens' format; only topk and jumprelu can")
    if len(sae.reads) > 1:
        raise UserError("SAELens' format has no crosscoders, so this one cannot be written")
    if isinstance(sae, JumpReLU):
        if not sae.transcoder:
            return "jumprelu"
        return f"{'jumprelu_' if sae.threshold.any() else ''}{'' if sae.W_skip is None else 'skip_'}transcoder"
    if sae.transcoder and (sae.W_skip is not None or sae.d_in != sae.d_out or sae.normalize != "none"):
        skip = "" if sae.W_skip is None else " with a skip"
        raise UserError(f"{sae}{skip}: SAELens has transcoders of the k largest latents only without a skip, and "
                        "between rows of one width that are not normalised; train it with activation: batchtopk or "
                        "jumprelu")
    return "topk"


def detect(place: Place) -> bool:
    """Whether there is a cfg.json, which states everything else."""
    return place.file is None and place.has(CONFIG)


@dataclass(frozen=True)
class _Settings:
    """The settings in cfg.json that decide how the tensors are read."""

    config: dict[str, Any]
    metadata: dict[str, Any]
    transcoder: bool
    ends: tuple[Site | None, Site | None]
    normalize: Normalize
    scale: float


def _settings(place: Place, site: Site | None) -> _Settings:
    """Read cfg.json.

    Raises:
        UserError: see `read`.
    """
    path = (place.folder / CONFIG if isinstance(place, Here) else place.fetch(CONFIG)).parent
    registered = place.registered
    config, metadata = read_settings(path, registered.overrides if registered else None)
    architecture = config["architecture"]
    refuse_kind(str(path / CONFIG), "architecture", architecture, KINDS)
    transcoder = is_transcoder(architecture, metadata)
    reads, writes = ends(metadata, transcoder, site, path / CONFIG)
    return _Settings(config, metadata, transcoder, (reads, writes),
                 row_normalisation(config, metadata, path / CONFIG, reads, transcoder),
                 row_scale(config, path / CONFIG, registered))


def look(place: Place, site: Site | None = None) -> Reading:
    """How the SAE of a folder is read.

    Raises:
        UserError: see `read`; but a site that is not stated is left empty.
    """
    settings, where = _settings(place, site), Path(place.where(CONFIG))
    config, metadata, architecture = settings.config, settings.metadata, settings.config["architecture"]
    there = {name.replace("log_threshold", "threshold"): shape
             for name, shape in place.header(WEIGHTS).shapes.items() if name != "scaling_factor"}
    check_tensors(place.where(WEIGHTS), there, config)
    d_in, d_sae, both_signs = config["d_in"], config["d_sae"], architecture == "abstopk"
    rescaled, context = rescales(config), metadata.get("context_size")
    reads, writes = (() if end is None else (end,) for end in settings.ends)
    return Reading(
        NAME, _rule(architecture), d_in, config.get("d_out") or d_in, 2 * d_sae if both_signs else d_sae,
        (WEIGHTS, CONFIG), reads, writes, metadata.get("model_name"),
        metadata.get("model_revision"), k=config.get("k") if architecture in ("topk", "abstopk") else None,
        transcoder=settings.transcoder,
        centred=bool(config.get("apply_b_dec_to_input", True)), normalize=settings.normalize, scale=settings.scale,
        scale_out=settings.scale, by_decoder_norm=rescaled, unit_rows=rescaled, skip="skip" in architecture,
        bos=begins_with_bos(metadata, where), context_size=context if isinstance(context, int) else None,
        dtype=weights_dtype(config, where), metadata=metadata, unread=unread(metadata),
        notes=("each latent becomes two, one for each sign",) if both_signs else (),
        stated=stated(place, **_published(metadata)))


def _published(metadata: Mapping[str, Any]) -> dict[str, float]:
    """Figures in the metadata, by the names that `Reading.stated` uses."""
    return {name: float(value) for key, name in (("l0", "L0"), ("explained_variance", "explained variance"))
            if isinstance(value := metadata.get(key), int | float) and not isinstance(value, bool)}


def _rule(architecture: str) -> Rule:
    """How an architecture of `KINDS` chooses latents."""
    if architecture in ("topk", "abstopk", "gated"):
        return cast(Rule, architecture)
    return "relu" if architecture in ("standard", "transcoder", "skip_transcoder") else "jumprelu"


def read(place: Place, site: Site | None = None) -> Opened:
    """Read the SAE of a folder.

    Args:
        site: the site that it writes (for an SAE: reads and writes), if the folder does not say.

    Raises:
        UserError: files are missing or damaged; the kind of SAE is not supported; its site is not known, or is not
            `site`.
    """
    settings = _settings(place, site)
    config, metadata = settings.config, settings.metadata
    path = place.folder if isinstance(place, Here) else place.fetch(WEIGHTS).parent
    reads, writes = refuse_unstated(*settings.ends, settings.transcoder, path / CONFIG)
    sae = read_coder(path, config, settings.normalize, settings.transcoder, settings.scale).at([reads], [writes])
    context = metadata.get("context_size")
    files = {name: sha256(path / name) for name in (WEIGHTS, CONFIG)}
    return Opened(
        sae, path.resolve().name, metadata.get("model_name"), metadata.get("model_revision"), config["architecture"],
        path, "folder", f"sha256:{files[WEIGHTS][:32]}-{files[CONFIG][:8]}",
        bos=begins_with_bos(metadata, path / CONFIG), context_size=context if isinstance(context, int) else None,
        dtype=weights_dtype(config, path / CONFIG), metadata=metadata, unread=unread(metadata), files=files)


def write(sae: SparseCoder, path: Path, metadata: Mapping[str, Any]) -> bool:
    """Write an SAE into a folder in SAELens' format, unless the folder already has the same values.

    Args:
        metadata: JSON values; it must have all keys of `METADATA`, except for the two that are known here
            (`sae_lens_version`, and `training_architecture` if it equals the architecture that is written).

    Returns:
        Whether anything was written.

    Raises:
        UserError: SAELens cannot compute the SAE, weights are not finite, or the disk is full.
    """
    try:
        architecture_of(sae)
    except UserError as error:
        raise UserError(f"{path} was not written: {error}") from error
    assert isinstance(sae, TopK | JumpReLU)
    config, tensors = _config_of(sae, metadata), tensors_of(sae)
    absent = [key for key in required(sae.transcoder) if key not in config["metadata"]]
    assert not absent, f"metadata must name {absent}"
    refuse_not_finite(tensors, path)
    if is_written(sae, path, metadata):
        return False
    make_folder(path)
    # Without cfg.json, the folder is not read as an SAE while new weights replace old ones.
    (path / CONFIG).unlink(missing_ok=True)
    with atomic_path(path / WEIGHTS) as temporary:
        # The transpose of a matrix of one row is already contiguous: without a copy, the matrices of a tied SAE would
        # share memory, which safetensors refuses.
        tensors["W_enc"] = tensors["W_enc"].clone(memory_format=torch.contiguous_format)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"})
    write_json(path / CONFIG, config)
    return True


def required(transcoder: bool) -> tuple[str, ...]:
    """The required keys of the metadata."""
    return (*METADATA, *METADATA_OUT) if transcoder else METADATA


def is_written(sae: TopK | JumpReLU, path: Path, metadata: Mapping[str, Any]) -> bool:
    """Whether a folder holds exactly what `write` would write there; false if absent or damaged."""
    config, tensors = _config_of(sae, metadata), tensors_of(sae)
    try:
        # Through JSON, so that a tuple equals the list that JSON makes of it.
        if raw_settings(path) != json.loads(json.dumps(config)):
            return False
        there = raw_tensors(path)
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return there.keys() == tensors.keys() and all(
        there[name].dtype == torch.float32 and torch.equal(there[name], tensor.cpu())
        for name, tensor in tensors.items())


def _config_of(sae: TopK | JumpReLU, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of cfg.json."""
    tied = "tied_" if sae.W_enc is sae.W_dec else ""
    architecture = architecture_of(sae)
    own = {"k": sae.k, "rescale_acts_by_decoder_norm": False} if isinstance(sae, TopK) else {}
    width = {"d_out": sae.d_out} if architecture in _TRANSCODERS else {}
    return {
        "architecture": architecture,
        **fixed(not is_centred(sae)),
        "d_in": sae.d_in,
        **width,
        "d_sae": sae.d_sae,
        **own,
        "normalize_activations": sae.normalize,
        "device": "cpu",
        "metadata": {"sae_lens_version": VERSION, "sae_lens_training_version": None,
                     "training_architecture": tied + architecture, **metadata},
    }
