"""The output of `olmoscope store`."""

import shlex
from pathlib import Path

from rich.markup import escape

from olmoscope.activations.store.inspect import StoreInfo, output_folder
from olmoscope.activations.store.outliers import outliers_of
from olmoscope.activations.store.reader import open_store
from olmoscope.activations.store.verify import Verified
from olmoscope.cli.tables import console, new_table
from olmoscope.errors import UserError
from olmoscope.site import Site
from olmoscope.units import format_bytes


def show_info(info: StoreInfo) -> None:
    """A store's content, its progress, and its provenance."""
    manifest = info.manifest
    done = info.segments - len(info.missing)
    shown = new_table(str(info.store), "what", "")
    shown.columns[1].justify = "left"
    packing = "" if info.packed else " so far, packing is not finished"
    rows = [("state", _state(info)), ("token segments", f"{info.token_segments:,}{packing}"),
            ("segments with activations", f"{done:,} of {info.segments:,}"
             + (f"; missing: {_ranges(info.missing)}" if info.missing and done else ""))]
    if manifest is not None:
        model, made = manifest.model, manifest.provenance
        rows += [("model", f"{model.name} ({model.architecture}, {model.num_layers} layers, d_model {model.d_model})"),
                 ("revision", model.revision), ("tokenizer", manifest.tokenizer_hash),
                 ("split", manifest.split), ("rows", f"{manifest.rows:,}"), ("dtype", manifest.dtype),
                 ("computed in", manifest.model_dtype or "not recorded"),
                 *((f"source {name}", f"{source.tokens:,} tokens of {source.documents:,} documents")
                   for name, source in manifest.sources.items()),
                 ("recipe", manifest.recipe_hash), ("format version", str(manifest.version)),
                 *((f"made with {name}" if name == "olmoscope" else f"  {name}", str(value))
                   for name, value in (made | made.get("libraries", {})).items() if name != "libraries")]
    if manifest is not None and manifest.finished and not info.missing:
        rows += _outliers(info.store, manifest.sites)
    rows += [(f"bytes of {folder}", format_bytes(size)) for folder, size in info.bytes.items()]
    for name, value in rows:
        shown.add_row(name, escape(value))
    console.print(shown)


def _outliers(path: Path, sites: list[Site]) -> list[tuple[str, str]]:
    """Facts about rows of outlier norm, at each site; or a message that rows are damaged."""
    try:
        store = open_store(path)
        return [(f"outliers at {site}", outliers_of(store, site).said_for_training()) for site in sites]
    except UserError as error:
        return [("outliers", f"unknown: {error}")]


def show_verified(path: Path, verified: list[Verified]) -> None:
    """Every problem, and what to do."""
    for one in verified:
        _head(one)
        for problem in one.problems:
            fate = "[yellow]can be made again[/]" if problem.mends else "[red]cannot be repaired[/]"
            _line(f"  {escape(problem.path.relative_to(one.store).as_posix())}: {escape(problem.what)} ({fate})")
    if any(one.delete for one in verified):
        _line(f"Run: {escape(f'olmoscope store repair {shlex.quote(str(path))}')}")
    else:
        _show_collect(verified, "Run")


def show_repaired(repaired: list[Verified], dry_run: bool) -> None:
    """Every problem, every deleted file, what was left alone, and the command that makes the rest again."""
    for one in repaired:
        _head(one)
        for problem in one.problems:
            left = "" if problem.mends else " ([red]left unchanged[/])"
            _line(f"  {escape(problem.path.relative_to(one.store).as_posix())}: {escape(problem.what)}{left}")
        for path in one.delete:
            _line(f"  {'would delete' if dry_run else 'deleted'} {escape(str(path))}")
    _show_collect(repaired, "Then run")


def _state(info: StoreInfo) -> str:
    if info.live:
        return "being written by a process now"
    if info.manifest is not None and info.manifest.finished and not info.missing:
        return "finished"
    return "not finished; `olmoscope collect` continues it"


def _head(one: Verified) -> None:
    found = f"[red]{len(one.problems)} problems[/]" if one.problems else "[green]nothing wrong[/]"
    live = "; a process is writing it now" if one.live else ""
    _line(f"[bold]{escape(str(one.store))}[/]: {one.done:,} of {one.segments:,} segments have activations, "
          f"{format_bytes(one.bytes)} compared with checksums: {found}{live}")


def _line(text: str) -> None:
    """One line, however narrow the terminal: users copy paths and commands from it."""
    console.print(text, soft_wrap=True, highlight=False)


def _show_collect(verified: list[Verified], lead: str) -> None:
    for command in dict.fromkeys(_collect_command(one.store) for one in verified
                                 if any(problem.mends for problem in one.problems)):
        _line(f"{lead}: {escape(command)}")


def _collect_command(store: Path) -> str:
    """The command that makes a store's missing parts again."""
    out = output_folder(store)
    if out is not None and (out / "recipe.yaml").exists():
        return f"olmoscope collect {shlex.quote(str(out))}"
    where = shlex.quote(str(out)) if out is not None else "OUT"
    return f"olmoscope collect RECIPE --out {where}   (with the recipe that started it)"


def _ranges(numbers: list[int]) -> str:
    """`3, 7-9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
