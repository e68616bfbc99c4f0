"""The charts of a report: each is a card with a heading, a line of explanation, and a drawing of one or more SAEs.

If several SAEs are shown, SAE n has colour n and a letter; the ninth and later SAEs are in the tables only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

from olmoscope.evaluate import charts
from olmoscope.evaluate.charts import Bar, Counts, Point, Series
from olmoscope.evaluate.figures import DELTA_CE, FVU, KL, NMSE, RECOVERED, Figure
from olmoscope.evaluate.results import Evaluation, Interval, PositionBin
from olmoscope.evaluate.scales import Axis, exact, fitting, linear, log_label, round_step, say
from olmoscope.site import Site
from olmoscope.units import format_count

COLOURS = 8
POINTS = 120
"""Most points drawn of a curve; each is the mean of an equal number of lines of metrics.jsonl."""


_SUBSETS = {
    "without_special": "without special tokens",
    "without_first": "without first positions",
    "without_outliers": "without rows of outlier norm",
    "ordinary": "ordinary rows: without all three",
    "prompt": "prompts",
    "thinking": "thinking",
    "answer": "answers",
}


def subset_name(key: str) -> str:
    """The name of a subset of the rows on a page."""
    return _SUBSETS.get(key, key.replace("_", " "))


def outliers_said(e: Evaluation) -> str:
    """How many rows have an outlier norm, and how the SAE treats them, as a sentence without its full stop."""
    said, language = e.outliers_found.said(), e.language
    if not e.outliers or language.delta_ce_outliers_kept is None:
        return said
    return (f"{said}; with these rows replaced too, cross-entropy rises by {say(language.delta_ce)} nats; with these "
            f"rows left as they are, by {say(language.delta_ce_outliers_kept)}")


@dataclass(frozen=True)
class TrainingLine:
    """A line of a run's metrics.jsonl."""

    tokens: int
    loss: float
    lr: float
    dead_share: float | None
    """None until training has seen as many tokens as the dead window."""


@dataclass(frozen=True)
class Shown:
    """An SAE in a report.

    Attributes:
        number: its colour and letter, from 1.
        name: what the page calls it.
        training: its run's metrics, ascending; empty if there are none.
    """

    number: int
    name: str
    evaluation: Evaluation
    training: Sequence[TrainingLine]

    @property
    def letter(self) -> str:
        """A, B, ...; AA after Z."""
        first, second = divmod(self.number - 1, 26)
        return ("" if not first else chr(64 + first)) + chr(65 + second)


@dataclass(frozen=True)
class Card:
    """A chart, its heading, and a line that says what it shows."""

    title: str
    note: str
    drawing: Markup


def training_cards(shown: Sequence[Shown]) -> list[Card]:
    """Loss, share of dead latents and learning rate over the tokens of training."""
    known = [sae for sae in shown if sae.training]
    if not known:
        return []
    x = exact("tokens", 0, max(sae.training[-1].tokens for sae in known), "count")

    def curve(title: str, note: str, label: str, value: Callable[[TrainingLine], float | None],
              kind: Literal["error", "number", "share"]) -> Card:
        found = [(sae, [(line.tokens, at) for line in sae.training if (at := value(line)) is not None])
                 for sae in known]
        series = [Series(sae.name, sae.number, _thinned(points)) for sae, points in found if points]
        values = [y for one in series for _, y in one.points]
        if not values:
            return Card(title, f"{note} Not known: training saw fewer tokens than that.", Markup(""))
        y = fitting(label, values) if kind == "error" else linear(label, values, kind)
        return Card(title, note, charts.lines(title, series, x, y))

    return [
        curve("Training loss", "NMSE on the training rows: the mean since the previous point.", "loss",
              lambda line: line.loss, "error"),
        curve("Dead latents in training", "Share of latents that fired on none of the tokens in the dead window.",
              "share of latents", lambda line: line.dead_share, "share"),
        curve("Learning rate", "The optimiser's rate at each step.", "rate", lambda line: line.lr, "number"),
    ]


