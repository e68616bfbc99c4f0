"""What a run will cost, as tables in the terminal."""

from collections.abc import Iterable, Sequence

from rich.markup import escape

from olmoscope.cli.tables import console, in_lines, new_table, new_table_of_names
from olmoscope.cost.measure import Rates
from olmoscope.cost.plan import Memory, Plan, SAEPlan
from olmoscope.train.find_sinks import can_have_sinks
from olmoscope.units import format_bytes, format_seconds


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
    """The rate of a finish, and what training at the measured speed asks of the network and of the disk."""
    lines = [f"In a finish at {site} the language model takes {1000 * seconds:.3g} ms per token for each SAE."
             for site, seconds in rates.finish_seconds.items()]
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
    if any(train.orthogonal for train in trains):
        lines.append("Similar decoder rows are moved apart.")
    if finishes := [train.finish.share for train in trains if train.finish]:
        shares = each(100 * share for share in finishes)
        lines.append(f"In the last {shares}% of the steps, training also minimises the language model's own loss.")
    if few := [sae.tokens_per_latent for sae in saes if sae.more_passes_help]:
        each_has = " to ".join(f"{count:,.0f}" for count in sorted({min(few), max(few)}))
        lines.append(f"There are only {each_has} training tokens per latent. With so few, three or four passes over "
                     "the same text (--set train.epochs=3) reduced the error by 9 to 30% in our tests "
                     "(docs/recipe-study.md); training takes as many times longer.")
    return lines


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
