"""Results as tables in the terminal."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from olmoscope.activations.collect.run import Collected
from olmoscope.activations.store.outliers import outliers_of
from olmoscope.activations.store.reader import open_store
from olmoscope.cost.measure import Rates
from olmoscope.cost.plan import Memory, Plan, SAEPlan
from olmoscope.evaluate.results import EVALUATION, Evaluation, read_evaluation
from olmoscope.files import read_json
from olmoscope.model.describe import Described
from olmoscope.pipeline import chosen
from olmoscope.recipe.schema import Recipe
from olmoscope.terminal import Terminal
from olmoscope.train.find_sinks import can_have_sinks
from olmoscope.train.run import run_folder
from olmoscope.units import format_bytes, format_seconds

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


def show_plan(plan: Plan) -> None:
    """The cost of a recipe."""
    recipe, cost = plan.recipe, plan.cost
    unknown = "unknown without the model's config"
    console.print(f"[bold]{recipe.name}[/] ({recipe.form}): {recipe.model.name}, d_model {plan.d_model}, "
                  f"computes in {plan.compute_dtype}")
    table = new_table("Text and activations", "what", "how much")
    for row in (
        ("training tokens", f"{recipe.tokens.count:,}"),
        ("held-out tokens", f"{recipe.tokens.held_out:,}"),
        *_sources(plan),
        ("sequences, about", f"{plan.sequences:,}"),
        ("segments", f"{plan.segments:,}"),
        ("sites", ", ".join(map(str, recipe.activations.sites))),
        *((f"bytes of {site}", format_bytes(size)) for site, size in plan.site_bytes.items()),
        ("bytes of all sites, tokens and rows", format_bytes(plan.store_bytes)),
        ("parameters in use", unknown if cost is None else f"{cost.parameters:,}"),
        ("FLOPs per token", unknown if cost is None else _flops(cost.flops_per_token(recipe.tokens.chunk_lengths))),
        ("FLOPs of collection", unknown if plan.collect_flops is None else _flops(plan.collect_flops)),
        ("peak memory of collection, about", unknown if plan.collect_memory is None else _memory(plan.collect_memory)),
        ("time of collection", _time(plan.collect_hours())),
    ):
        table.add_row(*row)
    console.print(table)
    table = new_table_of_names("SAEs", "id", "steps", "batch", "rate", "FLOP", "GPU" if plan.gpu else "RAM", "time")
    for sae in plan.saes:
        table.add_row(in_lines(sae.sae.id), f"{sae.steps:,}", f"{sae.train.batch:,}", f"{sae.lr:.2e}",
                      _flops(sae.flops, short=True), format_bytes(sae.memory.gpu or sae.memory.ram),
                      _time(plan.train_hours(sae)))
    console.print(table)
    for line in _sharing(plan):
        console.print(line, soft_wrap=True, highlight=False)
    for line in _training(plan.saes):
        console.print(line, soft_wrap=True, highlight=False)
    if (kept := sum(sae.kept for sae in plan.saes)) > len(plan.saes):
        console.print(f"Checkpoints kept (train.checkpoints): {kept:,}, "
                      f"{format_bytes(sum(sae.kept * sae.state_bytes for sae in plan.saes))}.")
    if plan.rates is None:
        console.print("Times: run with --measure, on the machine that will do the work.")
    else:
        rates = plan.rates
        console.print(f"Measured on {rates.device}: {rates.tokens_per_second:,.0f} tokens/s through the model "
                      f"({rates.batches} batches), {rates.step_seconds:.3g} s per step of {rates.sae.id} "
                      f"({rates.steps} steps); other SAEs in proportion to their width. In all {_time(plan.hours())}.",
                      soft_wrap=True)
        for line in _pace(plan, rates):
            console.print(line, soft_wrap=True, highlight=False)
        for site, outliers in rates.outliers.items():
            console.print(f"{site}, random tokens: {outliers.said_for_training()}.", highlight=False)
    console.print(plan.verdict, soft_wrap=True, highlight=False, markup=False)
    for warning in plan.warnings:
        console.print(f"[yellow]{escape(warning)}[/]", soft_wrap=True, highlight=False)
    enough = "[red]NOT ENOUGH[/]" if plan.missing_bytes else "enough"
    there = f", {format_bytes(plan.present_bytes)} of it already written" if plan.present_bytes else ""
    console.print(f"Disk: {format_bytes(plan.disk_bytes)} needed{there}; {format_bytes(plan.free_bytes)} free, "
                  f"{enough}")


def _sharing(plan: Plan) -> list[str]:
    """How several processes share the SAEs: one sentence for each number of processes that train one SAE together."""
    if plan.ranks == 1:
        return []
    lines = []
    for together in sorted({sae.ranks for sae in plan.saes}, reverse=True):
        saes = [sae for sae in plan.saes if sae.ranks == together]
        many = f"{len(saes)} SAEs are" if len(saes) > 1 else "1 SAE is"
        teams = plan.ranks // together
        if together == 1:
            lines.append(f"{many} trained by {teams} processes, each SAE by one process; they send nothing to each "
                         "other.")
        else:
            by = f"{teams} teams of {together} processes" if teams > 1 else f"{together} processes together"
            largest = max(saes, key=lambda sae: sae.traffic.total)
            step, batch = largest.traffic, largest.batch_traffic
            lines.append(f"{many} trained by {by}: each has a share of the latents, needs the memory shown and sends "
                         f"{_sent(step.total, step.crossing, plan.nodes)} per step, not counting an auxiliary loss, "
                         f"and {_sent(batch.total, batch.crossing, plan.nodes)} of the next batch while it computes.")
    return lines


def _pace(plan: Plan, rates: Rates) -> list[str]:
    """What training at the measured speed asks of the network and of the disk."""
    lines = []
    shared = [(sae, seconds) for sae in plan.saes if sae.ranks > 1 and (seconds := plan.step_seconds(sae))]
    for sae, seconds in sorted(shared, key=lambda pair: pair[0].traffic.total / pair[1])[-1:]:
        total = sae.traffic.total + sae.batch_traffic.total
        crossing = sae.traffic.crossing + sae.batch_traffic.crossing
        lines.append(f"{sae.ranks} processes compute a step of {sae.sae.id} in {format_seconds(seconds)} at best; then "
                     f"each sends {_sent(total / seconds, crossing / seconds, plan.nodes, '/s')}, and a slower network "
                     "makes the step longer.")
    if feed := plan.feed():
        reads = f"Training reads up to {format_bytes(feed)}/s of activations"
        if rates.disk is None:
            lines.append(f"{reads}.")
        elif feed <= rates.disk:
            lines.append(f"{reads}; this disk gives {format_bytes(rates.disk)}/s.")
        else:
            lines.append(f"{reads}, but this disk gives {format_bytes(rates.disk)}/s: training will wait for it, "
                         f"unless the store of {format_bytes(plan.store_bytes)} fits into memory.")
    return lines


def _sent(total: float, crossing: float, nodes: int, each: str = "") -> str:
    """How much a process sends; with several machines also how much of it to others."""
    return format_bytes(total) + each + (f" ({format_bytes(crossing)}{each} to other machines)" if nodes > 1 else "")


def _training(saes: Sequence[SAEPlan]) -> list[str]:
    """Further facts about training: a sentence for each setting that any of the SAEs has."""
    trains = [sae.train for sae in saes]

    def each(values: Iterable[float]) -> str:
        return " or ".join(f"{value:,g}" for value in sorted(set(values)))

    lines = []
    if decoders := [train.decoder_rate for train in trains if train.decoder_rate != 1]:
        lines.append(f"The decoder's learning rate is {each(decoders)} times the encoder's.")
    if any(train.axes == "principal" for train in trains):
        lines.append("Adam works along the principal axes of the rows.")
    if windows := [train.auxiliary.dead_window for train in trains if train.auxiliary]:
        lines.append(f"A latent is revived if it has not fired in {each(windows)} tokens.")
    if any(sae.train.sinks == "auto" and can_have_sinks(sae.sae) for sae in saes):
        lines.append("Attention sinks get latents of their own, if a site has sinks.")
    if finishes := [train.finish.share for train in trains if train.finish]:
        shares = each(100 * share for share in finishes)
        lines.append(f"In the last {shares}% of the steps, training also minimises the language model's own loss.")
    return lines


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


def _sources(plan: Plan) -> list[tuple[str, str]]:
    if plan.shares is None:
        return [("  of sources", "whole shards in shuffled order, so their sizes decide")]
    return [(f"  {name}, {share:.0%} by documents",
             f"~{share * plan.recipe.tokens.count:,.0f} if documents are equally long")
            for name, share in plan.shares.items()]


def _flops(number: float, short: bool = False) -> str:
    """`14.3 GFLOP`, or `14.3 G`."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.3g} {unit}" + ("" if short else "FLOP")
    return f"{number:,.0f}"


def _memory(memory: Memory) -> str:
    return f"{format_bytes(memory.ram)} RAM" + (f", {format_bytes(memory.gpu)} GPU" if memory.gpu else "")


def _time(hours: float | None) -> str:
    if hours is None:
        return "?"
    if hours < 2 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.1f} h"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