def model_cards(shown: Sequence[Shown]) -> list[Card]:
    """What the reconstruction costs the model."""
    if len(shown) > 1:
        return [*_by_sae(shown, DELTA_CE, "Added cross-entropy", "ΔCE in nats per token; 0 means no cost."),
                *_by_sae(shown, RECOVERED, "Loss recovered",
                         "Share of the cost of zero ablation that the SAE avoids; 100% means no cost."),
                *_by_sae(shown, KL, "KL divergence", "From the clean model to the spliced one; 0 means no change.")]
    language = shown[0].evaluation.language
    intervals = language.intervals
    entropies = [Bar("clean", 0, language.ce_clean, intervals.get("ce_clean")),
                 Bar("reconstruction spliced in", 1, language.ce_spliced, intervals.get("ce_spliced")),
                 Bar("mean row instead", 0, language.ce_mean, intervals.get("ce_mean")),
                 Bar("zeros instead", 0, language.ce_zero, intervals.get("ce_zero"))]
    divergences = [Bar("reconstruction spliced in", 1, language.kl, intervals.get("kl")),
                   Bar("mean row instead", 0, language.kl_mean, intervals.get("kl_mean")),
                   Bar("zeros instead", 0, language.kl_zero, intervals.get("kl_zero"))]
    return [Card("Cross-entropy of the next token", "Nats per token; the closer to clean, the better.",
                 charts.bars("Cross-entropy of the next token", entropies, _bar_axis(entropies))),
            Card("KL divergence from the clean model", "Nats per token; 0 means no change.",
                 charts.bars("KL divergence from the clean model", divergences, _bar_axis(divergences))),
            _by_subset(shown[0], "Added cross-entropy by subset of the rows", "ΔCE in nats per token.",
                       [("all rows", language.delta_ce, intervals.get("delta_ce")),
                        *((subset_name(name), part.delta_ce, part.intervals.get("delta_ce")) for name, subset in
                          shown[0].evaluation.subsets.items() if (part := subset.language) is not None)])]


def sparsity_cards(shown: Sequence[Shown]) -> list[Card]:
    """How often latents fire, how many fire at once, and how alike their directions are."""
    return [_density(shown), _l0(shown), _cosines(shown)]


def place_cards(shown: Sequence[Shown]) -> list[Card]:
    """Norm and error by the row's position and by its norm."""
    x = _position_axis(shown)

    def by_position(title: str, note: str, label: str, value: Callable[[PositionBin], float | None]) -> Card:
        series = [Series(sae.name, sae.number, [(_place(row.first), at) for row in sae.evaluation.by_position
                                                if (at := value(row)) is not None]) for sae in shown]
        y = fitting(label, [value for one in series for _, value in one.points])
        return Card(title, note, charts.lines(title, series, x, y, dots=True, say_x=lambda at: said[at]))

    said = {_place(row.first): f"positions {row.first:,} to {row.last:,}" if row.last > row.first
            else f"position {row.first:,}" for sae in shown for row in sae.evaluation.by_position}
    return [by_position("Norm by position", "Mean norm by position in the sequence, counted from 0.", "norm",
                        lambda row: row.norm),
            by_position("Error by position", "NMSE of the rows at these positions.", "NMSE",
                        lambda row: row.nmse),
            *_subset_errors(shown), _norms(shown), _error_by_norm(shown), _share_of_error(shown)]


def frontier_cards(shown: Sequence[Shown]) -> list[Card]:
    """Error against L0: lower and further to the left is better."""
    sites: dict[Site, list[int]] = {}
    for place, sae in sorted(enumerate(shown), key=lambda pair: pair[1].evaluation.l0.mean):
        sites.setdefault(sae.evaluation.site, []).append(place)
    links = [places for places in sites.values() if len(places) > 1]
    x = linear("L0", [sae.evaluation.l0.mean for sae in shown], zero=False)

    def against_l0(label: str, value: Callable[[Evaluation], float | None]) -> Card:
        points = [Point(sae.letter, f"{sae.letter}  {sae.name}", sae.number, sae.evaluation.l0.mean, y)
                  for sae in shown if (y := value(sae.evaluation)) is not None]
        title = f"{label} against L0"
        return Card(title, "Lower and further to the left is better. A line joins the SAEs of a site.", charts.scatter(
            title, points, x, linear(label, [point.y for point in points]), links))

    return [against_l0("FVU", FVU.value), against_l0("NMSE", NMSE.value),
            against_l0("ΔCE", lambda e: e.language.delta_ce)]


