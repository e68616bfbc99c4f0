"""Sites by what other tools call them: TransformerLens' hooks, modules of transformers' models.

Some places of theirs are no site here but a function of one: what the norm before an MLP gives, before its weight
(`ln2.hook_normalized`), is the residual stream in each row's own scale.
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
"""Modules of a decoder layer, meant by what they give where nothing else is said, and the parts of it that they are."""

POST_NORM = re.compile(r"(?i)(olmo-?[23]|gemma-?[23])")
"""Models with a norm after the MLP and after attention: what the modules give is not what is added to the stream."""

NORMALIZED = ("layers.L.mid in each row's own scale, to length √D, is what the norm before the MLP gives before its "
              "weight (ln2.hook_normalized), but for the norm's epsilon")
"""What to say where `of_hook` gives a normalisation."""


def of_hook(hook: str) -> tuple[Site, Normalize] | None:
    """The site that TransformerLens calls `hook`, and how its rows are normalised to be what is there; None: no site.

    RMS norms only: a layer norm takes the mean off too.
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
