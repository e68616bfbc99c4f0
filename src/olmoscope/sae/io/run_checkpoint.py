"""A checkpoint that a finished run of ours keeps (`train.checkpoints`): the SAE as it was after so many steps.

    RUN/checkpoints/step-00001000.safetensors    or the folder RUN/checkpoints/step-00001000, if it is in shards
"""

from dataclasses import replace
from pathlib import Path

from olmoscope.sae.io.checkpoint import step_of
from olmoscope.sae.io.checkpoint_file import is_complete
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.run_folder import opened, read_run_folder
from olmoscope.site import Site

NAME = "a checkpoint of a run"
MARK = "checkpoints/step-N.safetensors"
SEARCH: str | None = None
HUB_FILES: tuple[str, ...] = ()


def detect(path: Path) -> bool:
    """Whether it is a file that is called as a checkpoint is, or the folder of a whole one in shards."""
    if path.parent.name != "checkpoints":
        return False
    return path.suffix == ".safetensors" if path.is_file() else is_complete(path)


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