def _by_sae(shown: Sequence[Shown], figure: Figure, title: str, note: str) -> list[Card]:
    """One card, or none if no SAE has the figure."""
    rows = [Bar(f"{sae.letter}  {sae.name}", sae.number, value, figure.interval(sae.evaluation))
            for sae in shown if (value := figure.value(sae.evaluation)) is not None]
    return [Card(title, note, charts.bars(title, rows, _bar_axis(rows, figure.kind)))] if rows else []


def _by_subset(sae: Shown, title: str, note: str, rows: Sequence[tuple[str, float, Interval | None]]) -> Card:
    drawn = [Bar(name, 0 if place else sae.number, value, interval)
             for place, (name, value, interval) in enumerate(rows)]
    return Card(title, note, charts.bars(title, drawn, _bar_axis(drawn)))


def _subset_errors(shown: Sequence[Shown]) -> list[Card]:
    """The card of a single SAE; if there are several, each has a table instead."""
    if len(shown) > 1:
        return []
    e = shown[0].evaluation
    return [_by_subset(shown[0], "Error by subset of the rows", "NMSE on all rows and on subsets of them.",
                       [("all rows", e.nmse, e.intervals.get("nmse")),
                        *((subset_name(name), subset.nmse, subset.intervals.get("nmse"))
                          for name, subset in e.subsets.items() if subset.nmse is not None)])]


def _bar_axis(rows: Sequence[Bar], kind: str = "number") -> Axis:
    largest = max(max(row.value, row.interval[1] if row.interval else 0.0) for row in rows)
    return Axis("", 0.0, largest if largest > 0 else 1.0, "share" if kind == "share" else "number")


