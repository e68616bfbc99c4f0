"""Which of several processes this one is, according to the launcher that started it."""

from collections.abc import Mapping
from dataclasses import dataclass

LAUNCHERS = (("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
             ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
"""For each launcher, the variables with a process's index, the number of processes, and the index on its machine.
`SLURM_NTASKS` would not do for srun: a batch script that runs one process without srun has it too."""


@dataclass(frozen=True)
class Place:
    """One of `count` processes."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    """Its index among the processes on this machine, which is the number of its CUDA device."""
    launcher: str = ""
    """`torchrun` or `srun`; empty if neither started it."""
    told_by: str = ""
    """The launcher with the names of its variables, for messages."""


def place_from_environment(environment: Mapping[str, str]) -> Place:
    """The place that torchrun or srun gave this process; the only process if neither started it."""
    for launcher, index, count, local in LAUNCHERS:
        if index in environment and count in environment:
            return Place(int(environment[index]), int(environment[count]), int(environment.get(local, 0)), launcher,
                         f"{launcher} ({index}, {count})")
    return Place()
