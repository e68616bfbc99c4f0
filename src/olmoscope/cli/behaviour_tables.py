"""Probing and absorption as tables in the terminal; docs/metrics.md defines the figures."""

from collections.abc import Sequence

from rich.markup import escape

from olmoscope.cli.tables import console, in_lines, new_table_of_names
from olmoscope.evaluate.absorption import LEAST_LETTERS, PROBE_F1
from olmoscope.evaluate.behaviour_results import Absorption, Interval, Probing
from olmoscope.evaluate.results import Evaluation
from olmoscope.site import Site


def show_behaviour(evaluations: Sequence[Evaluation]) -> None:
    """Probing and absorption side by side, for the SAEs that have these figures."""
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
        console.print(f"Means over {tables} labelled table(s) of {escape(source)}; in brackets the 95% interval over "
                      "tables; of x: probes of the activations that the SAE reads.", highlight=False)


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
            console.print(f"{site}: the model does not know these first letters (the probe of its activations has an "
                          f"F1 of at most {PROBE_F1}), so they are left out: {unknown}." + (
                              f" Fewer than {LEAST_LETTERS} letters remain, too few for a mean."
                              if counted < LEAST_LETTERS else ""), highlight=False)
    console.print("Means over letters; in brackets the 95% interval over letters. fraction: how far other latents "
                  "represent a letter on its words; full: share of words on which one of them does so alone; latents: "
                  "number per letter.", highlight=False)


def _with_interval(value: float | None, interval: Interval | None) -> str:
    """`0.812`, and below it `[0.77, 0.85]` if there is an interval: side by side, they would make the table too
    wide."""
    if value is None:
        return "unknown"
    return f"{value:.3f}" + ("" if interval is None else f"\n\\[{interval[0]:.2f}, {interval[1]:.2f}]")
