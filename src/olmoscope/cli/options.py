"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from olmoscope.site import Site

RecipeArgument = Annotated[str, typer.Argument(
    metavar="RECIPE", help=(
        "A YAML file, a recipe in the package (tiny, smollm2, olmo3-7b-think), or an output folder."))]
FormOption = Annotated[str | None, typer.Option("--form", help="Use this form of the recipe, such as reference.")]
SetOption = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE", help="Change a key, such as train.lr=1e-3. Repeatable.")]
OutOption = Annotated[Path | None, typer.Option(
    "--out", "-o", help="Output folder; by default named after the recipe, or the one given as RECIPE.")]
OnlyOption = Annotated[list[str] | None, typer.Option("--only", metavar="SAE", help=(
    "Only the SAE with this id. Repeatable."))]
WorkerOption = Annotated[str | None, typer.Option(
    "--worker", metavar="I/N", help="Make only share I of N (I from 0); by default what torchrun or srun sets.")]
RanksOption = Annotated[int, typer.Option("--ranks", metavar="N", min=1, help=(
    "Run N processes on this machine, each with its own GPU or a share of the CPU threads."))]
SiteOption = Annotated[str | None, typer.Option("--site", "--layer", metavar="SITE", help=(
    "The site that the SAE reads, if its files do not say: layers.7, layers.7.mlp.out, ...; a number means the output "
    "of that layer."))]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The output folder of a recipe.")]


def site_of(text: str | None) -> "Site | None":
    """The site that `--site` names.

    Raises:
        UserError: it does not name a site.
    """
    from olmoscope.site import Site

    return None if text is None else Site.parse(int(text) if text.isdecimal() else text)


def written(fresh: bool) -> str:
    """What a command says about a file that it should make."""
    return "written" if fresh else "already there, unchanged"
