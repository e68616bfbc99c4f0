"""Commands about what is given to others: export, release, validate, import-checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from olmoscope.cli.options import OnlyOption, OutArgument, written
from olmoscope.terminal import say


def export(out: OutArgument, only: OnlyOption = None) -> None:
    """Write trained SAEs in SAELens format, into the folder `sae` of each run."""
    from olmoscope.pipeline import chosen
    from olmoscope.recipe.load import find_recipe
    from olmoscope.release.export import export_run
    from olmoscope.train.run import run_folder

    recipe, _ = find_recipe(out)
    for sae in chosen(recipe, only or []):
        exported = export_run(run_folder(out, sae))
        say(f"{sae.id}: {exported.folder} {written(exported.written)}")


def release(out: OutArgument) -> None:
    """Gather all SAEs of a recipe into a release folder: weights, figures, checksums, model card."""
    from olmoscope.release.build import build_release

    built = build_release(out)
    say(f"{built.folder}: {len(built.saes)} SAEs {written(built.written)}")
    say(f"Check it with `olmoscope validate {out}`; upload it with `hf upload REPO_ID {built.folder}`.")


def validate(folder: Annotated[Path, typer.Argument(help="A release, the output folder it is in, or one SAE's folder.")]
             ) -> None:
    """Load SAEs with the real SAELens and compare with ours; exits with 1 if any check fails."""
    from olmoscope.cli import tables
    from olmoscope.pipeline import validate_folder

    validation = validate_folder(folder)
    tables.show_validation(validation)
    if not validation.passed:
        raise typer.Exit(1)


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
               f"k {imported.k}, normalisation {imported.normalize}; {written(imported.written)}")
