"""The command line: each command parses, calls one function, prints. Heavy imports wait until a command runs."""

import errno
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from olmoscope import __version__
from olmoscope.errors import UserError
from olmoscope.site import Site
from olmoscope.terminal import end_quietly_if_nobody_reads, prepare_streams, say

if TYPE_CHECKING:
    from olmoscope.recipe.schema import Recipe

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="Get, judge, read and share sparse autoencoders (SAEs) of a language model.")

store = typer.Typer(no_args_is_help=True, help="Look at, check and mend activation stores.")
app.add_typer(store, name="store")

RecipeArgument = Annotated[str, typer.Argument(
    metavar="RECIPE", help="A YAML file, a recipe of the package (tiny, olmo3-7b-think), or an output folder.")]
FormOption = Annotated[str | None, typer.Option("--form", help="A form of the recipe, e.g. reference.")]
SetOption = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE", help="Change a key: train.lr=1e-3.")]
OutOption = Annotated[Path | None, typer.Option(
    "--out", "-o", help="Output folder; by default named after the recipe, or the one given as RECIPE.")]
OnlyOption = Annotated[list[str] | None, typer.Option("--only", metavar="SAE", help="Only this SAE, by its id.")]
StoreArgument = Annotated[Path, typer.Argument(metavar="PATH", help="An output folder, or one activation store.")]
EVALUATED_TOKENS, EVALUATED_AT_ONCE, INDEXED_TOKENS = 100_000, 16384, 1_000_000
"""Defaults of --tokens and --batch-tokens of `evaluate`, and of --tokens of `index`."""
WorkerOption = Annotated[str | None, typer.Option(
    "--worker", metavar="I/N", help="Make only share I of N (I from 0); by default what torchrun or srun says.")]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The output folder of a recipe.")]


def _show_version(asked: bool) -> None:
    if asked:
        say(f"olmoscope {__version__}")
        raise typer.Exit


