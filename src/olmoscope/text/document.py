"""What the text stage makes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `id` is unique within its source and the same on every run; it decides the split (split.py)."""

    text: str
    source: str
    id: str
