"""Results as tables in the terminal."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from olmoscope.activations.collect import Collected
from olmoscope.files import read_json
from olmoscope.pipeline import chosen
from olmoscope.plan import Plan
from olmoscope.recipe import Recipe
from olmoscope.release.validate import Validation
from olmoscope.train.run import run_folder
from olmoscope.units import format_bytes

console = Console()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    return table


def show_plan(plan: Plan) -> None:
    """What a recipe will cost."""
    recipe = plan.recipe
    console.print(f"[bold]{recipe.name}[/] ({recipe.form}): {recipe.model.name}, d_model {plan.d_model}")
    table = _table("Text and activations", "what", "how much")
    for row in (
        ("training tokens", f"{recipe.tokens.count:,}"),
        ("held-out tokens", f"{recipe.tokens.held_out:,}"),
        ("mixture", _mixture(recipe)),
        ("sequences, about", f"{plan.sequences:,}"),
        ("segments", f"{plan.segments:,}"),
        ("layers", ", ".join(map(str, recipe.activations.layers))),
        ("bytes a layer", format_bytes(plan.layer_bytes)),
        ("bytes of all layers", format_bytes(plan.store_bytes)),
    ):
        table.add_row(*row)
    console.print(table)
    table = _table("SAEs", "id", "parameters", "training state", "steps", "PFLOP")
    for sae in plan.saes:
        table.add_row(sae.sae.id, f"{sae.parameters / 1e6:,.1f}M", format_bytes(sae.state_bytes), f"{sae.steps:,}",
                      f"{sae.flops / 1e15:,.3g}")
    console.print(table)
    enough = "enough" if plan.free_bytes >= plan.disk_bytes else "[red]NOT ENOUGH[/]"
    console.print(f"Disk: {format_bytes(plan.disk_bytes)} needed, {format_bytes(plan.free_bytes)} free: {enough}")


def show_stores(collected: list[Collected]) -> None:
    """What was collected, and from where."""
    table = _table("Stores", "store", "tokens", "segments", "made now", "padding", "tokens per source")
    for one in collected:
        manifest = one.manifest
        sources = ", ".join(f"{name} {count.tokens:,}" for name, count in manifest.sources.items())
        table.add_row(str(one.store), f"{manifest.rows:,}", str(manifest.segments), str(one.segments_made),
                      f"{one.padding:.1%}", sources)
    console.print(table)
    for one in collected:
        if one.manifest.rows < one.wanted:
            console.print(f"[yellow]The text ran out: {one.store} has {one.manifest.rows:,} of the {one.wanted:,} "
                          "tokens asked for.[/]")


def show_results(recipe: Recipe, out: Path, only: list[str]) -> None:
    """The figures of all SAEs, side by side."""
    table = _table("SAEs on held-out tokens", "SAE", "NMSE", "(random k)", "FVU", "cosine", "L0", "dead",
                   "held-out tokens", "training NMSE", "trained on", "left out", "dead (window)")
    for sae in chosen(recipe, only):
        run = run_folder(out, sae)
        figures, done = read_json(run / "evaluation.json"), read_json(run / "done.json")
        table.add_row(sae.id, f"{figures['nmse']:.4f}", f"{figures['nmse_random_directions']:.3f}",
                      f"{figures['fvu']:.4f}", f"{figures['cosine']:.4f}", f"{figures['l0']['mean']:.1f}",
                      f"{figures['dead']['share']:.1%}", f"{figures['rows']:,}", f"{done['nmse']:.4f}",
                      f"{done['tokens']:,}", f"{done['rows']['dropped_share']:.1%}",
                      f"{done['dead_share']:.1%} ({done['dead_window']:,})")
    console.print(table)


def show_validation(validation: Validation) -> None:
    """Every check of a folder: what it is about, its verdict, its figure."""
    verdicts = {True: "[green]passed[/]", False: "[red]FAILED[/]", None: "[yellow]not made[/]"}
    table = Table(title=f"Validation of {validation.folder}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("check", "", "figure"):
        table.add_column(column)
    for subject in dict.fromkeys(check.sae for check in validation.checks):
        table.add_row(f"[bold]{subject or 'release'}[/]", "", "")
        for check in validation.checks:
            if check.sae == subject:
                table.add_row(f"  {check.name}", verdicts[check.passed], escape(check.figure))
    console.print(table)
    made = [check for check in validation.checks if check.passed is not None]
    console.print(f"{len(made) - len(validation.failures)} of {len(made)} checks passed.")


def _mixture(recipe: Recipe) -> str:
    mixture = recipe.text.mixture
    if mixture == "shards":
        return "whole shards in shuffled order"
    total = sum(mixture.values())
    return ", ".join(f"{name} {weight / total:.0%}" for name, weight in mixture.items()) + " of documents"
