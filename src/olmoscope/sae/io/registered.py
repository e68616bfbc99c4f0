"""One dictionary in SAELens' registry."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Registered:
    """An entry of the registry.

    Attributes:
        release, id: its names in SAELens.
        repo, path: its place on the hub.
        model: the language model, by SAELens' name.
        loader: the SAELens function that reads it (`conversion_func`); None for SAELens' own format.
        scale: the factor on rows before encoding (`norm_scaling_factor`), for formats that do not keep it.
        l0, explained_variance: as its owner published them.
        overrides: settings that replace those in its files.
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
