"""Commands about SAEs: evaluate, inspect, audit, study, index, browse."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from olmoscope.cli.options import OnlyOption, OutArgument, RanksOption, SiteOption, site_of, written
from olmoscope.errors import UserError
from olmoscope.terminal import say

EVALUATED_TOKENS, EVALUATED_AT_ONCE = 100_000, 16384
"""Defaults of --tokens and --batch-tokens of `evaluate`."""
AUDITED_TOKENS, AUDITED_AT_ONCE = 8192, 4096
"""The same of `audit`."""


def evaluate(
    saes: Annotated[list[str], typer.Argument(metavar="SAE...", help=(
        "An output folder, to measure its SAEs on its held-out text. Or SAEs to compare, each of them a run's folder, "
        "a release, an output folder, or another tool's SAE (a folder, a file, OWNER/NAME:PATH on the hub, or "
        "saelens:RELEASE/ID)."))],
    only: OnlyOption = None,
    text: Annotated[str | None, typer.Option(help=(
        "The text to measure on: a file or a folder (plain text, or JSON lines or Parquet with texts or chats), a hub "
        "dataset (OWNER/NAME), or an output folder, for its held-out text. By default the held-out text of the output "
        "folder that contains an SAE."))] = None,
    model: Annotated[str | None, typer.Option(help=(
        "The language model, if the SAEs do not name it; or the path of a copy of it."))] = None,
    site: SiteOption = None,
    tokens: Annotated[int, typer.Option(min=2, help="The most tokens of the text to use.")] = EVALUATED_TOKENS,
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], typer.Option(help=(
        "The language model's data type; auto: bfloat16 if the hardware supports it, else float32."))] = "auto",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one pass of the model.")] = EVALUATED_AT_ONCE,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help=(
        "Whether sequences begin with BOS, if the SAEs do not say; by default the tokenizer decides."))] = None,
    probing: Annotated[bool, typer.Option("--probing", help=(
        "Also run sparse probing: how well 1, 5 and 16 latents distinguish labelled texts."))] = False,
    probing_sets: Annotated[str | None, typer.Option(metavar="N|NAME,...|all", help=(
        "For --probing: how many labelled tables to use, or which ones; by default 12."))] = None,
    probing_data: Annotated[Path | None, typer.Option(metavar="DIR", help=(
        "For --probing: a folder of labelled tables (CSV: prompt, target); by default those of the package "
        "sae-probes."))] = None,
    absorption: Annotated[bool, typer.Option("--absorption", help=(
        "Also measure feature absorption: on how many words other latents represent the first letter."))] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help=(
        "Folder for the results, unless an output folder is evaluated as its recipe says; by default "
        "`evaluation`."))] = None,
    stability: Annotated[bool, typer.Option("--stability", help=(
        "Also compare the latents of an output folder's SAEs that differ only in the seed."))] = False,
    ranks: RanksOption = 1,
) -> None:
    """Measure how well SAEs reconstruct, and how well the language model works with their reconstructions."""
    from olmoscope.api import evaluation_job
    from olmoscope.cli import tables
    from olmoscope.cli.behaviour_tables import show_behaviour
    from olmoscope.cli.processes import SHARED_WORK, join_quietly, start_here
    from olmoscope.cli.study_tables import show_study
    from olmoscope.distributed.launch import leave
    from olmoscope.evaluate.behaviour import Behaviour
    from olmoscope.evaluate.results import EVALUATION, read_evaluation
    from olmoscope.evaluate.study import study_of

    job = evaluation_job(
        saes, only=only or (), text=text or None, model=model or None, site=site_of(site), bos=bos, out=out,
        tokens=None if tokens == EVALUATED_TOKENS else tokens, dtype=None if dtype == "auto" else dtype,
        batch_tokens=None if batch_tokens == EVALUATED_AT_ONCE else batch_tokens, stability=stability,
        behaviour=Behaviour(probing, probing_sets, probing_data, absorption),
        spelled=lambda name: "--bos/--no-bos" if name == "bos" else f"--{name.replace('_', '-')}")
    if ranks > 1:
        start_here(ranks, "auto" if job.recipe is None else job.recipe.device, SHARED_WORK)
        return
    world = join_quietly()
    done = job.run(world, say)
    leave()
    if not world.ranks.leads:
        return
    figures = [read_evaluation(one.folder / EVALUATION) for one in done.saes]
    if job.recipe is None:
        tables.show_evaluations(figures)
    elif (study := study_of(job.recipe, Path(saes[0]))).seeds and not only:
        show_study(study)
        say(f"A row for each run: `olmoscope study {saes[0]} --runs`.")
    else:
        tables.show_results(job.recipe, Path(saes[0]), only or [])
    show_behaviour(figures)
    say(f"Report: {done.reports[-1]}")


def inspect(
    sae: Annotated[str, typer.Argument(metavar="ADDRESS", help=(
        "An SAE: a run's folder, another tool's folder or file, OWNER/NAME:PATH or OWNER/NAME@REVISION:PATH on the "
        "hub, or saelens:RELEASE/ID."))],
    site: SiteOption = None,
) -> None:
    """Show what an SAE is and how it will be read, without loading or downloading its weights.

    `saelens:` alone shows how much of SAELens' registry Olmoscope can open; `saelens:RELEASE` lists the SAEs of a
    release.
    """
    from olmoscope.cli.inspect_tables import show_coverage, show_reading, show_set
    from olmoscope.sae.io.coverage import coverage
    from olmoscope.sae.io.open import find_saes, look_at
    from olmoscope.sae.io.registry import PREFIX, in_release

    if sae == PREFIX:
        show_coverage(coverage())
        return
    if sae.startswith(PREFIX) and "/" not in sae:
        show_set(sae, in_release(sae))
        return
    found = find_saes(sae)
    if len(found) > 1:
        show_set(sae, found, site_of(site))
        return
    show_reading(*look_at(found[0], site_of(site)))


def audit(
    saes: Annotated[list[str], typer.Argument(metavar="SAE...", help="The SAEs, as for `evaluate`.")],
    text: Annotated[str | None, typer.Option(help="The text, as for `evaluate`.")] = None,
    model: Annotated[str | None, typer.Option(help=(
        "The language model, if the SAEs do not name it; or the path of a copy of it."))] = None,
    site: SiteOption = None,
    tokens: Annotated[int, typer.Option(min=2, help="The most tokens of the text to use.")] = AUDITED_TOKENS,
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], typer.Option(help=(
        "The language model's data type; auto: bfloat16 if the hardware supports it, else float32."))] = "auto",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one pass of the model.")] = AUDITED_AT_ONCE,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help=(
        "Whether sequences begin with BOS, if the SAEs do not say; by default the tokenizer decides."))] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help=(
        "Folder in which to keep the tokens of the text."))] = Path("evaluation"),
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check whether SAEs do what their files say; if not, say what is likely to be wrong: hook, scale, activation rule,
    orientation of a matrix."""
    import json
    from dataclasses import asdict

    from olmoscope.cli.audit_tables import show_audits
    from olmoscope.evaluate.anywhere import Options
    from olmoscope.evaluate.audit import audit as audit_saes

    found = audit_saes(saes, Options(out, text, tokens, model, dtype, site_of(site), batch_tokens, bos))
    if as_json:
        print(json.dumps([asdict(one) for one in found], ensure_ascii=False, indent=1))
    else:
        show_audits(found)


