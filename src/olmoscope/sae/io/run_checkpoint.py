"""A checkpoint that a finished run of ours keeps (`train.checkpoints`): the SAE as it was after so many steps.

    RUN/checkpoints/step-00001000.safetensors
"""

from dataclasses import replace
from pathlib import Path

from olmoscope.sae.io.checkpoint import step_of
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.run_folder import opened, read_run_folder
from olmoscope.site import Site

NAME = "a checkpoint of a run"
MARK = "checkpoints/step-N.safetensors"
SEARCH: str | None = None
HUB_FILES: tuple[str, ...] = ()


def detect(path: Path) -> bool:
    """Whether it is a file that is called as a checkpoint is."""
    return path.is_file() and path.parent.name == "checkpoints" and path.suffix == ".safetensors"


def read(path: Path, site: Site | None = None) -> Opened:
    """Read the SAE of a checkpoint. It is called `RUN@STEP`.

    Args:
        site: refused if it is not the run's.

    Raises:
        UserError: the run is not finished, or see `run_folder.read`.
    """
    step = step_of(path)
    of_run = opened(read_run_folder(path.parents[1]), site, path)
    return replace(of_run, name=f"{of_run.name}@{step}", identity=f"{of_run.identity}@{step}", step=step)
