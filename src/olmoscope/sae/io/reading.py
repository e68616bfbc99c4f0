"""How an SAE will be read: told by its settings and the shapes of its tensors, before they are loaded.

    u = n(s x) [− b_dec]        z = rule(u W_enc + b_enc)        out = n⁻¹(z W_dec + b_dec) / s_out [+ W_skip x]

s and s_out are numbers for all rows, n is the normalisation of each row. Every reader of a format says which of this
holds (`Reading`); assemble.py makes the coder of it, the same for all formats.

Shapes: D width read, O width written, F latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from olmoscope.errors import UserError
from olmoscope.recipe.schema import Bos
from olmoscope.sae.io.place import Place
from olmoscope.sae.normalize import Normalize
from olmoscope.site import Site

Rule = Literal["topk", "abstopk", "relu", "jumprelu", "gated", "groupmax"]

ARCHITECTURES: dict[Rule, str] = {"relu": "standard", "abstopk": "topk"}
"""What SAELens calls those that have another name there."""


@dataclass(frozen=True)
class Reading:
    """What an SAE is, and with what convention it is read.

    Attributes:
        format: what the format is called, with its article.
        rule: which latents are active.
        d_in, d_out, d_sae: D, O, F.
        files: all that are read, the one with most of the weights first.
        reads, writes: its sites; empty where nothing says them.
        model_name, model_revision: the language model, as far as it is said.
        k: of topk and groupmax.
        transcoder: it writes another site than it reads.
        centred: whether the encoder sees x − b_dec.
        normalize: n.
        scale, scale_out: s and s_out.
        by_decoder_norm: the rule sees pre-activations times the length of the latent's decoder row.
        skip: whether there is a W_skip.
        bos, context_size: of the sequences that it was trained on.
        dtype: of the weights.
        notes: what is unusual, and where other tools read it otherwise; each a sentence.
        stated: figures that its owner gives, by name.
        metadata: whatever else its files say.
        unread: which tokens it was trained without.
    """

    format: str
    rule: Rule
    d_in: int
    d_out: int
    d_sae: int
    files: tuple[str, ...]
    reads: tuple[Site, ...] = ()
    writes: tuple[Site, ...] = ()
    model_name: str | None = None
    model_revision: str | None = None
    k: int | None = None
    transcoder: bool = False
    centred: bool = True
    normalize: Normalize = "none"
    scale: float = 1.0
    scale_out: float = 1.0
    by_decoder_norm: bool = False
    skip: bool = False
    bos: Bos = "auto"
    context_size: int | None = None
    dtype: torch.dtype = torch.float32
    notes: tuple[str, ...] = ()
    stated: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    unread: str | None = None

    @property
    def architecture(self) -> str:
        """As SAELens calls it."""
        name = ARCHITECTURES.get(self.rule, self.rule)
        return name if not self.transcoder else {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}.get(
            name, name)

    def formula(self) -> list[str]:
        """The convention, a line for each step."""
        rows = "x" if self.scale == 1 else f"{self.scale:.6g} x"
        rows = {"none": rows, "layer_norm": f"({rows} − mean) / (std + 1e-5)", "centred": f"{rows} − mean",
                "constant_norm_rescale": f"{rows} scaled to length √D"}[self.normalize]
        product = f"({rows}{' − b_dec' if self.centred else ''}) W_enc + b_enc"
        rule = {"topk": f"the {self.k} largest of p, where positive", "relu": "p where positive",
                "abstopk": f"the {self.k} of p of largest |p|; latent F + j is latent j with the other sign",
                "jumprelu": "p where over the threshold", "gated": "ReLU(p exp(r_mag) + b_mag) where p + b_gate > 0",
                "groupmax": f"the largest p of each of {self.k} groups of neighbours, where positive"}[self.rule]
        if self.by_decoder_norm:
            rule += ", p taken times the length of the latent's decoder row"
        out = "z W_dec + b_dec"
        if self.scale_out != 1:
            out = f"({out}) / {self.scale_out:.6g}"
        if self.normalize != "none" and not self.transcoder:
            out = f"{out}, in the row's own scale again"
        return [f"p = {product}", f"z = {rule}", f"out = {out}{' + W_skip x' if self.skip else ''}"]


def settled(where: str, said: Site | None, given: Site | None, does: str = "reads") -> tuple[Site, ...]:
    """The site of an SAE: what its files say, else what the user gives; `--site` never overrules an SAE.

    Raises:
        UserError: they differ.
    """
    if said is not None and given not in (None, said):
        raise UserError(f"--site {given}: {where} says that this SAE {does} {said}; leave --site out")
    found = said or given
    return () if found is None else (found,)


def stated(place: Place, **more: float) -> dict[str, float]:
    """What an SAE's owner states of it: in SAELens' registry, and elsewhere (`more`)."""
    entry = place.registered
    found = {} if entry is None else {"L0": entry.l0, "explained variance": entry.explained_variance}
    return {name: value for name, value in found.items() if value is not None} | more
