"""Sites by their names in other tools: TransformerLens' hooks, and modules of transformers' models.

The output of the norm before an MLP without its weight (`ln2.hook_normalized`) is not a site here, but the residual
stream with each row scaled to norm √D.
"""

import re

from olmoscope.sae.normalize import Normalize
from olmoscope.site import EMBED, Site

_MODULE = re.compile(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)(?:\.(.+))?")
_NORMALIZED = re.compile(r"(?:blocks\.)?(\d+)\.ln2\.hook_normalized")

_PARTS = {"": "", "output": "", "mlp": "mlp.out", "mlp.output": "mlp.out", "mlp.input": "mlp.in",
          "feed_forward": "mlp.out", "self_attn": "attn.out", "attn": "attn.out", "attention": "attn.out",
          "self_attn.o_proj.input": "attn.z", "pre_feedforward_layernorm.output": "mlp.in",
          "post_feedforward_layernorm.output": "mlp.out"}
"""Modules of a decoder layer and their sites; a name alone means the module's output."""

POST_NORM = re.compile(r"(?i)(olmo-?[23]|gemma-?[23])")
"""Models with a norm after the MLP and after attention, so that a module's output is not what the stream receives."""

NORMALIZED = ("it was trained on ln2.hook_normalized, the output of the norm before the MLP without the norm's weight; "
              "that is layers.L.mid with each row scaled to norm √D, except for the norm's epsilon")
"""The note for an SAE whose hook `of_hook` expresses with a normalisation."""


def of_hook(hook: str) -> tuple[Site, Normalize] | None:
    """The site of a TransformerLens hook, and the normalisation that turns its rows into those at the hook; None if
    there is no such site.

    This holds for RMS norms only: a layer norm also subtracts the mean.
    """
    if found := _NORMALIZED.fullmatch(hook):
        return Site(int(found[1]), "mid"), "constant_norm_rescale"
    if hook == "hook_embed":
        return EMBED, "none"
    site = Site.of_transformer_lens(hook)
    return None if site is None else (site, "none")


def of_module(name: str) -> Site | None:
    """The site of a module of a transformers model: `model.layers.3`, `h.3.mlp`, `layers.3.self_attn.o_proj.input`."""
    if name.rpartition(".")[2] in ("embed_tokens", "wte", "embed_in"):
        return EMBED
    found = _MODULE.fullmatch(name)
    part = _PARTS.get(found[2] or "") if found else None
    return None if found is None or part is None else Site(int(found[1]), part)
