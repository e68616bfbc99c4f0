"""Cross-layer transcoders, one layer at a time. A layer's transcoder reads its MLP input, and writes the MLP outputs of
this layer and all later ones, side by side.

    W_enc_7.safetensors    W_enc_7 [F, D], b_enc_7 [F], b_dec_7 [D], perhaps threshold_7 [F]
    W_dec_7.safetensors    W_dec_7 [F, L, D]: for layer 7 and the L − 1 after it
    config.yaml            circuit-tracer's: model_name, feature_input_hook, feature_output_hook

The MLP output of a layer is the sum of what all transcoders up to that layer write there. b_dec belongs to the
transcoder's own layer, so here it is in the first output only. Source: circuit-tracer 0.4.1,
`transcoder/cross_layer_transcoder.py`; sae-lens 6.54.12, `mntss_clt_layer_huggingface_loader`, which sums a
transcoder's outputs into one.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.circuit_tracer import CONFIG, Hooks, hooks_of
from olmoscope.sae.io.layout import Layout, holds, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, site_from, stated
from olmoscope.site import Site

NAME = "a layer of a cross-layer transcoder"
MARK = "W_enc_L.safetensors"
SEARCH: str | None = "=W_enc_*.safetensors"

CLT_NOTE = ("it is one layer of a cross-layer transcoder: an MLP output is the sum of what all layers up to it write, "
            "so this one alone reconstructs only a part (SAELens sums all its outputs into one)")

_FILE = re.compile(r"W_enc_(\d+)\.safetensors")


def detect(place: Place) -> bool:
    """Whether it is a file that holds a layer's encoder."""
    found = _FILE.fullmatch(place.file or "")
    return found is not None and holds(place, place.file, f"W_enc_{found[1]}")


def look(place: Place, site: Site | None = None) -> Reading:
    """How it is read.

    Raises:
        UserError: tensors that do not fit together, no decoder file, unknown hooks, another site than `site`.
    """
    layer, decoder = _layer(place), f"W_dec_{_layer(place)}.safetensors"
    if not place.has(decoder):
        raise UserError(f"{place.where(decoder)} is missing: it holds the decoders of {place.where()}")
    file = str(place.file)
    found = sizes(place, file, _encoder(layer), NAME, optional=(f"threshold_{layer}",))
    of_decoder = sizes(place, decoder, _decoder(layer), NAME)
    if of_decoder["F"] != found["F"] or of_decoder["O"] != found["O"]:
        raise UserError(f"{place.where(decoder)} has {of_decoder['F']} latents and width {of_decoder['O']}, "
                        f"{file} has {found['F']} and {found['O']}: they do not belong together")
    hooks: Hooks = hooks_of(place, layer)
    reads = site_from(place.where(), hooks.reads, None)
    site_from(place.where(), hooks.writes, site, "writes")
    layers = sum(1 for name in place.beside if _FILE.fullmatch(name))
    jumps = f"threshold_{layer}" in place.header(file).shapes
    return Reading(
        NAME, "jumprelu" if jumps else "relu", found["D"], found["O"] * of_decoder["L"], found["F"],
        (file, decoder, *([CONFIG] if place.has(CONFIG) else [])), reads,
        written(place, reads, of_decoder["L"], layers), hooks.model, transcoder=True, centred=False,
        normalize=hooks.normalize, bos="yes", dtype=place.header(file).dtype, notes=(*hooks.notes, CLT_NOTE),
        stated=stated(place))


def read(place: Place, site: Site | None = None) -> Opened:
    """Read it.

    Raises:
        UserError: as `look`; NaN.
    """
    reading, layer = look(place, site), _layer(place)
    tensors = load(place, reading.files[0], _encoder(layer)) | load(place, reading.files[1], _decoder(layer))
    return opened(place, reading, flat(tensors, reading.d_out))


def written(place: Place, reads: tuple[Site, ...], outputs: int, layers: int) -> tuple[Site, ...]:
    """The sites that a layer of a cross-layer transcoder writes.

    Args:
        outputs: the number of layers that it writes.
        layers: the number of layers of the whole transcoder.

    Raises:
        UserError: it writes neither all layers nor exactly those from its own on.
    """
    if not reads:
        return ()
    layer = reads[0].layer
    if layers > 1 and outputs not in (layers - layer, layers):
        raise UserError(f"{place.where()} writes {outputs} layers; layer {layer} of a transcoder of {layers} layers "
                        f"writes {layers - layer}: files are missing or belong to another transcoder")
    first = 0 if layers > 1 and outputs == layers else layer
    return tuple(Site(first + number, "mlp.out") for number in range(outputs))


def flat(tensors: Mapping[str, Tensor], d_out: int) -> dict[str, Tensor]:
    """The decoders of all outputs side by side, `[F, L · O]`; b_dec is in the first output only."""
    W_dec_FLO, b_dec_O = tensors["W_dec"], tensors["b_dec"]
    return dict(tensors) | {"W_dec": W_dec_FLO.reshape(len(W_dec_FLO), d_out).contiguous(),
                            "b_dec": torch.cat([b_dec_O, b_dec_O.new_zeros(d_out - len(b_dec_O))])}


def _layer(place: Place) -> int:
    found = _FILE.fullmatch(place.file or "")
    assert found is not None
    return int(found[1])


def _encoder(layer: int) -> Layout:
    return {f"W_enc_{layer}": ("W_enc", "FD"), f"b_enc_{layer}": ("b_enc", "F"), f"b_dec_{layer}": ("b_dec", "O"),
            f"threshold_{layer}": ("threshold", "F")}


def _decoder(layer: int) -> Layout:
    return {f"W_dec_{layer}": ("W_dec", "FLO")}
