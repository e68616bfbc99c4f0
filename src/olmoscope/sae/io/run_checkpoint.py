"""A checkpoint that a finished Olmoscope run keeps (`train.checkpoints`): the SAE after a number of steps.

    RUN/checkpoints/step-00001000.safetensors    or the folder RUN/checkpoints/step-00001000, if it is in shards
"""

from dataclasses import replace

from olmoscope.sae.io.checkpoint import step_of
from olmoscope.sae.io.checkpoint_file import is_complete
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Here, Place
from olmoscope.sae.io.reading import Reading
from olmoscope.sae.io.run_folder import opened, read_run_folder, reading
from olmoscope.site import Site

NAME = "a checkpoint of a run"
MARK = "checkpoints/step-N.safetensors"
SEARCH: str | None = None


def detect(place: Place) -> bool:
    """Whether it is a checkpoint on this machine: a file, or a folder of all shards."""
    if not isinstance(place, Here) or place.path.parent.name != "checkpoints":
        return False
    return place.path.suffix == ".safetensors" if place.path.is_file() else is_complete(place.path)


def look(place: Place, site: Site | None = None) -> Reading:
    """How the SAE of a checkpoint is read.

    Raises:
        UserError: see `read`.
    """
    assert isinstance(place, Here)
    step_of(place.path)
    of_run = reading(read_run_folder(place.path.parents[1]), site, place.path)
    return replace(of_run, format=NAME, files=(f"../{of_run.files[0]}", *(f"../{name}" for name in of_run.files[1:])))


def read(place: Place, site: Site | None = None) -> Opened:
    """Read the SAE of a checkpoint. Its name is `RUN@STEP`.

    Args:
        site: must be the run's, if given.

    Raises:
        UserError: the run is not finished, or see `run_folder.read`.
    """
    assert isinstance(place, Here)
    path = place.path
    step = step_of(path)
    of_run = opened(read_run_folder(path.parents[1]), site, path)
    return replace(of_run, name=f"{of_run.name}@{step}", identity=f"{of_run.identity}@{step}", step=step)
