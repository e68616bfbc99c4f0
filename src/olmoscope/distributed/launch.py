"""Start several processes of one command, and join them. torchrun and its library do the work.

    olmoscope train RECIPE --ranks 4                                     `start`
    torchrun --nproc-per-node 4 --no-python -- olmoscope train RECIPE    `join`: RANK, WORLD_SIZE, MASTER_ADDR, ...
    srun olmoscope train RECIPE                                          `join`: from srun's variables

docs/several-gpus.md has the commands for several machines.
"""

import logging
import math
import os
import re
import signal
import sys
import tempfile
import uuid
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from olmoscope.distributed.nodes import NodeRanks, exchanges_on_two_levels, ranks_of_a_node
from olmoscope.distributed.place import Place, place_from_environment
from olmoscope.distributed.ranks import Ranks, is_lost
from olmoscope.distributed.sums import team_size
from olmoscope.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Without this variable, processes that torchrun restarts connect to the TCP store of the dead processes and wait
forever (torch 2.13; see pytorch#135712). torchrun itself must have it in its environment."""

TEAMS_WAIT = timedelta(days=30)
"""How long a rank waits for another. It is long because teams finish at different times and wait for each other at the
end."""
SAVING_SECONDS = 600
"""How many seconds ranks have to save and end when the launcher is told to stop."""
BY_US = "OLMOSCOPE_RANKS"
"""An environment variable of the processes that `start` started: the path of a folder that they share. The folder is
removed when all of them have ended."""
AFTERWARDS = (signal.SIGTERM, signal.SIGABRT)
"""The signals that end the other ranks after one rank was lost: the launcher sends SIGTERM; libraries that wait for an
exchange abort."""


@dataclass(frozen=True)
class World:
    """All processes of a command, and the place of this one. A process that no launcher started is alone."""

    ranks: Ranks = field(default_factory=Ranks.alone)
    place: Place = field(default_factory=Place)


@dataclass(frozen=True)
class Team:
    """Ranks that train the same SAEs: team `number` of `teams`."""

    ranks: Ranks
    number: int = 0
    teams: int = 1


def start(count: int, arguments: Sequence[str], kept: str) -> None:
    """Run `olmoscope ARGUMENTS` in `count` processes on this machine and wait for them. The processes divide the
    threads of this one among themselves.

    Args:
        kept: for the message if a process is killed: what it leaves, and what to do.

    Raises:
        UserError: a process was killed.
        SystemExit: a process ended with an error, which it has reported.
        KeyboardInterrupt: a signal told this process to stop, and it has stopped the others.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):  # they log pages about errors that a rank reports in one line
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ[OWN_STORE] = "1"
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // count))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_SECONDS))
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, max_restarts=0,
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ[BY_US] = folder
            elastic_launch(config, sys.executable)("-m", "olmoscope", *arguments)
    except ChildFailedError as error:
        raise _explained(error, kept) from error
    except SignalException as error:
        raise KeyboardInterrupt from error


def _explained(error: "ChildFailedError", kept: str) -> UserError | SystemExit:
    """The exception to raise when ranks have failed: a rank that failed has reported why, but one that was killed
    could not."""
    codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
    killed = {rank: -code for rank, code in codes.items() if code < 0}
    first = {rank: number for rank, number in killed.items() if number not in AFTERWARDS}
    told = [code for code in codes.values() if code > 0]
    if told and not first:
        return SystemExit(max(told))
    rank, number = next(iter((first or killed).items()))
    return UserError(f"rank {rank} was killed by {signal.Signals(number).name}; {kept}")


def join(environment: MutableMapping[str, str] = os.environ) -> World:
    """Join the other processes that torchrun or srun started. A process that neither of them started is alone.

    Raises:
        UserError: the other processes cannot be reached.
    """
    place = place_from_environment(environment)
    if place.count == 1:
        return World()
    if not dist.is_initialized():
        if place.launcher == "srun":
            _as_torchrun(place, environment)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend)
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise UserError(f"process {place.index} of {place.count} cannot join the others at "
                            f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}; {place.told_by} says "
                            f"that there are others ({str(error).splitlines()[0]})") from error
    group = dist.new_group(backend="gloo", timeout=TEAMS_WAIT)
    node = ranks_of_a_node(Ranks(place.index, place.count, group).ask(place.local_index))
    return World(Ranks(place.index, place.count, group, node), place)


def leave() -> None:
    """Leave the process group, at the end of this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def join_team(world: Ranks, shards: int, device: torch.device) -> Team:
    """The ranks that train SAEs of `shards` shards together with this rank. All ranks must call this, in the same
    order.

    A team on several machines exchanges rows on two levels if `exchanges_on_two_levels` says that it can.
    """
    if world.count == 1:
        return Team(world)
    size = team_size(world.count, shards)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    number, teams = world.index // size, world.count // size
    if exchanges_on_two_levels(size, world.node):
        mesh = init_device_mesh(device.type, (teams, size // world.node, world.node),
                                mesh_dim_names=("team", "nodes", "node"))
        between = Ranks(world.index % size // world.node, size // world.node, mesh.get_group("nodes"))
        return Team(NodeRanks(Ranks(world.index % world.node, world.node, mesh.get_group("node")), between), number,
                    teams)
    mesh = init_device_mesh(device.type, (teams, size), mesh_dim_names=("team", "latents"))
    if size == 1:
        return Team(Ranks.alone(), number, teams)
    return Team(Ranks(world.index % size, size, mesh.get_group("latents"), math.gcd(size, world.node)), number, teams)


def _as_torchrun(place: Place, environment: MutableMapping[str, str]) -> None:
    """Set the variables that torch reads from those that srun sets. The port on the first node is derived from the
    job's number, so that jobs do not collide."""
    environment["RANK"], environment["WORLD_SIZE"] = str(place.index), str(place.count)
    environment["LOCAL_RANK"] = str(place.local_index)
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", "localhost"))
    environment.setdefault("MASTER_ADDR", first_node(nodes))
    job = int(environment.get("SLURM_JOB_ID", 0)) * 10 + int(environment.get("SLURM_STEP_ID", 0))
    environment.setdefault("MASTER_PORT", str(15000 + job % 15000))


def first_node(nodes: str) -> str:
    """The first node of a list in Slurm's notation: `gpu003` for `gpu[003-006,9],login1`."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    return "localhost" if found is None else found[1] + (found[2] or "")
