"""A study in a report: its table, and the error of each setting against L0."""

from collections.abc import Sequence
from dataclasses import dataclass

from olmoscope.evaluate import charts
from olmoscope.evaluate.cards import COLOURS, Card
from olmoscope.evaluate.charts import Point
from olmoscope.evaluate.figures import Figure
from olmoscope.evaluate.scales import Kind, linear, say
from olmoscope.evaluate.study import FIGURES, FRONTIERS, Setting, Spread, Study
from olmoscope.site import Site

SAME_LATENTS: Sequence[tuple[str, str, Kind]] = (
    ("matched_share", "matched latents", "share"), ("matched_share_decoder", "matched by decoder", "share"),
    ("mmcs", "MMCS", "number"))
"""Figures of `Setting.stability`: key, column heading, kind of number."""


@dataclass(frozen=True)
class Row:
    """A setting in the table: its number, its colour (0: grey), and a cell for each figure.

    Attributes:
        cells: the mean, the spread, and whether the setting is unbeaten; "—" and "" if there is no figure.
    """

    number: int
    colour: int
    name: str
    seeds: int
    cells: Sequence[tuple[str, str, bool]]


def study_heads(study: Study) -> list[str]:
    """The headings of the columns that `study_rows` fills."""
    return [figure.short for figure in FIGURES] + [head for _, head, _ in SAME_LATENTS if study.stability]


def study_rows(study: Study) -> list[Row]:
    """The table's rows, in the order of the recipe."""
    return [Row(number, _colour(number), setting.name, len(setting.runs),
                [_cell(setting, figure) for figure in FIGURES]
                + (_same_latents(setting) if study.stability else []))
            for number, setting in enumerate(study.settings, 1)]


def study_cards(study: Study) -> list[Card]:
    """Charts of each error against L0, with a line through the unbeaten settings of a site."""
    names = {figure.key: figure.short.partition(",")[0] for figure in FIGURES}
    return [card for error in FRONTIERS if (card := _card(study, error, names[error])) is not None]


def _card(study: Study, error: str, label: str) -> Card | None:
    points: list[Point] = []
    sites: dict[Site, list[int]] = {}
    for number, setting in enumerate(study.settings, 1):
        l0, value = setting.figures["l0"].mean, setting.figures[error].mean
        if l0 is not None and value is not None:
            points.append(Point(str(number), f"{number}  {setting.name}", _colour(number), l0, value))
            if setting.unbeaten[error]:
                sites.setdefault(setting.site, []).append(len(points) - 1)
    if not points:
        return None
    links = [sorted(link, key=lambda place: points[place].x) for link in sites.values() if len(link) > 1]
    title = f"{label} against L0, by setting"
    note = "Means over seeds; lower and further to the left is better. A line joins the unbeaten settings of a site."
    return Card(title, note, charts.scatter(
        title, points, linear("L0", [point.x for point in points], zero=False),
                               linear(label, [point.y for point in points]), links))


def _cell(setting: Setting, figure: Figure) -> tuple[str, str, bool]:
    return (*_said(setting.figures[figure.key], figure.kind), setting.unbeaten.get(figure.key, False))


def _same_latents(setting: Setting) -> list[tuple[str, str, bool]]:
    figures = setting.stability
    return [("—", "", False) if figures is None else (*_said(figures[key], kind), False)
            for key, _, kind in SAME_LATENTS]


def _said(spread: Spread, kind: Kind) -> tuple[str, str]:
    """Mean and spread; "—" and "" if there is none."""
    if spread.mean is None:
        return "—", ""
    return say(spread.mean, kind), "" if spread.sd is None else f"± {say(spread.sd, kind)}"


def _colour(number: int) -> int:
    return number if number <= COLOURS else 0
