"""Commands for sharing SAEs: export, release, pull, validate, import-checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from olmoscope.cli.options import OnlyOption, OutArgument, SiteOption, site_of, written
from olmoscope.errors import UserError
from olmoscope.terminal import say

if TYPE_CHECKING:
    from olmoscope.release.convert import Converted


def export(
    out: Annotated[str, typer.Argument(metavar="OUT|SAE|INDEX", help=(
        "An output folder. With --folder: any SAE, or a feature index if --to needs one."))],
    only: OnlyOption = None,
    to: Annotated[str, typer.Option("--to", help=(
        "The format: saelens, sparsify, dictionary-learning, circuit-tracer (transcoders, or an index for its feature "
        "pages); from an index: delphi, neuronpedia, documents (a matrix of documents by features), labels (a "
        "table)."))] = "saelens",
    folder: Annotated[Path | None, typer.Option("--folder", help=(
        "Folder for one SAE or index; by default `sae` (SAELens) or `export` in each run's folder."))] = None,
    site: SiteOption = None,
    called: Annotated[str | None, typer.Option("--called", metavar="MODEL/SET", help=(
        "Neuronpedia's names for the model and the set of SAEs; by default made from the names here."))] = None,
    window: Annotated[int | None, typer.Option("--window", help=(
        "Length of Delphi's windows in tokens, a multiple of 32; by default 32, which loses the least."))] = None,
) -> None:
    """Write trained SAEs in SAELens format, into the folder `sae` of each run; or any SAE in another tool's format."""
    from olmoscope.pipeline import chosen
    from olmoscope.recipe.load import find_recipe
    from olmoscope.release.convert import (
        CIRCUIT_TRACER,
        OF_INDEX,
        Choices,
        convert,
        convert_set,
        refuse_unknown,
    )
    from olmoscope.release.export import export_run
    from olmoscope.train.run import run_folder

    choices = Choices(called, window)
    choices.refuse_unused(to)
    if folder is not None:
        _say_converted(convert(out, to, folder, site_of(site), choices), to)
        return
    if site is not None:
        raise UserError("--site is for one SAE: give --folder as well")
    refuse_unknown(to)
    if not (Path(out) / "recipe.yaml").is_file():
        raise UserError(f"{out} is not an output folder: it has no recipe.yaml; give one, or --folder as well to write "
                        "a single SAE or index there")
    recipe, _ = find_recipe(out)
    saes = chosen(recipe, only or [])
    if to == CIRCUIT_TRACER:
        made = convert_set([str(run_folder(Path(out), sae)) for sae in saes], Path(out) / "export" / to)
        _say_converted(made, to)
        return
    for sae in saes:
        run = run_folder(Path(out), sae)
        if to == "saelens":
            exported = export_run(run)
            say(f"{sae.id}: {exported.folder} {written(exported.written)}")
        else:
            made = convert(run / "index" if to in OF_INDEX else run, to, run / "export" / to, choices=choices)
            _say_converted(made, to)


def _say_converted(made: "Converted", tool: str) -> None:
    say(f"{made.folder}: written for {tool}")
    if made.note:
        say(f"note: {made.note}")


