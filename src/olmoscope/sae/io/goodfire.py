"""Goodfire's SAEs and qresearch's, a torch file each, whose name states model and layer.

    Llama-3.1-8B-Instruct-SAE-l19.pth    encoder_linear.weight [F, D], encoder_linear.bias,
                                         decoder_linear.weight [D, F], decoder_linear.bias; ReLU (also Llama 3.3 70B)
    DeepSeek-R1-SAE-l37, math and logic  W [D, F], tied, b_enc [F], b_dec [D]; BatchTopK
    qresearch, ...-SAE-l19.pt            encoder.weight [F, D], encoder.bias, decoder.weight [D, F], decoder.bias; ReLU

b_dec is not subtracted. The SAEs for DeepSeek R1 keep the k · rows largest pre-activations of a batch, so a row's codes
depend on the other rows. Their files hold no threshold, so here each row has its own k largest. Source: sae-lens
6.54.12, `get_goodfire_huggingface_loader`, `deepseek_r1_sae_huggingface_loader`; goodfire-ai/r1-interpretability,
`sae.py`.
"""

import re

from olmoscope.errors import UserError
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.layout import Layout, holds, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, site_from, stated
from olmoscope.site import Site

NAME = "a Goodfire SAE"
MARK = "encoder_linear.weight, or W alone"
SEARCH: str | None = None

_LAYOUTS: tuple[Layout, ...] = (
    {"encoder_linear.weight": ("W_enc", "FD"), "encoder_linear.bias": ("b_enc", "F"),
     "decoder_linear.weight": ("W_dec", "DF"), "decoder_linear.bias": ("b_dec", "D")},
    {"encoder.weight": ("W_enc", "FD"), "encoder.bias": ("b_enc", "F"), "decoder.weight": ("W_dec", "DF"),
     "decoder.bias": ("b_dec", "D")},
    {"W": ("W", "DF"), "b_enc": ("b_enc", "F"), "b_dec": ("b_dec", "D")})

_LAYER = re.compile(r"[-_]l(\d+)\b")
_MODELS = {"DeepSeek-R1-Distill-Llama-8B": "deepseek-ai", "DeepSeek-R1": "deepseek-ai",
           "Llama-3.1-8B-Instruct": "meta-llama", "Llama-3.3-70B-Instruct": "meta-llama"}
"""The owners of the language models on the hub."""

_K = {"math": 128, "logic": 64}
"""k of the SAEs for DeepSeek R1, by a word in the file's path."""


def detect(place: Place) -> bool:
    """Whether it is a torch file with one of these sets of tensors, and no other."""
    file = place.only(".pt", ".pth")
    return file is not None and any(set(layout) == set(place.header(file).shapes) for layout in _LAYOUTS)


def look(place: Place, site: Site | None = None) -> Reading:
    """How it is read.

    Raises:
        UserError: tensors that do not fit together, an unknown k, another site than `site`.
    """
    file = str(place.only(".pt", ".pth"))
    layout = _layout(place, file)
    found, k = sizes(place, file, layout, NAME), None
    notes: tuple[str, ...] = ()
    if "W" in layout:
        k = next((k for word, k in _K.items() if word in place.words), None)
        if k is None:
            raise UserError(f"{place.where(file)} does not say how many latents are active; for DeepSeek R1, a word in "
                            f"the file's path decides it: {' or '.join(_K)}")
        notes = ("its owner keeps the largest pre-activations of a whole batch, k a row on average; the file holds no "
                 "threshold, so here each row has its own k largest, and codes differ",)
    layer = _LAYER.search(place.words)
    model = next((f"{owner}/{name}" for name, owner in _MODELS.items() if f"{name}-SAE" in place.words), None)
    sites = site_from(place.where(), Site(int(layer[1])) if layer and model else None, site)
    return Reading(
        NAME, "relu" if k is None else "topk", found["D"], found["D"], found["F"], (file,), sites, sites, model, k=k,
        centred=False, dtype=place.header(file).dtype, notes=notes, stated=stated(place))


def read(place: Place, site: Site | None = None) -> Opened:
    """Read it.

    Raises:
        UserError: as `look`; NaN; an unknown site.
    """
    reading = look(place, site)
    return opened(place, reading, load(place, reading.files[0], _layout(place, reading.files[0])))


def _layout(place: Place, file: str) -> Layout:
    return next(layout for layout in _LAYOUTS if holds(place, file, *layout))