def _density(shown: Sequence[Shown]) -> Card:
    """Bins are half decades; latents that never fired have a bin of their own, to the left."""
    densities = [sae.evaluation.density for sae in shown]
    all_edges = densities[0].bin_edges
    fired = [number for number in range(1, len(all_edges) - 1) if any(one.latents[number] for one in densities)]
    first, last = (fired[0], fired[-1]) if fired else (1, len(all_edges) - 2)
    logs = [math.log10(edge) for edge in all_edges[first:last + 2]]
    edges = [logs[0] - 1.0, logs[0] - 0.5, *logs]
    counts = [Counts(sae.name, sae.number, [share[0], 0.0, *share[first:last + 1]]) for sae, share in
              ((sae, _shares(sae.evaluation.density.latents)) for sae in shown)]
    ticks = [(log, log_label(10.0**log, "share")) for log in logs if abs(log - round(log)) < 1e-6]
    ticks = ticks[::-(-len(ticks) // 5)]
    x = Axis("share of rows on which a latent fires", edges[0], edges[-1], named=((edges[0] + 0.25, "never"), *ticks))
    spans = ["never fired", "", *(f"fires on {say(low, 'share')} to {say(high, 'share')} of rows"
                                  for low, high in pairwise(all_edges[first:last + 2]))]
    title = "How often latents fire"
    return Card(title, f"Share of latents by density, over {_rows(shown)} rows.", charts.histogram(
        title, edges, counts, x, _share_axis("latents", counts), lambda number: spans[number]))


def _l0(shown: Sequence[Shown]) -> Card:
    """One bin per value if there are few values, else bins of equal width."""
    low = min(sae.evaluation.l0.values[0] for sae in shown)
    high = max(sae.evaluation.l0.values[-1] for sae in shown)
    width = -(-(high - low + 1) // 40)
    bins = -(-(high - low + 1) // width)
    counts = []
    for sae in shown:
        heights = [0.0] * bins
        for value, rows in zip(sae.evaluation.l0.values, sae.evaluation.l0.rows, strict=True):
            heights[(value - low) // width] += rows / sae.evaluation.rows
        counts.append(Counts(sae.name, sae.number, heights))
    edges = [low - 0.5 + width * number for number in range(bins + 1)]
    pad = max(0.0, 4.0 - (edges[-1] - edges[0]) / 2)
    step = math.ceil(round_step(max(1.0, (high - low) / 5)))
    ticks = [value for value in range(low, high + 1) if value % step == 0 or low == high]
    x = Axis("active latents per row", max(-0.5, edges[0] - pad), edges[-1] + pad,
             named=tuple((value, format_count(value)) for value in ticks))

    def say_bin(number: int) -> str:
        first = low + width * number
        return f"{first} active latents" if width == 1 else f"{first} to {first + width - 1} active latents"

    note = (f"Every row has exactly {low} active latents." if low == high
            else "Share of rows by their number of active latents.")
    title = "L0: latents active at once"
    return Card(title, note, charts.histogram(title, edges, counts, x, _share_axis("rows", counts), say_bin))


def _cosines(shown: Sequence[Shown]) -> Card:
    edges = shown[0].evaluation.dictionary.bin_edges
    counts = [Counts(sae.name, sae.number, _shares(sae.evaluation.dictionary.counts)) for sae in shown]
    filled = [number for number in range(len(edges) - 1) if any(one.heights[number] for one in counts)]
    first, last = max(0, filled[0] - 1), min(len(edges) - 2, filled[-1] + 1)
    edges = edges[first:last + 2]
    counts = [Counts(one.name, one.number, one.heights[first:last + 1]) for one in counts]
    title = "Nearest neighbour in the dictionary"
    return Card(title, "For each latent, the largest cosine of its decoder direction with another's; near 1 is a copy.",
                charts.histogram(title, edges, counts, exact("largest cosine", edges[0], edges[-1]),
                                 _share_axis("latents", counts),
                                 lambda number: f"cosine {edges[number]:.3g} to {edges[number + 1]:.3g}"))


def _norms(shown: Sequence[Shown]) -> Card:
    series = [Series(sae.name, sae.number, [(number, row.high) for number, row in enumerate(sae.evaluation.by_norm, 1)])
              for sae in shown]
    title = "Norms"
    return Card(title, "Norm at the upper end of each tenth of the rows, in order of norm.", charts.lines(
        title, series, _tenths(), fitting("norm", [value for one in series for _, value in one.points]), dots=True,
        say_x=_say_tenth))


def _error_by_norm(shown: Sequence[Shown]) -> Card:
    series = [Series(sae.name, sae.number, [(number, row.nmse) for number, row in enumerate(sae.evaluation.by_norm, 1)
                                            if row.nmse is not None]) for sae in shown]
    title = "Error by norm"
    return Card(title, "NMSE of each tenth of the rows, from the smallest norms to the largest.", charts.lines(
        title, series, _tenths(), fitting("NMSE", [value for one in series for _, value in one.points]), dots=True,
        say_x=_say_tenth))


def _share_of_error(shown: Sequence[Shown]) -> Card:
    series = [Series("error" if len(shown) == 1 else sae.name, sae.number,
                     [(number, row.share_of_error) for number, row in enumerate(sae.evaluation.by_norm, 1)])
              for sae in shown]
    if len(shown) == 1:
        series.insert(0, Series("variance", 0, [(number, row.share_of_variance) for number, row in
                                                enumerate(shown[0].evaluation.by_norm, 1)]))
    title = "Which rows cause the error"
    note = "Share of the total squared error in each tenth of the rows" + (
        "; grey: share of the total variance." if len(shown) == 1 else ".")
    return Card(title, note, charts.lines(title, series, _tenths(), linear(
        "share", [value for one in series for _, value in one.points], "share"), dots=True, say_x=_say_tenth))


def _say_tenth(number: float) -> str:
    return f"tenth {number:.0f} of 10, by norm"


def _tenths() -> Axis:
    return Axis("tenth of the rows, by norm", 0.6, 10.4, "count", named=tuple((n, str(n)) for n in range(1, 11)))


def _position_axis(shown: Sequence[Shown]) -> Axis:
    """Positions on a logarithmic scale: bins widen towards the end."""
    bins = max((sae.evaluation.by_position for sae in shown), key=len)
    every = -(-len(bins) // 7)
    return Axis("position in the sequence", -0.15, _place(bins[-1].first) + 0.15,
                      named=tuple((_place(row.first), format_count(row.first)) for row in bins[::every]))


def _place(position: int) -> float:
    return math.log2(position + 1)


def _share_axis(of: str, counts: Sequence[Counts]) -> Axis:
    return linear(f"share of {of}", [height for one in counts for height in one.heights], "share")


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total for count in counts]


def _rows(shown: Sequence[Shown]) -> str:
    return ", ".join(f"{rows:,}" for rows in sorted({sae.evaluation.rows for sae in shown}))


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of them: means of equal numbers of neighbours, each at the x of its last."""
    many = -(-len(points) // POINTS)
    groups = [points[start:start + many] for start in range(0, len(points), many)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
