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
        "An output folder (its SAEs, on its held-out text); or any number of SAEs to compare: a run's folder, "
        "another tool's SAE (a folder, a file, OWNER/NAME:PATH on the hub, saelens:RELEASE/ID), a release, output "
        "folders."))],
    only: OnlyOption = None,
    text: Annotated[str | None, typer.Option(help=(
        "A file, a folder (plain text; JSON lines or parquet of texts or chats), a hub dataset (OWNER/NAME), or an "
        "output folder: its held-out text, and the default where an SAE lies in one."))] = None,
    model: Annotated[str | None, typer.Option(help=(
        "The language model, if the SAEs do not say which, or where a copy of it is."))] = None,
    site: SiteOption = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text, at most.")] = EVALUATED_TOKENS,
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], typer.Option(
        help="Of the language model; auto: bfloat16 where the hardware has it, else float32.")] = "auto",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one pass of the model.")] = EVALUATED_AT_ONCE,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help=(
        "Whether sequences begin with BOS, if the SAEs do not say; by default as the tokenizer does."))] = None,
    probing: Annotated[bool, typer.Option("--probing", help=(
        "Also sparse probing: how well 1, 5 and 16 latents tell labelled texts apart."))] = False,
    probing_sets: Annotated[str | None, typer.Option(metavar="N|NAME,...|all", help=(
        "How many of the labelled tables of short texts, or which tables; by default 12."))] = None,
    probing_data: Annotated[Path | None, typer.Option(metavar="DIR", help=(
        "Labelled tables (CSV: prompt, target); by default those of the package sae-probes."))] = None,
    absorption: Annotated[bool, typer.Option("--absorption", help=(
        "Also feature absorption: on how many words other latents stand for the first letter."))] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the results of SAEs from anywhere go.")] = None,
    stability: Annotated[bool, typer.Option("--stability", help=(
        "Also compare the latents of an output folder's SAEs that differ in the seed alone."))] = False,
    ranks: RanksOption = 1,
) -> None:
    """Measure SAEs: how well they reconstruct, and what the language model makes of it."""
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
        "An SAE: a run, another tool's folder or file, OWNER/NAME[@REVISION][:PATH] on the hub, "
        "saelens:RELEASE/ID."))],
    site: SiteOption = None,
) -> None:
    """Show what an SAE is and how it will be read, without loading or downloading its weights.

    `saelens:` alone shows how much of SAELens' registry can be opened; `saelens:RELEASE` lists a release.
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
    saes: Annotated[list[str], typer.Argument(metavar="SAE...", help="As for `evaluate` and `inspect`.")],
    text: Annotated[str | None, typer.Option(help="As for `evaluate`.")] = None,
    model: Annotated[str | None, typer.Option(help=(
        "The language model, if the SAEs do not say which, or where a copy of it is."))] = None,
    site: SiteOption = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text, at most.")] = AUDITED_TOKENS,
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], typer.Option(
        help="Of the language model; auto: bfloat16 where the hardware has it, else float32.")] = "auto",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one pass of the model.")] = AUDITED_AT_ONCE,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help=(
        "Whether sequences begin with BOS, if the SAEs do not say; by default as the tokenizer does."))] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the tokens of a text are kept.")] = Path("evaluation"),
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say whether SAEs do what their files say, and what is likely to be wrong: hook, scale, rule, orientation."""
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
        "--runs", help="Also a row for each run.")] = False) -> None:
    """Compare the evaluated runs of a recipe by setting: mean and spread over seeds, and which settings none beats."""
    from olmoscope.cli import tables
    from olmoscope.cli.study_tables import show_study
    from olmoscope.evaluate.study import STUDY, study_of
    from olmoscope.pipeline import report_saes
    from olmoscope.recipe.load import find_recipe

    recipe, folder = find_recipe(out)
    found = study_of(recipe, folder)
    if not found.compares:
        raise UserError(f"{out}: its evaluated runs are of one setting and one seed a site, so there is nothing to "
                        "compare; give an SAE of the recipe a list, such as train: {seed: [0, 1, 2]}")
    if runs:
        tables.show_results(recipe, folder, [run.id for setting in found.settings for run in setting.runs])
    show_study(found)
    report = report_saes(recipe, folder)[-1]
    say(f"Figures: {folder / STUDY}")
    say(f"Report: {report}")


def index(
    sae: Annotated[str, typer.Argument(help=(
        "A run's folder or another tool's SAE: a folder, a file, OWNER/NAME:PATH on the hub, saelens:RELEASE/ID; an "
        "output folder: all its SAEs."))],
    store: Annotated[Path | None, typer.Option(
        help="The activation store to index; by default the training store of the SAE's output folder.")] = None,
    text: Annotated[str | None, typer.Option(
        help="A file, a folder (plain text; JSON lines or parquet of texts or chats) or a hub dataset (OWNER/NAME) "
             "that the model reads now, in place of a store.")] = None,
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="The index's folder; by default `index` in the run's.")] = None,
    model: Annotated[str | None, typer.Option(help=(
        "The language model, if the SAE does not say which, or where a copy of it is."))] = None,
    site: SiteOption = None,
    tokens: Annotated[int | None, typer.Option(
        min=1, help="Tokens of a text, at most; by default a million.")] = None,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help=(
        "Whether sequences of a text begin with BOS, if the SAE does not say; by default as the tokenizer "
        "does."))] = None,
    skip_first: Annotated[int, typer.Option(
        min=0, metavar="N", help="Leave out the first N positions of each sequence.")] = 0,
    skip_special: Annotated[bool, typer.Option(
        "--skip-special", help="Leave out tokens that the tokenizer calls special.")] = False,
    max_norm: Annotated[float | None, typer.Option(
        metavar="X", help="Leave out rows whose norm is over X times the median, at any site of the store.")] = None,
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