def study(out: OutArgument, runs: Annotated[bool, typer.Option(
        "--runs", help="Also show a row for each run.")] = False) -> None:
    """Compare the evaluated runs of a recipe by setting: mean and spread over seeds, and which settings are best."""
    from olmoscope.cli import tables
    from olmoscope.cli.study_tables import show_study
    from olmoscope.evaluate.study import STUDY, study_of
    from olmoscope.pipeline import report_saes
    from olmoscope.recipe.load import find_recipe

    recipe, folder = find_recipe(out)
    found = study_of(recipe, folder)
    if not found.compares:
        raise UserError(f"{out}: its evaluated runs have one setting and one seed per site, so there is nothing to "
                        "compare; give a key of an SAE in the recipe a list of values, such as train: {seed: [0, 1, "
                        "2]}")
    if runs:
        tables.show_results(recipe, folder, [run.id for setting in found.settings for run in setting.runs])
    show_study(found)
    report = report_saes(recipe, folder)[-1]
    say(f"Figures: {folder / STUDY}")
    say(f"Report: {report}")


def index(
    sae: Annotated[str, typer.Argument(metavar="SAE", help=(
        "A run's folder; an output folder, for all its SAEs; or another tool's SAE (a folder, a file, OWNER/NAME:PATH "
        "on the hub, or saelens:RELEASE/ID)."))],
    store: Annotated[Path | None, typer.Option(
        help="The activation store to index; by default the training store of the SAE's output folder.")] = None,
    text: Annotated[str | None, typer.Option(
        help="A text for the model to read now, instead of a store: a file or a folder (plain text, or JSON lines or "
             "Parquet with texts or chats), or a hub dataset (OWNER/NAME).")] = None,
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="Folder for the index; by default `index` in the run's folder.")] = None,
    model: Annotated[str | None, typer.Option(help=(
        "The language model, if the SAE does not name it; or the path of a copy of it."))] = None,
    site: SiteOption = None,
    tokens: Annotated[int | None, typer.Option(
        min=1, help="With --text: the most tokens to index; by default 1,000,000.")] = None,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help=(
        "With --text: whether sequences begin with BOS, if the SAE does not say; by default the tokenizer "
        "decides."))] = None,
    skip_first: Annotated[int, typer.Option(
        min=0, metavar="N", help="Leave out the first N positions of each sequence.")] = 0,
    skip_special: Annotated[bool, typer.Option(
        "--skip-special", help="Leave out the tokenizer's special tokens.")] = False,
    max_norm: Annotated[float | None, typer.Option(
        metavar="X", help="Leave out rows whose norm is over X times the median at any site of the store.")] = None,
    ranks: RanksOption = 1,
) -> None:
    """Index what each feature of an SAE fires on, for `olmoscope browse`."""
    from olmoscope import api
    from olmoscope.cli.processes import SHARED_WORK, join_quietly, start_here
    from olmoscope.distributed.launch import leave

    if ranks > 1:
        start_here(ranks, "auto", SHARED_WORK)
        return
    world = join_quietly()
    done = api.index(sae, store=store, text=text, out=out, model=model, site=site_of(site), tokens=tokens,
                     bos=bos, skip_first=skip_first, skip_special=skip_special, max_norm=max_norm)
    leave()
    for indexed in done if world.ranks.leads else ():
        info = indexed.info
        say(f"{indexed.folder}: {info.sae.d_sae:,} features ({info.dead:,} never fire), {info.rows:,} rows, "
                   f"{info.firings:,} firings {written(indexed.fresh)}")
    if world.ranks.leads:
        say(f"Look at it with `olmoscope browse {out or sae}`.")


