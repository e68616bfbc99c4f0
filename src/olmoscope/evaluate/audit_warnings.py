"""What an audit makes of its figures: warnings in plain words, each with what to do."""

from collections.abc import Mapping
from dataclasses import dataclass

from olmoscope.evaluate.audit_variants import Cause

MUCH_BETTER = 0.8
APART = 0.1
BAD = 0.3
DENSE = 0.25
L0_FACTOR = 2.0
EV_OFF = 0.15


@dataclass(frozen=True)
class Warning:
    """Something that is likely to be wrong.

    Attributes:
        kind: what sort of thing, for programs.
        what: a sentence.
        do: what to do, a clause.
    """

    kind: str
    what: str
    do: str


@dataclass(frozen=True)
class Found:
    """The figures that warnings follow from; see `audit.Audit`."""

    reads: tuple[str, ...]
    fit: float | None
    tried: tuple[tuple[Cause, str, str, float | None], ...]
    l0: float
    dead: float
    rows: int
    d_sae: int
    d_in: int
    twins: float | None
    explained: float | None
    stated: Mapping[str, float]


def warnings_of(found: Found) -> tuple[Warning, ...]:
    """All warnings; none if the SAE does what its files say."""
    return ()
