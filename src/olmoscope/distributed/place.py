"""Which of several processes this one is, as the launcher that started it says."""

from collections.abc import Mapping
from dataclasses import dataclass

LAUNCHERS = (("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
             ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
"""srun is known by its step, not by `SLURM_NTASKS`: a batch script that runs one process by hand has that too."""


@dataclass(frozen=True)
class Place:
    """One of `count` processes."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    """Counted on this machine: which CUDA device is its own."""
    launcher: str = ""
    """`torchrun` or `srun`; empty where neither started it."""
    told_by: str = ""
    """The same, with the names of the variables, for messages."""


def place_from_environment(environment: Mapping[str, str]) -> Place:
    """Where torchrun or srun put this process; the only one where neither started it."""
    for launcher, index, count, local in LAUNCHERS:
        if index in environment and count in environment:
            return Place(int(environment[index]), int(environment[count]), int(environment.get(local, 0)), launcher,
                         f"{launcher} ({index}, {count})")
    return Place()