def release(
    out: OutArgument,
    push: Annotated[str | None, typer.Option("--push", metavar="OWNER/NAME", help=(
        "Upload it to this hub repository, check every file there, and tag the commit."))] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: only list what it would send.")] = False,
    tag: Annotated[str | None, typer.Option("--tag", help=(
        "With --push: the tag; by default named after the manifest's checksum."))] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: make a new repository private.")] = False,
    check: Annotated[str | None, typer.Option("--check", metavar="OWNER/NAME[@REVISION]", help=(
        "Compare it with this hub repository, by checksum; exits with 1 if a file differs."))] = None,
) -> None:
    """Gather all SAEs of a recipe into a release folder: weights, figures, checksums, model card."""
    from olmoscope.cli.release_tables import show_comparison
    from olmoscope.pipeline import release_saes
    from olmoscope.release.announce import write_announcements
    from olmoscope.release.manifest import read_manifest
    from olmoscope.release.on_hub import compare, local_paths, repo_and_revision
    from olmoscope.release.push import checked_tag
    from olmoscope.release.push import push as upload

    if push is not None and check is not None:
        raise UserError("--push already checks what it sent: leave out --check")
    for option, given in (("--dry-run", dry_run), ("--tag", tag), ("--private", private)):
        if given and push is None:
            raise UserError(f"{option} is for an upload: give --push OWNER/NAME as well")
    address = push or check
    repo, revision = (None, None) if address is None else repo_and_revision(address)
    if push is not None and revision is not None:
        raise UserError(f"an upload goes to the main branch: give --push {repo}, and --tag {revision} to name it")
    if tag is not None:
        checked_tag(tag)
    built = release_saes(out, repo)
    say(f"{built.folder}: {len(built.saes)} SAEs {written(built.written)}")
    if push is not None and (paths := local_paths(built.folder)):
        say(f"note: anyone who reads the release sees these paths of this machine: {', '.join(paths)}. If one of them "
            "is the language model, others must name the model themselves (--model)")
    if repo is None:
        say(f"Check it with `olmoscope validate {out}`; upload it with `olmoscope release {out} --push OWNER/NAME`.")
    elif push is None or dry_run:
        compared = compare(built.folder, read_manifest(built.folder), repo, revision)
        show_comparison(compared)
        if check is not None and (compared.commit is None or compared.missing):
            raise typer.Exit(1)
    else:
        pushed = upload(built.folder, repo, tag=tag, private=private)
        say(f"{repo}: sent {pushed.uploaded} of {pushed.files} files; all have the same checksums there; "
            f"tag {pushed.tag}, commit {pushed.commit}")
        for path in write_announcements(built.folder, pushed):
            say(f"{path}: written")


def pull(
    address: Annotated[str, typer.Argument(metavar="OWNER/NAME[@REVISION]", help="An Olmoscope release on the hub.")],
    folder: Annotated[Path | None, typer.Argument(metavar="FOLDER", help=(
        "The folder to write; by default NAME in the current folder."))] = None,
    only: OnlyOption = None,
) -> None:
    """Download a release from the hub and check every file by its checksum."""
    from olmoscope.release.on_hub import repo_and_revision
    from olmoscope.release.pull import pull as download

    repo, revision = repo_and_revision(address)
    folder = folder or Path(repo.rpartition("/")[2])
    manifest = download(repo, folder, revision=revision, only=only)
    say(f"{folder}: {len(only or manifest.saes)} of {len(manifest.saes)} SAEs; all files match the manifest")
    say(f"Look at one with `olmoscope inspect {folder / (only[0] if only else manifest.saes[0].id)}`.")


def validate(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help=(
        "A release, the output folder that contains it, or the folder of one SAE."))]) -> None:
    """Load SAEs with SAELens itself and compare its results with ours; exits with 1 if any check fails."""
    from olmoscope.cli.release_tables import show_validation
    from olmoscope.pipeline import validate_folder

    validation = validate_folder(folder)
    show_validation(validation)
    if not validation.passed:
        raise typer.Exit(1)


def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="A torch file of the reference trainer.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write.")],
    model: Annotated[str, typer.Option("--model", help="The language model it was trained on: its hub id.")],
    layer: Annotated[int | None, typer.Option("--layer", help="Its layer, if the checkpoint does not say.")] = None,
    layers_path: Annotated[str, typer.Option(help="The module path of the model's layers.")] = "model.layers",
) -> None:
    """Convert a checkpoint of the reference trainer to a SAELens folder, without executing anything in it."""
    from olmoscope.release.import_checkpoint import import_checkpoint as import_file

    imported = import_file(checkpoint, folder, model_name=model, layer=layer, layers_path=layers_path)
    for note in imported.notes:
        say(f"note: {note}")
    say(f"{imported.folder}: layer {imported.layer}, {imported.d_sae} latents, d_model {imported.d_model}, "
               f"k {imported.k}, normalisation {imported.normalize}; {written(imported.written)}")
