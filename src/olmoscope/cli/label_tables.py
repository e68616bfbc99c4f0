"""Labels as tables in the terminal; docs/metrics.md defines the figures."""

from collections.abc import Sequence
from statistics import median

from rich.markup import escape

from olmoscope.cli.tables import console, new_table
from olmoscope.labelling.proposals import Proposal
from olmoscope.labelling.run import Run
from olmoscope.labelling.scores import Figure

GOOD = 0.9
"""If the detection AUROC is higher, a label says well where its feature fires."""
SHOWN = 10


def show_labels(name: str, run: Run, proposals: Sequence[Proposal]) -> None:
    """What a run did, the first labels, and how good all of them are."""
    if run.before == run.asked:
        console.print(f"{name}: {run.asked:,} features are labelled already, nothing to do", markup=False,
                      highlight=False)
    table = new_table(f"Labels of {escape(name)}, the best {min(SHOWN, len(proposals))}", "feature", "detection",
                      "which token", "label")
    for column in table.columns[-1:]:
        column.justify, column.no_wrap, column.overflow = "left", False, "fold"
    for one in sorted(proposals, key=_low, reverse=True)[:SHOWN]:
        table.add_row(str(one.feature), _figure(one.scores.detection), _figure(one.scores.fuzzing), escape(one.label))
    if proposals:
        console.print(table)
        known = [one.scores.detection.value for one in proposals if one.scores.detection is not None]
        good = sum(value > GOOD for value in known)
        console.print(f"{run.labelled:,} of {run.asked:,} features have a label; {good:,} ({good / run.asked:.0%}) "
                      f"have a detection AUROC over {GOOD}"
                      + (f", the median is {median(known):.3f}." if known else "."), highlight=False)
        console.print("detection: AUROC for distinguishing held-out text in which the feature fires from text in which "
                      "it does not, with its 95% interval; 0.5 is chance. which token: the same for single tokens.",
                      highlight=False)
    for reason, features in sorted(run.without.items(), key=lambda one: -one[1]):
        console.print(f"{features:,} without a label: {reason}", markup=False, highlight=False)


def _low(proposal: Proposal) -> float:
    """The lower end of the detection AUROC's interval; −1 where there is none."""
    return -1.0 if proposal.scores.detection is None else proposal.scores.detection.low


def _figure(figure: Figure | None) -> str:
    return "unknown" if figure is None else f"{figure.value:.2f} \\[{figure.low:.2f}, {figure.high:.2f}]"
