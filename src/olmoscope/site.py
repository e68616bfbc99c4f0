"""Sites: the places in a decoder where vectors are read and written, named the same everywhere.

    layers.7             the residual stream after layer 7
    layers.7.mid         the residual stream between attention and MLP
    layers.7.attn.out    what attention adds to the residual stream; after the post-norm of an architecture that has one
    layers.7.mlp.out     what the MLP adds, likewise
    layers.7.attn.in     what the attention module is given
    layers.7.mlp.in      what the MLP module is given
    layers.7.attn.z      what the attention's output projection is given: all heads, concatenated
    embed                what layer 0 is given: the embedding, scaled and with positions where the model adds them
    base:layers.7        the same place in another model, which a recipe calls `base` (`models`)

model/sites.py finds them in a model; docs/sites.md lists the sites of each architecture, and what is refused.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from olmoscope.errors import UserError

PARTS = ("attn.in", "attn.z", "attn.out", "mid", "mlp.in", "mlp.out", "")
"""The places of a layer in the order in which a forward pass reaches them; the last is the layer's output."""

_TRANSFORMER_LENS = {"": "hook_resid_post", "mid": "hook_resid_mid", "attn.out": "hook_attn_out",
                     "mlp.out": "hook_mlp_out", "attn.in": "attn.hook_in", "mlp.in": "mlp.hook_in",
                     "attn.z": "attn.hook_z"}
"""Source: TransformerLens 3.9. Like us, it reads what is added to the stream after post-norms (OLMo 2 and 3, Gemma 2
and 3) and after Granite's multiplier: its bridge gives the same values on all of them (tests/model/test_sites.py).
There are two differences: its `attn.hook_z` separates the heads, `[B, T, heads, width of a head]`, and only its
`TransformerBridge` has `attn.hook_in` and `mlp.hook_in`, not its older `HookedTransformer`. `hook_mlp_in` differs from
`mlp.hook_in`: it is the stream before the MLP's norm, and has no name here."""

MODEL_NAME = r"[A-Za-z][A-Za-z0-9_-]*"
_OF_MODEL = re.compile(rf"({MODEL_NAME}):([^:]+)")
_PARSED = re.compile(r"layers\.(\d+)(?:\.(" + "|".join(re.escape(part) for part in PARTS if part) + r"))?")
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")


