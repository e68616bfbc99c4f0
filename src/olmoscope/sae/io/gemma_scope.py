"""Gemma Scope, for Gemma 2: JumpReLU SAEs and transcoders, one npz file each. Folder names state everything else.

    google/gemma-scope-2b-pt-res:layer_20/width_16k/average_l0_71/params.npz

b_dec is not subtracted, and nothing is normalised. An `embedding` SAE reads token embeddings before Gemma multiplies
them by √D; our `embed` is after that. SAELens' loader for them (sae-lens 6.54.12, `gemma_2_sae_huggingface_loader`)
scales W_dec but not b_dec, and then reconstructs other rows. Source: Lieberum et al. 2024, arXiv:2408.05147.
"""

import math
import re

from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.layout import Layout, holds, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, site_from, stated
from olmoscope.sae.io.site_names import NORMALIZED
from olmoscope.sae.normalize import Normalize
from olmoscope.site import EMBED, Site

NAME = "a Gemma Scope SAE"
MARK = "params.npz"
SEARCH: str | None = "**/params.npz"

_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)")
_PLACE = re.compile(r"(?:layer_(\d+)|(embedding))/")
_L0 = re.compile(r"average_l0_(\d+)")
_PARTS = {"res": "", "mlp": "mlp.out", "att": "attn.z", "transcoders": "mlp.out"}


def detect(place: Place) -> bool:
    """Whether there is an npz file with an encoder and thresholds."""
    file = place.only(".npz")
    return holds(place, file, "W_enc", "threshold") or holds(place, file, "w_enc", "threshold")


def look(place: Place, site: Site | None = None) -> Reading:
    """How it is read.

    Raises:
        UserError: tensors that do not fit together, another site than `site`.
    """
    file = str(place.only(".npz"))
    repository, there, l0 = _REPOSITORY.search(place.words), _PLACE.search(place.words), _L0.search(place.words)
    kind = repository[3] if repository else ""
    transcoder, embedding = kind == "transcoders", bool(there and there[2])
    found = sizes(place, file, _layout(place, file, transcoder), "a Gemma Scope SAE")
    said = None if repository is None or there is None else EMBED if embedding else Site(int(there[1]), _PARTS[kind])
    writes = site_from(place.where(), said, site, "writes" if transcoder else "reads")
    normalize: Normalize = "constant_norm_rescale" if transcoder else "none"
    scale = 1 / math.sqrt(found["D"]) if embedding else 1.0
    notes = [NORMALIZED] if transcoder else []
    if embedding:
        notes.append("it was trained on token embeddings before Gemma multiplies them by √D, and embed is after that: "
                     "rows are divided by √D first, and the reconstruction is multiplied by it (SAELens leaves out "
                     "b_dec)")
    suffix = "-it" if repository and repository[2] == "it" else ""
    return Reading(
        NAME, "jumprelu", found["D"], found.get("O", found["D"]), found["F"], (file,),
        (Site(writes[0].layer, "mid"),) if transcoder and writes else writes, writes,
        f"google/gemma-2-{repository[1]}{suffix}" if repository else None, transcoder=transcoder, centred=False,
        normalize=normalize, scale=scale, scale_out=scale, bos="yes", context_size=1024,
        dtype=place.header(file).dtype, notes=tuple(notes),
        stated=stated(place, **({"L0": float(l0[1])} if l0 else {})))


def read(place: Place, site: Site | None = None) -> Opened:
    """Read it.

    Raises:
        UserError: as `look`; NaN; an unknown site.
    """
    reading = look(place, site)
    return opened(place, reading, load(place, reading.files[0], _layout(place, reading.files[0], reading.transcoder)))


def _layout(place: Place, file: str, transcoder: bool) -> Layout:
    """The tensors of a file; some name their matrices in lower case."""
    W = "w" if "w_enc" in place.header(file).shapes else "W"
    out = "O" if transcoder else "D"
    return {f"{W}_enc": ("W_enc", "DF"), "b_enc": ("b_enc", "F"), f"{W}_dec": ("W_dec", f"F{out}"),
            "b_dec": ("b_dec", out), "threshold": ("threshold", "F")}
