"""Qwen-Scope: TopK SAEs on the residual stream, a torch file for each layer. The repository's name states model and k.

    Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50:layer12.sae.pt    W_enc [F, D], W_dec [D, F], b_enc [F], b_dec [D]

b_dec is not subtracted. Source: arXiv:2605.11887; sae-lens 6.54.12, `qwen_scope_sae_huggingface_loader`. Neither states
whether a ReLU follows the top k; SAELens applies one, and so does this reader.
"""

import re

from olmoscope.errors import UserError
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.layout import Layout, holds, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, site_from, stated
from olmoscope.site import Site

NAME = "a Qwen-Scope SAE"
MARK = "layerL.sae.pt"
SEARCH: str | None = "=layer*.sae.pt"

_REPOSITORY, _LAYER = re.compile(r"SAE-Res-(.+)-W(\d+)K-L0_(\d+)"), re.compile(r"layer(\d+)\.sae\.pt")
_LAYOUT: Layout = {"W_enc": ("W_enc", "FD"), "b_enc": ("b_enc", "F"), "W_dec": ("W_dec", "DF"), "b_dec": ("b_dec", "D")}


def detect(place: Place) -> bool:
    """Whether it is a torch file with exactly these tensors, and one latent a row in the encoder."""
    file = place.only(".pt")
    if file is None or not holds(place, file, *_LAYOUT):
        return False
    shapes = place.header(file).shapes
    return shapes["W_enc"][:1] == shapes["b_enc"] and set(shapes) == set(_LAYOUT)


def look(place: Place, site: Site | None = None) -> Reading:
    """How it is read.

    Raises:
        UserError: tensors that do not fit together, an unknown k, another site than `site`.
    """
    file, repository = str(place.only(".pt")), _REPOSITORY.search(place.words)
    found = sizes(place, file, _LAYOUT, NAME)
    if repository is None:
        raise UserError(f"{place.where(file)} does not say how many latents are active: only its repository's name "
                        "does; keep it in a folder with that name (SAE-Res-MODEL-W64K-L0_50)")
    if found["F"] != int(repository[2]) * 1024:
        raise UserError(f"{place.where(file)} has {found['F']} latents, and its repository's name says "
                        f"{int(repository[2]) * 1024}")
    layer = _LAYER.search(file)
    sites = site_from(place.where(), Site(int(layer[1])) if layer else None, site)
    return Reading(
        NAME, "topk", found["D"], found["D"], found["F"], (file,), sites, sites, f"Qwen/{repository[1]}",
        k=int(repository[3]), centred=False, dtype=place.header(file).dtype,
        notes=("its owner does not state whether a ReLU follows the k largest; one is applied here, as in SAELens",),
        stated=stated(place))


def read(place: Place, site: Site | None = None) -> Opened:
    """Read it.

    Raises:
        UserError: as `look`; NaN; an unknown site.
    """
    reading = look(place, site)
    return opened(place, reading, load(place, reading.files[0], _LAYOUT))