def browse(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A feature index, or a folder that contains some.")],
    model: Annotated[str | None, typer.Option("--model", help=(
        "The language model for prompts and steering, if it is no longer where the index says: a hub id, a folder, or "
        "tiny."))] = None,
    port: Annotated[int | None, typer.Option("--port", min=0, max=65535, help=(
        "The port to serve on; by default 8100, or a free one if that is taken."))] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Print the address, but do not open a browser.")] = False,
    export: Annotated[Path | None, typer.Option("--export", metavar="SITE", help=(
        "Instead, write the page to this folder as static files for a web host, without prompts and "
        "steering."))] = None,
) -> None:
    """Open a page of features in the browser: read, search and label them, try prompts, steer the model."""
    from olmoscope.browse.serve import require_extra, serve

    require_extra()
    if export is None:
        serve(folder, model, port, open_browser=not no_open)
        return
    from olmoscope.browse.collection import open_collection
    from olmoscope.browse.export import export_site

    if model is not None or port is not None:
        raise UserError("--export writes static files and starts no server: leave out --model and --port")
    site = export_site(open_collection(folder, None), export)
    say(f"{site.folder}: {site.features} features, {site.bytes / 1e6:.1f} MB, {site.bytes / site.features:.0f} "
               f"bytes a feature. See it with `python -m http.server -d {site.folder}`.")