@app.callback()
def options(version: Annotated[bool, typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False) -> None:
    """Options that come before a command."""


@app.command()
def demo(out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("olmoscope-demo")) -> None:
    """The whole way once, on this machine: a tiny model reads Python's standard library."""
    from olmoscope.cli.demo import run_demo

    run_demo(out)


@app.command()
def plan(recipe: RecipeArgument, form: FormOption = None, changes: SetOption = None, out: OutOption = None,
         measure: Annotated[bool, typer.Option(
             "--measure", help="Time a few batches and training steps here, and say how many hours it takes.")] = False,
         ) -> None:
    """Check a recipe and say what it will cost, before anything starts; exits with 1 if the disk cannot hold it."""
    from olmoscope.cli import tables
    from olmoscope.cost.measure import measure as measure_rates
    from olmoscope.cost.plan import plan as make_plan
    from olmoscope.cost.plan import refuse_full_disk

    resolved, folder = _load(recipe, form, changes, out)
    made = make_plan(resolved, folder, measure_rates(resolved) if measure else None)
    tables.show_plan(made)
    refuse_full_disk(made, folder)


@app.command()
def model(name: Annotated[str, typer.Argument(metavar="ID", help="A hub id, a folder, or tiny.")],
          revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None) -> None:
    """What a language model is like, and which commands work with it. Loads all of it."""
    from olmoscope.cli.tables import show_model
    from olmoscope.model.describe import describe_model
    from olmoscope.model.load import pick_device
    from olmoscope.recipe.schema import Model

    show_model(name, describe_model(Model(name=name, revision=revision), pick_device("auto")))


@app.command()
def collect(recipe: RecipeArgument, form: FormOption = None, changes: SetOption = None, out: OutOption = None,
            worker: WorkerOption = None) -> None:
    """Run the model over the text and store its residual stream."""
    from olmoscope.activations.store.shares import parse_worker, worker_from_environment
    from olmoscope.cli import tables
    from olmoscope.pipeline import collect_stores

    resolved, folder = _load(recipe, form, changes, out)
    who = parse_worker(worker) if worker else worker_from_environment(os.environ)
    if who.told_by:
        say(f"worker {who.index}/{who.count}, as {who.told_by} says", err=True)
    collected = collect_stores(resolved, folder, who)
    tables.show_stores(collected)
    tables.show_statistics(collected)


@app.command()
def train(recipe: RecipeArgument, form: FormOption = None, changes: SetOption = None, out: OutOption = None,
          only: OnlyOption = None,
          live: Annotated[bool, typer.Option("--live", help="Straight from the model: no store is needed.")] = False,
          log: Annotated[Literal["wandb", "tensorboard"] | None, typer.Option(
              "--log", help="Send metrics to a tracker as well.")] = None) -> None:
    """Train the recipe's SAEs on the stored activations, or straight from the model."""
    from olmoscope.pipeline import train_saes
    from olmoscope.recipe.load import made_live

    resolved, folder = _load(recipe, form, changes, out)
    if live and resolved.train.live is None:
        resolved = made_live(resolved)
    for sae, fresh in train_saes(resolved, folder, only or [], log):
        say(f"{sae.id}: trained" if fresh else f"{sae.id}: finished before, nothing to do")


@app.command()
def evaluate(
    saes: Annotated[list[str], typer.Argument(metavar="SAE...", help=(
        "An output folder (its SAEs, on its held-out text); or any number of SAEs to compare: a run's folder, a folder "
        "in SAELens' format, a checkpoint of the reference trainer, a hub id (OWNER/NAME:PATH), a release, output "
        "folders."))],
    only: OnlyOption = None,
    text: Annotated[str | None, typer.Option(help=(
        "A file, a folder (plain text; JSON lines or parquet of texts or chats), a hub dataset (OWNER/NAME), or an "
        "output folder: its held-out text, and the default where an SAE lies in one."))] = None,
    model: Annotated[str | None, typer.Option(help=(
        "The language model, if the SAEs do not say which, or where a copy of it is."))] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="The layer they read, if the SAEs do not say which.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text, at most.")] = EVALUATED_TOKENS,
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], typer.Option(
        help="Of the language model; auto: bfloat16 where the hardware has it, else float32.")] = "auto",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one pass of the model.")] = EVALUATED_AT_ONCE,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help=(
        "Whether sequences begin with BOS, if the SAEs do not say; by default as the tokenizer does."))] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the results of SAEs from anywhere go.")] = None,
) -> None:
    """Measure SAEs: how well they reconstruct, and what the language model makes of it."""
    from olmoscope.cli import tables
    from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
    from olmoscope.evaluate.report import write_reports
    from olmoscope.evaluate.results import EVALUATION, read_evaluation
    from olmoscope.pipeline import evaluate_saes, report_saes

    first = Path(saes[0])
    one_output_folder = len(saes) == 1 and (first / "recipe.yaml").is_file() and not (first / "done.json").is_file()
    if one_output_folder and not (text or model or out):
        idle = [name for name, given, default in (
            ("--layer", layer, None), ("--tokens", tokens, EVALUATED_TOKENS), ("--dtype", dtype, "auto"),
            ("--batch-tokens", batch_tokens, EVALUATED_AT_ONCE), ("--bos/--no-bos", bos, None)) if given != default]
        if idle:
            raise UserError(f"{idle[0]} does nothing here: the SAEs of {saes[0]} are evaluated as its recipe says; "
                            "give --text (a text, or the output folder again) to evaluate them otherwise")
        recipe, folder = _load(saes[0], None, None, None)
        for sae, fresh in evaluate_saes(recipe, folder, only or []):
            say(f"{sae.id}: evaluated" if fresh else f"{sae.id}: evaluated before, nothing to do")
        tables.show_results(recipe, folder, only or [])
        say(f"Report: {report_saes(recipe, folder)[-1]}")
        return
    if only:
        raise UserError("--only is for the SAEs of one output folder; name the SAEs themselves instead")
    out = out or Path("evaluation")
    evaluated = evaluate_anywhere(saes, Options(out, text, tokens, model, dtype, _site(layer), batch_tokens,
                                                 bos))
    for one in evaluated:
        say(f"{one.name}: " + (f"evaluated, {one.folder}" if one.fresh else "evaluated before, nothing to do"))
    tables.show_evaluations([read_evaluation(one.folder / EVALUATION) for one in evaluated])
    say(f"Report: {write_reports([one.folder for one in evaluated], out)[-1]}")


