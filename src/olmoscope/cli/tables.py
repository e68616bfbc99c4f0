"""Results as tables in the terminal."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from olmoscope.activations.collect.run import Collected
from olmoscope.activations.store.outliers import outliers_of
from olmoscope.activations.store.reader import open_store
from olmoscope.evaluate.results import EVALUATION, Evaluation, read_evaluation
from olmoscope.files import read_json
from olmoscope.model.describe import Described
from olmoscope.pipeline import chosen
from olmoscope.recipe.schema import Recipe
from olmoscope.terminal import Terminal
from olmoscope.train.run import run_folder

console = Terminal()

NAME_WIDTH = 36
"""Width of an SAE's id in a table of figures; a longer id takes several lines (`in_lines`)."""


def new_table(title: str, *columns: str) -> Table:
    """A table in the house style: first column left-aligned, figures right-aligned; narrow enough for 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    return table


def new_table_of_names(title: str, *columns: str) -> Table:
    """A table with ids of SAEs in its first column: if the terminal is too narrow, the ids wrap, but figures never
    do."""
    table = new_table(title, *columns)
    for column in table.columns:
        column.no_wrap = column is not table.columns[0]
        column.overflow = "fold"
    return table


def in_lines(name: str) -> str:
    """An SAE's id in the form that tables show: a long one is broken before its last part and at a transcoder's
    `-to-`."""
    if len(name) <= NAME_WIDTH:
        return escape(name)
    first, *last = name.rsplit("/", 1)
    if len(first) > NAME_WIDTH:
        first = first.replace("-to-", "\n-to-", 1)
    return escape("/\n".join([first, *last]))


def show_model(name: str, described: Described) -> None:
    """The output of `olmoscope model`."""
    for title, rows in ((name, described.facts), ("What works", described.works)):
        show_facts(title, rows)


def show_facts(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Names on the left, values on the right."""
    console.print(f"[bold]{escape(title)}[/]", soft_wrap=True, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def show_stores(collected: list[Collected]) -> None:
    """The collected rows, and their sources."""
    for one in collected:
        manifest = one.manifest
        console.print(f"[bold]{escape(str(one.store))}[/]: {manifest.rows:,} tokens in {manifest.segments} segments "
                      f"({one.segments_made} made now), padding {one.padding:.1%}", soft_wrap=True)
        total = sum(count.tokens for count in manifest.sources.values())
        for name, count in manifest.sources.items():
            console.print(f"  {escape(name)}: {count.tokens:,} tokens ({count.tokens / total:.0%}) of "
                          f"{count.documents:,} documents")
            if lost := one.lost.get(name):
                dropped = ", ".join(f"{what} ({messages:,})" for what, messages in lost.items())
                console.print(f"[yellow]  dropped from messages of {escape(name)}, because its text has no place for "
                              f"it: {escape(dropped)}[/]", soft_wrap=True)
        if manifest.rows < one.wanted:
            console.print(f"[yellow]  The text ran out: the recipe asks for {one.wanted:,} tokens.[/]")
        if one.segments_missing:
            console.print(f"[yellow]  Not finished: {one.segments_missing} of {manifest.segments} segments belong to "
                          "other workers; `olmoscope collect` without --worker makes all that are missing.[/]")


def show_statistics(collected: list[Collected]) -> None:
    """Statistics of the activations in finished stores; `x` is a row."""
    for one in collected:
        if one.statistics is None:
            continue
        table = new_table(f"Activations in {one.store}", "site", "mean/std", "‖x‖ p50", "p99", "at start",
                       "max |x|", "bound", "fp16", "added FVU")
        for site, figures in one.statistics["sites"].items():
            norm = figures["norm"]
            table.add_row(site, *map(_number, (
                figures["mean_over_std"], norm["p50"], norm["p99"], figures["norm_by_position"][0]["p50"],
                figures["largest"], figures["bound"])),
                "safe" if figures["float16"] else "no", f"{figures['added_fvu']:.1e}")
        console.print(table)
        store = open_store(one.store)
        for site in one.manifest.sites:
            if (outliers := outliers_of(store, site)).count:
                console.print(f"{site}: {outliers.said_for_training()}.", highlight=False)


def show_results(recipe: Recipe, out: Path, only: list[str]) -> None:
    """The figures of all SAEs, side by side; docs/metrics.md defines them."""
    runs = [run_folder(out, sae) for sae in chosen(recipe, only)]
    show_evaluations([read_evaluation(run / EVALUATION) for run in runs])
    notes = {f"train.filter left out {share:.2%} of the rows: {reason}."
             for run in runs for reason, share in read_json(run / "done.json")["rows"]["reasons"].items()}
    for note in sorted(notes):
        console.print(note)


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def show_evaluations(evaluations: Sequence[Evaluation]) -> None:
    """SAEs side by side; docs/metrics.md defines the figures."""
    apart = any(one.outliers for one in evaluations)  # figures with and without rows of outlier norm
    table = new_table_of_names("SAEs", "SAE", "NMSE", "FVU", *(["all"] if apart else []), "L0", "dead", "ΔCE",
                               *(["kept"] if apart else []), "rec.", "KL")
    for one in evaluations:
        language, usual = one.language, one.usual
        table.add_row(in_lines(one.sae), _figure(usual.nmse, ".4f"), _figure(usual.fvu, ".3f"),
                      *([f"{one.fvu:.3f}"] if apart else []), f"{one.l0.mean:.1f}", f"{one.dead.share:.1%}",
                      f"{language.delta_ce:.3f}",
                      *([_figure(language.delta_ce_outliers_kept, ".3f")] if apart else []),
                      _figure(language.loss_recovered_zero, ".3f"), f"{language.kl:.3f}")
        for at in one.by_site or []:
            table.add_row(f"  at {at.site}", _figure(at.nmse, ".4f"), *([""] if apart else []), _figure(at.fvu, ".3f"),
                          "", "", f"{at.delta_ce:.3f}", *([""] if apart else []),
                          _figure(at.loss_recovered_zero, ".3f"), f"{at.kl:.3f}")
    console.print(table)
    for said in dict.fromkeys(f"{one.site}: {one.outliers_found.said()}." for one in evaluations if one.outliers):
        console.print(said, highlight=False)
    if apart:
        console.print("Such rows are outliers. NMSE and FVU are over the other rows; all: FVU over all rows. For ΔCE, "
                      "x̂ replaces every row; kept: the outliers stay as they are.", highlight=False)
    if any(one.by_site for one in evaluations):
        console.print("A crosscoder's first line is for the last site that it writes. ΔCE and KL at a site are "
                      "measured with only that site replaced.")
    console.print("NMSE: mean of ‖x − x̂‖² / ‖x‖². ΔCE, KL: the change in the model's predictions with x̂ instead of "
                  "x, in nats; rec.: loss recovered, relative to zeros.")
    for text, rows, read in dict.fromkeys((one.text.name, one.rows, one.language.rows) for one in evaluations):
        console.print(f"Measured on {escape(text)}: {rows:,} tokens (dead: fired on none of them); for ΔCE and KL the "
                      f"model read {read:,} of them.")
    for site, zeros in sorted({(one.site, one.zero_rows) for one in evaluations if one.zero_rows}):
        console.print(f"{zeros:,} rows of {site} are all zeros: NMSE leaves them out.")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
