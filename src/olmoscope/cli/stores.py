"""Commands about activation stores: store info, store verify, store repair."""

from pathlib import Path
from typing import Annotated

import typer

StoreArgument = Annotated[Path, typer.Argument(metavar="PATH", help="An output folder, or one activation store.")]


def info(path: StoreArgument) -> None:
    """Show what a store contains, how much of it is finished, and how it was made."""
    from olmoscope.activations.store.inspect import describe, find_stores
    from olmoscope.cli import store_tables

    for one in find_stores(path):
        store_tables.show_info(describe(one))


def verify(path: StoreArgument) -> None:
    """Read all files and compare them with checksums and counts; exits with 1 if anything is wrong."""
    from olmoscope.activations.store.verify import verify_stores
    from olmoscope.cli import store_tables

    verified = verify_stores(path)
    store_tables.show_verified(path, verified)
    if any(one.problems for one in verified):
        raise typer.Exit(1)


def repair(path: StoreArgument, dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Only list what it would delete.")] = False) -> None:
    """Delete damaged files that `collect` can make again; exits with 1 if there is damage that it cannot repair."""
    from olmoscope.activations.store.repair import repair_stores
    from olmoscope.cli import store_tables

    repaired = repair_stores(path, dry_run=dry_run)
    store_tables.show_repaired(repaired, dry_run)
    if any(not problem.mends for one in repaired for problem in one.problems):
        raise typer.Exit(1)