@app.command()
def index(
    sae: Annotated[str, typer.Argument(help=(
        "A run's folder, an SAE in SAELens' format, a checkpoint of the reference trainer, or a hub id, "
        "OWNER/NAME:PATH; an output folder: all its SAEs."))],
    store: Annotated[Path | None, typer.Option(
        help="The activation store to index; by default the training store of the SAE's output folder.")] = None,
    text: Annotated[str | None, typer.Option(
        help="A file, a folder (plain text; JSON lines or parquet of texts or chats) or a hub dataset (OWNER/NAME) "
             "that the model reads now, in place of a store.")] = None,
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="The index's folder; by default `index` in the run's.")] = None,
    model: Annotated[str | None, typer.Option(help=(
        "The language model, if the SAE does not say which, or where a copy of it is."))] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="The layer it reads, if the SAE does not say which.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a text, at most.")] = INDEXED_TOKENS,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help=(
        "Whether sequences of a text begin with BOS, if the SAE does not say; by default as the tokenizer "
        "does."))] = None,
    skip_first: Annotated[int, typer.Option(
        min=0, metavar="N", help="Leave out the first N positions of each sequence.")] = 0,
    skip_special: Annotated[bool, typer.Option(
        "--skip-special", help="Leave out tokens that the tokenizer calls special.")] = False,
    max_norm: Annotated[float | None, typer.Option(
        metavar="X", help="Leave out rows whose norm is over X times the median, at any layer of the store.")] = None,
) -> None:
    """Index what each feature of an SAE fires on, for `olmoscope browse`."""
    from olmoscope.features.rows_of import index_sae
    from olmoscope.recipe.schema import Filter
    from olmoscope.sae.io.open import find_saes

    if text is None and tokens != INDEXED_TOKENS:
        raise UserError("--tokens is for --text: a store is indexed whole")
    if max_norm is not None and max_norm <= 1:
        raise UserError(f"--max-norm {max_norm:g}: it must be over 1 times the median")
    named = find_saes(sae)
    if out is not None and len(named) > 1:
        raise UserError(f"{sae} holds {len(named)} SAEs, which cannot share the index {out}; name one, or leave "
                        "out --out")
    filter_ = Filter(special_tokens=skip_special, first_positions=skip_first, max_norm=max_norm)
    for one in named:
        indexed = index_sae(one, store=store, text=text, out=out, model_name=model, site=_site(layer), tokens=tokens,
                            bos=bos, filter_=filter_)
        info = indexed.info
        say(f"{indexed.folder}: {info.sae.d_sae} features ({info.dead} never fire), {info.rows} rows, "
                   f"{info.firings} firings {_written(indexed.fresh)}")
    say(f"Look at it with `olmoscope browse {out or sae}`.")


@app.command()
def browse(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A feature index, or a folder with several below it.")],
    model: Annotated[str | None, typer.Option("--model", help="Where the language model of the index is now, for "
                                              "prompts and steering: a hub id, a folder, or tiny.")] = None,
    port: Annotated[int | None, typer.Option("--port", min=0, max=65535, help="By default 8100 or a free one.")] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Only say the address; open no browser.")] = False,
    export: Annotated[Path | None, typer.Option("--export", metavar="SITE", help="Write the page as plain files for a "
                                                "web host instead, without prompts and steering.")] = None,
) -> None:
    """Open the page of features in the browser: read, search, label, try prompts, steer."""
    from olmoscope.browse.serve import require_extra, serve

    require_extra()
    if export is None:
        serve(folder, model, port, open_browser=not no_open)
        return
    from olmoscope.browse.collection import open_collection
    from olmoscope.browse.export import export_site

    if model is not None or port is not None:
        raise UserError("--export writes plain files: --model and --port have no meaning there")
    site = export_site(open_collection(folder, None), export)
    say(f"{site.folder}: {site.features} features, {site.bytes / 1e6:.1f} MB, {site.bytes / site.features:.0f} "
               f"bytes a feature. See it with `python -m http.server -d {site.folder}`.")


@app.command()
def export(out: OutArgument, only: OnlyOption = None) -> None:
    """Write trained SAEs in SAELens format, into the folder `sae` of each run."""
    from olmoscope.pipeline import chosen
    from olmoscope.release.export import export_run
    from olmoscope.train.run import run_folder

    recipe, _ = _load(str(out), None, None, None)
    for sae in chosen(recipe, only or []):
        exported = export_run(run_folder(out, sae))
        say(f"{sae.id}: {exported.folder} {_written(exported.written)}")


