"""What an opened SAE says of itself, whatever format it came in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from olmoscope.recipe.schema import Bos
from olmoscope.sae.coder import SparseCoder
from olmoscope.site import Site

Kind = Literal["run", "folder", "file", "hub"]
"""A run of ours, a folder of one SAE, a file of one SAE, or such a folder of the hub."""


@dataclass(frozen=True)
class Opened:
    """An SAE and where it belongs.

    Attributes:
        sae: float32, on the CPU; it knows the sites that it reads and writes.
        name: what tables call it: a run's SAE id, the name of a folder or file, a hub id.
        model_name: the language model, as its files name it; None if they do not say.
        model_revision: of that model, where known.
        architecture: as SAELens calls it: `topk`, `jumprelu`, `standard`, `gated`, ...
        folder: where its files are (for the hub: in the cache); of a `file` the file itself.
        kind: what sort of place it came from.
        identity: the run's hash, or `sha256:` and a hash of its files.
        bos: whether it was trained on sequences that begin with BOS; `auto` where its files do not say (then as the
            tokenizer does by itself).
        context_size: the length of those sequences, where known.
        dtype: in which the weights are kept; what a file holds in more bits is rounded to it before it becomes float32.
        metadata: whatever else its files say, as they say it.
        model_architecture: of the language model, e.g. `Olmo3ForCausalLM`, where its files say it.
        model_layers: of the whole model, likewise.
        step: of the checkpoint, where it is one of a run; None: as its training ended.
        unread: which tokens it was trained without, in words; None where all were read, or its files do not say.
        files: the SHA-256 of each file that was read, by its path in the folder; empty for a run of ours, which
            its hash identifies.
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
        """The sites that it writes: those that it reads, but of a transcoder."""
        return self.sae.writes

    @property
    def site(self) -> Site:
        """The site that it writes; of a crosscoder the last in the model that it is about, from which that model goes
        on."""
        return [site for site in self.sae.writes if not site.model][-1]

    @property
    def d_model(self) -> int | None:
        """Width of the model's residual stream; None where the sites do not tell it."""
        for sites, width in ((self.writes, self.sae.d_out), (self.reads, self.sae.d_in)):
            if all(site.in_stream for site in sites):
                return width // len(sites)
        return None

    def unread_note(self) -> str | None:
        """What to tell who measures it on all tokens."""
        return self.unread and f"note: {self.name} was trained without {self.unread}; here they are read too"
