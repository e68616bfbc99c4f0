"""OpenAI's sparse_autoencoder: a state dict in a torch file, whose path states the layer and the place in it.

    resid_post_mlp_v5_32k/autoencoders/8.pt    pre_bias [D], latent_bias [F], encoder.weight [F, D],
                                               decoder.weight [D, F] (tied: decoder.linear.weight [F, D]), activation
                                               (ReLU, TopK), activation_state_dict {k, postact_fn}

pre_bias is subtracted. A TopK SAE normalises each row (subtracts its mean, divides by the standard deviation + 1e-5),
and undoes it after decoding. Source: Gao et al. 2024, arXiv:2406.04093; openai/sparse_autoencoder, `model.py`,
`paths.py`.
"""

import re
from collections.abc import Mapping
from typing import Any

from olmoscope.errors import UserError
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.layout import Layout, holds, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, checked_k, site_from, stated
from olmoscope.site import Site

NAME = "an SAE of OpenAI's sparse_autoencoder"
MARK = "pre_bias, latent_bias"
SEARCH: str | None = None

_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_PATH = re.compile(r"(resid_post_mlp|resid_post_attn|resid_delta_attn|resid_delta_mlp|mlp_post_act)\w*?"
                   r"(?:/autoencoders)?/(\d+)\.pt$")
_PARTS = {"resid_post_mlp": "", "resid_post_attn": "mid", "resid_delta_attn": "attn.out", "resid_delta_mlp": "mlp.out"}


def detect(place: Place) -> bool:
    """Whether it is a torch file with both biases at the top level."""
    return holds(place, place.only(".pt", ".pth"), "pre_bias", "latent_bias", "encoder.weight")


def look(place: Place, site: Site | None = None) -> Reading:
    """How it is read.

    Raises:
        UserError: tensors that do not fit together, an unsupported activation, another site than `site`.
    """
    file = str(place.only(".pt", ".pth"))
    values = place.header(file).values
    found = sizes(place, file, _layout(place, file), NAME, ignored=_STATISTICS)
    activation = str(values.get("activation")).rpartition(".")[2].removesuffix("()")
    if activation not in ("ReLU", "TopK"):
        raise UserError(f"{place.where(file)}: activation {values.get('activation')!r} is not supported; supported are "
                        "ReLU and TopK")
    k = _k(place, file, values, found["F"]) if activation == "TopK" else None
    path = _PATH.search(place.words)
    part = _PARTS.get(path[1]) if path else None
    notes = ["it reads mlp_post_act, the output of the MLP's activation function, which is not a site here"] if (
        path and part is None) else []
    sites = site_from(place.where(), None if path is None or part is None else Site(int(path[2]), part), site)
    return Reading(
        NAME, "relu" if k is None else "topk", found["D"], found["D"], found["F"], (file,), sites, sites,
        "openai-community/gpt2" if path else None, k=k, normalize="none" if k is None else "layer_norm",
        context_size=64 if path else None, dtype=place.header(file).dtype, notes=tuple(notes), stated=stated(place))


def read(place: Place, site: Site | None = None) -> Opened:
    """Read it.

    Raises:
        UserError: as `look`; NaN; an unknown site.
    """
    reading = look(place, site)
    return opened(place, reading, load(place, reading.files[0], _layout(place, reading.files[0])))


def _layout(place: Place, file: str) -> Layout:
    """The tensors of a file; a tied decoder is the encoder's matrix under another name."""
    tied = "decoder.linear.weight" in place.header(file).shapes
    decoder = {"decoder.linear.weight": ("W_dec", "FD")} if tied else {"decoder.weight": ("W_dec", "DF")}
    return {"encoder.weight": ("W_enc", "FD"), "latent_bias": ("b_enc", "F"), "pre_bias": ("b_dec", "D"), **decoder}


def _k(place: Place, file: str, values: Mapping[str, Any], latents: int) -> int:
    state = values.get("activation_state_dict")
    state = state if isinstance(state, Mapping) else {}
    after = str(state.get("postact_fn", "ReLU")).rpartition(".")[2].removesuffix("()")
    if after.lower() != "relu":
        raise UserError(f"{place.where(file)}: postact_fn {after!r} is not supported; only ReLU is")
    return checked_k(state.get("k"), latents, f"{place.where(file)}: activation_state_dict.k")
