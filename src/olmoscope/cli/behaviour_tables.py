"""What an SAE's latents are good for, as tables in the terminal; docs/metrics.md defines the figures."""

from collections.abc import Sequence

from rich.markup import escape

from olmoscope.cli.tables import console, in_lines, new_table_of_names
from olmoscope.evaluate.absorption import LEAST_LETTERS, PROBE_F1
from olmoscope.evaluate.behaviour_results import Absorption, Interval, Probing
from olmoscope.evaluate.results import Evaluation
from olmoscope.site import Site


def show_behaviour(evaluations: Sequence[Evaluation]) -> None:
    """Probing and absorption of those SAEs that were measured so, side by side."""
    if probed := [(one.sae, one.probing) for one in evaluations if one.probing]:
        _show_probing(probed)
    if absorbed := [(one.sae, one.site, one.absorption) for one in evaluations if one.absorption]:
        _show_absorption(absorbed)


def _show_probing(probed: Sequence[tuple[str, Probing]]) -> None:
    counts = sorted({k for _, found in probed for k in found.latents})
    table = new_table_of_names("Sparse probing: AUC of the best k latents", "SAE", *(f"k {k}" for k in counts), "of x")
    for name, found in probed:
        figures = [*(found.latents[k] for k in counts), found.activations]
        table.add_row(in_lines(name), *(_with_interval(each.auc, each.intervals.get("auc")) for each in figures))
    console.print(table)
    for source, tables in sorted({(found.source, len(found.tables)) for _, found in probed}):
        console.print(f"Means over {tables} labelled table(s) of {escape(source)}, in brackets 95% over tables; of x: "
                      "probes of the activations that the SAE reads.", highlight=False)


def _show_absorption(absorbed: Sequence[tuple[str, Site, Absorption]]) -> None:
    table = new_table_of_names("Absorption of first letters", "SAE", "fraction", "full", "latents", "letters")
    for name, _, found in absorbed:
        table.add_row(in_lines(name), _with_interval(found.fraction, found.intervals.get("fraction")),
                      _with_interval(found.full, found.intervals.get("full")),
                      _with_interval(found.latents, found.intervals.get("latents")), str(found.counted))
    console.print(table)
    for site, unknown, counted in sorted({(site, ", ".join(one.letter for one in found.letters if one.fraction is None),
                                           found.counted) for _, site, found in absorbed}):
        if unknown:
            console.print(f"{site}: the model does not know these first letters (F1 of the probe of its activations at "
                          f"most {PROBE_F1}), so they are left out: {unknown}." + (
                              f" Under {LEAST_LETTERS} letters are left, too few for a mean."
                              if counted < LEAST_LETTERS else ""), highlight=False)
    console.print("Means over letters, in brackets 95% over letters. fraction: how far other latents stand for a "
                  "letter on its words; full: words on which one of them does so alone; latents: of a letter.",
                  highlight=False)


def _with_interval(value: float | None, interval: Interval | None) -> str:
    """`0.812`, and below it `[0.77, 0.85]` if there is an interval: side by side, four columns would fill the line."""
    if value is None:
        return "unknown"
    return f"{value:.3f}" + ("" if interval is None else f"\n\\[{interval[0]:.2f}, {interval[1]:.2f}]")
