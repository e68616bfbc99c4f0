"""A release in the terminal: its checks, and its files compared with those on the hub."""

from rich.markup import escape
from rich.table import Table

from olmoscope.cli.tables import console, new_table
from olmoscope.release.on_hub import Comparison
from olmoscope.release.validate import Validation
from olmoscope.units import format_bytes

STATES = {"new": "not there", "changed": "[yellow]differs[/]", "same": "[green]the same[/]"}


def show_validation(validation: Validation) -> None:
    """Every check of a folder: its subject, verdict and figure."""
    verdicts = {True: "[green]passed[/]", False: "[red]FAILED[/]", None: "[yellow]not made[/]"}
    console.print(f"Validation of {escape(str(validation.folder))}", soft_wrap=True)
    for subject in dict.fromkeys(check.sae for check in validation.checks):
        table = Table(title=f"[bold]{escape(subject) or 'release'}[/]", title_justify="left", box=None, pad_edge=False,
                      show_header=False, padding=(0, 2, 0, 0))
        for check in validation.checks:
            if check.sae == subject:
                table.add_row(f"  {check.name}", verdicts[check.passed], escape(check.figure))
        table.columns[0].no_wrap = table.columns[1].no_wrap = True
        console.print(table)
    made = [check for check in validation.checks if check.passed is not None]
    console.print(f"{len(made) - len(validation.failures)} of {len(made)} checks passed.")


def show_comparison(compared: Comparison) -> None:
    """Every file of a release, its size, and whether the repository has the same."""
    there = ("there is no such repository yet, or it is private (`hf auth login`)" if compared.commit is None
             else f"commit {compared.commit}")
    table = new_table(f"{escape(compared.repo)}: {there}", "file", "size", "on the hub")
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for file in compared.files:
        table.add_row(escape(file.name), format_bytes(file.bytes), STATES[file.state])
    console.print(table)
    total, missing = sum(file.bytes for file in compared.files), compared.missing
    console.print(f"{len(compared.files)} files, {format_bytes(total)}; the same on the hub: "
                  f"{len(compared.files) - len(missing)}; to send: {len(missing)}, "
                  f"{format_bytes(sum(file.bytes for file in missing))}.", soft_wrap=True)
    if compared.others:
        console.print(f"Only on the hub: {escape(', '.join(compared.others))}.", soft_wrap=True)
