"""What SAELens' registry says of one of its dictionaries."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Registered:
    """An entry of the registry.

    Attributes:
        release, id: what SAELens calls it.
        repo, path: where it is on the hub.
        model: the language model, as SAELens calls it.
        loader: the name of the function by which SAELens reads it; None: its own format.
        scale: by what rows are multiplied before encoding (`norm_scaling_factor`), where their format does not say it.
        l0, explained_variance: as its owner states them.
        overrides: settings that stand in place of those of its files.
    """

    release: str
    id: str
    repo: str
    path: str
    model: str
    loader: str | None
    scale: float | None = None
    l0: float | None = None
    explained_variance: float | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
