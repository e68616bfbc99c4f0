"""An index's data on a feature, as plain records, for pages and for JSON (`dataclasses.asdict`).

A *place* is a token's index in the corpus; a *row* is a token that was encoded (filters leave some out).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Token:
    """A token and its text, which may contain anything, including newlines and markup."""

    id: int
    text: str


@dataclass(frozen=True)
class Example:
    """A token on which a feature fires."""

    feature: int
    place: int
    value: float
    """The feature's activation there."""


@dataclass(frozen=True)
class Interval:
    """One of the equal parts of (0, max]: `low` < value <= `high`."""

    low: float
    high: float
    rows: int
    """Number of rows whose activation is in the interval."""
    examples: list[Example]
    """Drawn uniformly from these rows, in the order of the text."""


@dataclass(frozen=True)
class Histogram:
    """Rows by activation, in bins of equal width on a logarithmic scale, from the first to the last bin that is not
    empty."""

    edges: list[float]
    """One more edge than counts: bin i holds `edges[i]` <= value < `edges[i + 1]`."""
    counts: list[int]


@dataclass(frozen=True)
class TokenLogit:
    """What a feature's decoder direction adds to an output token's logit, up to a positive factor (docs/metrics.md)."""

    token: Token
    logit: float


@dataclass(frozen=True)
class Neighbour:
    """A feature with a similar decoder direction."""

    feature: int
    cosine: float


@dataclass(frozen=True)
class Companion:
    """A feature that fires on the same rows."""

    feature: int
    rows: int
    """Number of rows of the sample on which both fire."""
    lift: float
    """How many times more often both fire than if they were independent."""


@dataclass(frozen=True)
class PreferredToken:
    """A token on which a feature fires more often than on others."""

    token: Token
    rows: int
    """Number of rows of this token on which it fires."""
    lift: float
    """The token's share of the feature's rows, over its share of all rows."""
    mean: float
    """Mean activation on these rows."""


@dataclass(frozen=True)
class SourceShare:
    """How a feature fires on one text source."""

    source: str
    rows: int
    lift: float


@dataclass(frozen=True)
class PositionShare:
    """How a feature fires at positions `first` to `last` of the sequence."""

    first: int
    last: int
    rows: int
    lift: float


@dataclass(frozen=True)
class Feature:
    """Everything that the index has on a feature. Definitions: docs/metrics.md."""

    index: int
    rows: int
    """Number of rows on which it fires; if 0, it is dead on this text, and most lists are empty."""
    density: float
    max: float
    mean: float
    """Mean over the rows on which it fires; 0 if there are none."""
    histogram: Histogram
    top: list[Example]
    """Strongest first, at most one from each passage."""
    intervals: list[Interval]
    """Weakest first."""
    random: list[Example]
    """Drawn uniformly from all its rows, in the order of the text."""
    promoted: list[TokenLogit] | None
    """None: the index has none of any feature."""
    suppressed: list[TokenLogit] | None
    neighbours: list[Neighbour]
    companions: list[Companion]
    tokens: list[PreferredToken]
    sources: list[SourceShare]
    positions: list[PositionShare]


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one sequence, and a feature's activation on each."""

    feature: int
    sequence: int
    start: int
    """The place of the first token."""
    at: int
    """Index of the example among the tokens, from 0."""
    tokens: list[Token]
    activations: list[float]
    """0 where the feature does not fire, and on tokens that were left out."""
    kept: list[bool]
    """False for tokens that the index's filter left out."""
    position: int
    """Position of the first token in the sequence."""
    document: int
    """Number of the example's document."""
    source: str
    """Source of the example's document."""
    document_starts: list[int]
    """Indices, from 0, of the tokens that begin a document other than the preceding token's."""
    more_before: bool
    """Whether the sequence has tokens before the first one."""
    more_after: bool


@dataclass(frozen=True)
class Line:
    """A line of the list of features."""

    feature: int
    rows: int
    density: float
    max: float
    mean: float
    tokens: list[str]
    """Preferred tokens, best first."""
    promoted: list[str] | None
    """None: the index has none of any feature."""
    suppressed: list[str] | None
    source: str | None
    """The source that it prefers most."""


@dataclass(frozen=True)
class Page:
    """Some lines of the list, and the number of all lines."""

    lines: list[Line]
    total: int