@app.command()
def release(out: OutArgument) -> None:
    """Gather all SAEs of a recipe into a release folder: weights, figures, checksums, model card."""
    from olmoscope.release.build import build_release

    built = build_release(out)
    say(f"{built.folder}: {len(built.saes)} SAEs {_written(built.written)}")
    say(f"Check it with `olmoscope validate {out}`; upload it with `hf upload REPO_ID {built.folder}`.")


@app.command()
def validate(folder: Annotated[Path, typer.Argument(help="A release, the output folder it is in, or one SAE's folder.")]
             ) -> None:
    """Load SAEs with the real SAELens and compare with ours; exits with 1 if any check fails."""
    from olmoscope.cli import tables
    from olmoscope.pipeline import validate_folder

    validation = validate_folder(folder)
    tables.show_validation(validation)
    if not validation.passed:
        raise typer.Exit(1)


@app.command("import-checkpoint")
def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="A torch file of the reference trainer.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    model: Annotated[str, typer.Option("--model", help="The language model it was trained on, as the hub names it.")],
    layer: Annotated[int | None, typer.Option("--layer", help="Its layer, if the checkpoint does not say it.")] = None,
    layers_path: Annotated[str, typer.Option(help="Where the model keeps its layers.")] = "model.layers",
) -> None:
    """Turn a checkpoint of the reference trainer into a SAELens folder (nothing in it is executed)."""
    from olmoscope.release.import_checkpoint import import_checkpoint as import_file

    imported = import_file(checkpoint, folder, model_name=model, layer=layer, layers_path=layers_path)
    for note in imported.notes:
        say(f"note: {note}")
    say(f"{imported.folder}: layer {imported.layer}, {imported.d_sae} latents, d_model {imported.d_model}, "
               f"k {imported.k}, normalisation {imported.normalize}; {_written(imported.written)}")


@store.command("info")
def store_info(path: StoreArgument) -> None:
    """Say what a store holds, how far it has come, and where it came from."""
    from olmoscope.activations.store.inspect import describe, find_stores
    from olmoscope.cli import store_tables

    for one in find_stores(path):
        store_tables.show_info(describe(one))


@store.command("verify")
def store_verify(path: StoreArgument) -> None:
    """Read everything and compare it with its checksums and counts; exits with 1 if anything is wrong."""
    from olmoscope.activations.store.verify import verify_stores
    from olmoscope.cli import store_tables

    verified = verify_stores(path)
    store_tables.show_verified(path, verified)
    if any(one.problems for one in verified):
        raise typer.Exit(1)


@store.command("repair")
def store_repair(path: StoreArgument, dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Only say what would be deleted.")] = False) -> None:
    """Delete what is damaged and can be made anew; exits with 1 if something is wrong that it cannot mend."""
    from olmoscope.activations.store.repair import repair_stores
    from olmoscope.cli import store_tables

    repaired = repair_stores(path, dry_run=dry_run)
    store_tables.show_repaired(repaired, dry_run)
    if any(not problem.mends for one in repaired for problem in one.problems):
        raise typer.Exit(1)


def _site(layer: int | None) -> Site | None:
    return None if layer is None else Site(layer)


def _written(written: bool) -> str:
    return "written" if written else "there already, unchanged"


def _load(name: str, form: str | None, changes: list[str] | None, out: Path | None) -> "tuple[Recipe, Path]":
    """A command's recipe and output folder."""
    from olmoscope.recipe.load import load_recipe

    folder = Path(name)
    if folder.is_dir():
        if not (folder / "recipe.yaml").is_file():
            raise UserError(f"{folder} has no recipe.yaml: it is not an output folder of olmoscope")
        return load_recipe(str(folder / "recipe.yaml"), form, changes or []), out or folder
    recipe = load_recipe(name, form, changes or [])
    return recipe, out or Path(recipe.name if recipe.form == "default" else f"{recipe.name}-{recipe.form}")


def main() -> None:
    """Entry point of `olmoscope`: a user's mistake is one line and exit status 1."""
    prepare_streams()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        app(prog_name="olmoscope")  # also where Python was told -m olmoscope
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail("no space left on the disk; make room and run the same command again: what is finished is kept")
    finally:
        end_quietly_if_nobody_reads()


def _fail(message: str) -> None:
    from olmoscope.progress import console

    console.print("error: ", style="bold red", end="")
    console.print(message, soft_wrap=True, highlight=False, markup=False, emoji=False)
    sys.exit(1)


if __name__ == "__main__":
    main()
