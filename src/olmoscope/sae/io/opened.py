"""An opened SAE and what its files say about it, in the same form for every format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from olmoscope.recipe.schema import Bos
from olmoscope.sae.coder import SparseCoder
from olmoscope.site import Site

Kind = Literal["run", "folder", "file", "hub"]
"""An Olmoscope run, a folder of one SAE, a file of one SAE, or such a folder or file on the hub."""


@dataclass(frozen=True)
class Opened:
    """An SAE and where it belongs.

    Attributes:
        sae: float32, on the CPU; it knows the sites that it reads and writes.
        name: its name in tables: a run's SAE id, the name of a folder or file, or a hub id.
        model_name: the language model, as its files name it; None if they do not say.
        model_revision: the revision of that model, if known.
        architecture: SAELens' name for it: `topk`, `jumprelu`, `standard`, `gated`, ...
        folder: where its files are (for the hub: in the cache); for a `file`, the file itself.
        kind: what kind of place it came from.
        identity: the run's hash, or `sha256:` and a hash of its files.
        bos: whether it was trained on sequences that begin with BOS; `auto` if its files do not say (then the tokenizer
            decides).
        context_size: the length of those sequences, if known.
        dtype: the dtype of the weights; values that a file holds in more bits are rounded to it before they become
            float32.
        metadata: everything else in its settings, unchanged.
        model_architecture: the language model's architecture, e.g. `Olmo3ForCausalLM`, if its files say.
        model_layers: the number of layers of the whole model, if its files say.
        step: the step of an intermediate checkpoint of a run; None for the end of training.
        unread: which tokens training left out, in words; None if it left out none, or if the files do not say.
        files: the SHA-256 of each file that was read, by its path in the folder; empty for an Olmoscope run, which is
            identified by its hash.
    """

    sae: SparseCoder
    name: str
    model_name: str | None
    model_revision: str | None
    architecture: str
    folder: Path
    kind: Kind
    identity: str
    bos: Bos
    context_size: int | None
    dtype: torch.dtype
    metadata: dict[str, Any]
    model_architecture: str | None = None
    model_layers: int | None = None
    step: int | None = None
    unread: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def reads(self) -> tuple[Site, ...]:
        """The sites that it reads."""
        return self.sae.reads

    @property
    def writes(self) -> tuple[Site, ...]:
        """The sites that it writes: those that it reads, unless it is a transcoder."""
        return self.sae.writes

    @property
    def site(self) -> Site:
        """The site that it writes; for a crosscoder, the last one in its own model, from which that model continues."""
        return [site for site in self.sae.writes if not site.model][-1]

    @property
    def d_model(self) -> int | None:
        """Width of the model's residual stream; None if it does not follow from the sites (attention heads side by side
        may have another width)."""
        for sites, width in ((self.writes, self.sae.d_out), (self.reads, self.sae.d_in)):
            if all(site.part != "attn.z" for site in sites):
                return width // len(sites)
        return None

    def unread_note(self) -> str | None:
        """A note for users who measure it on all tokens."""
        return self.unread and f"note: {self.name} was trained without {self.unread}; here they are read too"
