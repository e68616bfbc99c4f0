"""What an index says of a feature, as plain records: what a page shows and JSON carries (`dataclasses.asdict`).

A *place* is a token's number in the index's corpus; a *row* is a token that was encoded (filters leave some out).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Token:
    """A token and what it looks like; the text may hold anything, newlines and markup too."""

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
    """On how many rows the activation lies here."""
    examples: list[Example]
    """Drawn from these rows alike, in the order of the text."""


@dataclass(frozen=True)
class Histogram:
    """Rows by activation, in bins that are equally wide on a logarithmic scale; only those from the first to the last
    that are not empty."""

    edges: list[float]
    """One more than there are counts: bin i holds `edges[i]` <= value < `edges[i + 1]`."""
    counts: list[int]


@dataclass(frozen=True)
class TokenLogit:
    """What a feature's decoder direction adds to an output token's logit, up to a positive factor (docs/metrics.md)."""

    token: Token
    logit: float


@dataclass(frozen=True)
class Neighbour:
    """A feature whose decoder direction is near."""

    feature: int
    cosine: float


@dataclass(frozen=True)
class Companion:
    """A feature that fires on the same rows."""

    feature: int
    rows: int
    """On how many rows of the sample both fire."""
    lift: float
    """How many times more often than if the two had nothing to do with each other."""


@dataclass(frozen=True)
class PreferredToken:
    """A token on which a feature fires more often than on others."""

    token: Token
    rows: int
    """On how many rows of this token it fires."""
    lift: float
    """The token's share of the feature's rows, over its share of all rows."""
    mean: float
    """Of the activation on these."""


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
    """All that the index has of a feature. Definitions: docs/metrics.md."""

    index: int
    rows: int
    """On how many rows it fires; 0: dead on this text, and most lists are empty."""
    density: float
    max: float
    mean: float
    """Over the rows on which it fires; 0 if there are none."""
    histogram: Histogram
    top: list[Example]
    """Strongest first, at most one of a passage."""
    intervals: list[Interval]
    """Weakest first."""
    random: list[Example]
    """Drawn from all its rows alike, in the order of the text."""
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
    """Some neighbouring tokens of one sequence, and what a feature does on each."""

    feature: int
    sequence: int
    start: int
    """The place of the first token."""
    at: int
    """Which of the tokens the example is, from 0."""
    tokens: list[Token]
    activations: list[float]
    """0 where it does not fire, and on rows that were left out."""
    kept: list[bool]
    """False for tokens that the index's filter left out."""
    position: int
    """The first token's, in the sequence."""
    document: int
    """Number of the example's document."""
    source: str
    """Of the example's document."""
    document_starts: list[int]
    """Which of the tokens begin another document than the one before them, from 0."""
    more_before: bool
    """Whether the sequence goes on before the first token."""
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
    """Preferred ones, best first."""
    promoted: list[str] | None
    """None: the index has none of any feature."""
    suppressed: list[str] | None
    source: str | None
    """The one it prefers most."""


@dataclass(frozen=True)
class Page:
    """Some lines of the list, and how many there are in all."""

    lines: list[Line]
    total: int