@functools.total_ordering
@dataclass(frozen=True, repr=False)
class Site:
    """A place in a decoder. Sites sort in the order in which a forward pass reaches them, model by model.

    Attributes:
        layer: the decoder layer, from 0; -1 for `embed`.
        part: the place in the layer, one of `PARTS`; empty for the layer's output.
        model: a recipe's name for the model, if it reads several; empty for its own model.

    Example:
        >>> from olmoscope import Site
        >>> Site.parse("layers.7.mlp.out")
        Site(layer=7, part='mlp.out')
        >>> str(Site(7)), Site(7).transformer_lens
        ('layers.7', 'blocks.7.hook_resid_post')
        >>> Site(7, "mlp.in") < Site(7, "mlp.out") < Site(7)
        True
    """

    layer: int
    part: str = ""
    model: str = ""

    @classmethod
    def parse(cls, text: Any) -> "Site":
        """A site from its text; a number means the residual stream after that layer.

        Raises:
            UserError: the text does not name a site.
        """
        if isinstance(text, Site):
            return text
        if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
            return cls(text)
        if text == "embed":
            return EMBED
        of_model = _OF_MODEL.fullmatch(text) if isinstance(text, str) else None
        if of_model is not None:
            return cls.parse(of_model[2]).of(of_model[1])
        found = _PARSED.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise UserError(f"{text!r} is not a site; a site is embed, layers.L, or layers.L followed by one of "
                            f"{', '.join('.' + part for part in PARTS if part)}")
        return cls(int(found[1]), found[2] or "")

    def of(self, model: str) -> "Site":
        """The same place in the model of this name; an empty name means the recipe's own model."""
        return Site(self.layer, self.part, model)

    @property
    def layer_or_none(self) -> int | None:
        """The layer; None for `embed`."""
        return None if self.is_embedding else self.layer

    @property
    def is_embedding(self) -> bool:
        """Whether it is what layer 0 is given."""
        return self.layer < 0

    @property
    def is_layer_output(self) -> bool:
        """Whether it is the residual stream after a layer of the recipe's own model."""
        return not self.part and self.layer >= 0 and not self.model

    @property
    def in_stream(self) -> bool:
        """Whether vectors there are in the residual stream or added to it, so that the head can be applied to them."""
        return self.part not in ("attn.in", "attn.z", "mlp.in")

    @property
    def folder(self) -> str:
        """A name for files and folders, such as `layer_07`, `layer_07_mlp_out` or `embed`."""
        if self.model:
            return f"{self.model}_{self.of('').folder}"
        if self == EMBED:
            return "embed"
        return f"layer_{self.layer:02d}" + (f"_{self.part.replace('.', '_')}" if self.part else "")

    @property
    def transformer_lens(self) -> str:
        """What TransformerLens and SAELens call it, e.g. `blocks.7.hook_resid_post`."""
        if self == EMBED:
            return "blocks.0.hook_resid_pre"
        return f"blocks.{self.layer}.{_TRANSFORMER_LENS[self.part]}"

    @classmethod
    def of_transformer_lens(cls, hook: str) -> "Site | None":
        """The site that TransformerLens and SAELens call `hook`; None for a place that is not one of our sites.

        `hook_resid_pre` of a layer is the output of the layer before it.
        """
        found = _HOOK.fullmatch(hook)
        if found is None:
            return None
        layer, name = int(found[1]), found[2]
        if name in ("hook_resid_pre", "hook_in"):
            return cls(layer - 1)  # embed for layer 0
        if name == "hook_out":
            return cls(layer)
        return next((cls(layer, part) for part, known in _TRANSFORMER_LENS.items() if known == name), None)

    def __lt__(self, other: "Site") -> bool:
        return (self.model, self.layer, PARTS.index(self.part)) < (other.model, other.layer, PARTS.index(other.part))

    def __repr__(self) -> str:
        model = f", model={self.model!r}" if self.model else ""
        return f"Site(layer={self.layer}, part={self.part!r}{model})"

    def __str__(self) -> str:
        if self.model:
            return f"{self.model}:{self.of('')}"
        if self == EMBED:
            return "embed"
        return f"layers.{self.layer}" + (f".{self.part}" if self.part else "")


EMBED = Site(-1)


@dataclass(frozen=True)
class SiteModule:
    """The module of a language model that a site is at.

    Attributes:
        path: in the causal LM, e.g. `model.layers.7.mlp`.
        end: whether the site is the module's output or its input.
        scale: the site is this times the output, since some architectures scale what they add to the residual stream.
    """

    path: str
    end: Literal["output", "input"]
    scale: float = 1.0


def module_by_layer(layers_path: str, site: Site) -> SiteModule | None:
    """The module of a site that can be found without running a model: a layer's output, or the input of layer 0. None
    for other sites.

    Args:
        layers_path: where the causal LM keeps its layers, e.g. `model.layers`.
    """
    if site == EMBED:
        return SiteModule(f"{layers_path}.0", "input")
    return SiteModule(f"{layers_path}.{site.layer}", "output") if site.is_layer_output else None


def layer_as_site(value: Any) -> Any:
    """A file's mapping with `site` in place of `layer`, which older files have instead."""
    if not isinstance(value, dict) or "layer" not in value:
        return value
    tree = {key: part for key, part in value.items() if key != "layer"}
    return {"site": value["layer"]} | tree


def deepest(sites: Iterable[Site]) -> int:
    """The deepest layer that must run to reach all sites."""
    return max([0, *(site.layer for site in sites)])


def wildcard(pattern: str, layers: int) -> list[Site]:
    """The sites that a pattern such as `layers.*.mlp.out` names in a model.

    Args:
        layers: how many decoder layers the model has.

    Raises:
        UserError: the pattern does not name a site.
    """
    if "*" not in pattern:
        return [Site.parse(pattern)]
    return [Site.parse(pattern.replace("*", str(layer), 1)) for layer in range(layers)]
