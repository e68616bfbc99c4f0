"""What a coder's files say about it; this stays with the coder, whatever device it moves to."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Source:
    """Where a coder was loaded from.

    Attributes:
        name: a run's SAE id, the name of a folder or file, or a hub id.
        model_name: the language model, as its files name it; None if they do not say.
        model_revision: that model's revision, if known.
        bos: whether it was trained on sequences that begin with BOS; `auto` if its files do not say.
        context_size: the length of those sequences in tokens, if known.
        identity: the run's hash, or `sha256:` and a hash of its files.
        metadata: whatever else its files say, unchanged.
    """

    name: str
    model_name: str | None
    model_revision: str | None
    bos: Literal["auto", "yes", "no"]
    context_size: int | None
    identity: str
    metadata: dict[str, Any] = field(repr=False)
