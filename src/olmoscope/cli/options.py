"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from olmoscope.site import Site

RecipeArgument = Annotated[str, typer.Argument(
    metavar="RECIPE", help=(
        "A YAML file, a recipe of the package (tiny, smollm2, olmo3-7b-think), or an output folder."))]
FormOption = Annotated[str | None, typer.Option("--form", help="A form of the recipe, e.g. reference.")]
SetOption = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE", help="Change a key: train.lr=1e-3.")]
OutOption = Annotated[Path | None, typer.Option(
    "--out", "-o", help="Output folder; by default named after the recipe, or the one given as RECIPE.")]
OnlyOption = Annotated[list[str] | None, typer.Option("--only", metavar="SAE", help="Only this SAE, by its id.")]
WorkerOption = Annotated[str | None, typer.Option(
    "--worker", metavar="I/N", help="Make only share I of N (I from 0); by default as torchrun or srun sets it.")]
RanksOption = Annotated[int, typer.Option("--ranks", metavar="N", min=1, help=(
    "In N processes on this machine, each with a GPU of its own, or a share of the threads."))]
SiteOption = Annotated[str | None, typer.Option("--site", "--layer", metavar="SITE", help=(
    "The site that the SAE reads, if it does not say: layers.7, layers.7.mlp.out, ...; a number means a layer's "
    "output."))]
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
    return "written" if fresh else "there already, unchanged"
