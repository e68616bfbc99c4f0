"""How an SAE will be read, according to its settings and the shapes of its tensors, before the tensors are loaded.

    u = n(s x) [− b_dec]        z = rule(u W_enc + b_enc)        out = n⁻¹(z W_dec + b_dec) / s_out [+ W_skip x]

s and s_out are constants, and n normalises each row. The reader of each format fills in a `Reading`, from which
assemble.py builds the coder in the same way for all formats.

Shapes: D width read, O width written, F latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from olmoscope.errors import UserError
from olmoscope.recipe.schema import Bos
from olmoscope.sae.io.place import Place
from olmoscope.sae.normalize import Normalize
from olmoscope.site import Site

Rule = Literal["topk", "abstopk", "relu", "jumprelu", "gated", "groupmax"]

ARCHITECTURES: dict[Rule, str] = {"relu": "standard", "abstopk": "topk"}
"""SAELens' names for rules that have another name there."""


@dataclass(frozen=True)
class Reading:
    """What an SAE is, and by which convention it is read.

    Attributes:
        format: the format's name, with its article.
        rule: which latents are active.
        d_in, d_out, d_sae: D, O, F.
        files: all files that are read, the largest file of weights first.
        reads, writes: its sites; empty if they are not stated.
        model_name, model_revision: the language model; None if not stated.
        k: active latents of topk and abstopk, groups of groupmax.
        transcoder: it writes another site than it reads.
        centred: whether the encoder subtracts b_dec.
        own_b_in: whether a transcoder's encoder subtracts a bias of its own, b_in, instead.
        normalize: n.
        scale, scale_out: s and s_out.
        by_decoder_norm: pre-activations are multiplied by the norm of the latent's decoder row before the rule.
        unit_rows: codes are multiplied by that norm too, and decoder rows are divided by it.
        skip: whether there is a W_skip.
        bos, context_size: whether the training sequences begin with BOS, and their length.
        dtype: dtype of the weights.
        notes: anything unusual, such as a tool that reads it in another way; one sentence each.
        stated: figures that its owner published, by name.
        metadata: the settings in its files.
        unread: tokens that were left out in training, in words.
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
    own_b_in: bool = False
    normalize: Normalize = "none"
    scale: float = 1.0
    scale_out: float = 1.0
    by_decoder_norm: bool = False
    unit_rows: bool = False
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
        """SAELens' name for it."""
        name = ARCHITECTURES.get(self.rule, self.rule)
        return name if not self.transcoder else {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}.get(
            name, name)

    def formula(self) -> list[str]:
        """The computation, a line for each step."""
        rows = "x" if self.scale == 1 else f"{self.scale:.6g} x"
        rows = {"none": rows, "layer_norm": f"({rows} − mean) / (std + 1e-5)", "centred": f"{rows} − mean",
                "constant_norm_rescale": f"{rows} scaled to norm √D"}[self.normalize]
        subtracted = " − b_in" if self.own_b_in else " − b_dec" if self.centred else ""
        rows = f"({rows}{subtracted})" if subtracted or rows != "x" else rows
        p = "p ‖W_dec‖" if self.by_decoder_norm else "p"
        value = p if self.unit_rows else "p"
        rule = {"topk": f"{value} where {p} is among the {self.k} largest and positive", "relu": "ReLU(p)",
                "abstopk": f"|{value}| where |{p}| is among the {self.k} largest: latent j if p > 0, else F + j",
                "jumprelu": f"{value} where {p} > threshold",
                "gated": "ReLU(p exp(r_mag) + b_mag) where p + b_gate > 0",
                "groupmax": f"p where it is the largest of its group ({self.k} groups) and positive"}[self.rule]
        out = "z W_dec / ‖W_dec‖ + b_dec" if self.unit_rows else "z W_dec + b_dec"
        if self.scale_out != 1:
            out = f"({out}) / {self.scale_out:.6g}"
        if self.normalize != "none" and not self.transcoder:
            out = f"{out}, with the normalisation undone"
        return [f"p = {rows} W_enc + b_enc", f"z = {rule}", f"out = {out}{' + W_skip x' if self.skip else ''}"]


def site_from(where: str, stated_site: Site | None, given: Site | None, does: str = "reads") -> tuple[Site, ...]:
    """The site that an SAE's files state, else the one that the user gives; `--site` never overrules the files.

    Raises:
        UserError: the two differ.
    """
    if stated_site is not None:
        refuse_other_site(where, given, stated_site, does)
    found = stated_site or given
    return () if found is None else (found,)


def refuse_other_site(where: str | Path, given: Site | None, stated_site: Site, does: str = "reads") -> None:
    """Refuse a `--site` that contradicts an SAE's files.

    Raises:
        UserError: the two differ.
    """
    if given not in (None, stated_site):
        raise UserError(f"--site {given}: {where} says that this SAE {does} {stated_site}; leave --site out")


def checked_k(k: object, latents: int, what: str) -> int:
    """The number of active latents.

    Args:
        what: the setting and its file, for the message.

    Raises:
        UserError: it is not a whole number from 1 to `latents`.
    """
    if not isinstance(k, int) or not 0 < k <= latents:
        raise UserError(f"{what} must be a number from 1 to {latents}, not {k!r}")
    return k


def stated(place: Place, **more: float) -> dict[str, float]:
    """The figures that an SAE's owner published, from SAELens' registry and from its name or files (`more`)."""
    entry = place.registered
    found = {} if entry is None else {"L0": entry.l0, "explained variance": entry.explained_variance}
    return {name: value for name, value in found.items() if value is not None} | more
