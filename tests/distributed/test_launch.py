"""A process's place, as torchrun or srun states it; joining by srun's variables; teams."""

import multiprocessing
import os

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from olmoscope.distributed.launch import World, first_node, join, join_team, leave, start
from olmoscope.distributed.nodes import NodeRanks
from olmoscope.distributed.place import Place, place_from_environment
from olmoscope.distributed.ranks import Ranks
from olmoscope.errors import UserError
from rank_pool import IMPORTED

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(("environment", "place"), [
    ({}, Place()), ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, Place()),
    (TORCHRUN, Place(5, 8, 1, "torchrun", "torchrun (RANK, WORLD_SIZE)")),
    (SRUN, Place(3, 4, 1, "srun", "srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS)")),
    (SRUN | TORCHRUN, Place(5, 8, 1, "torchrun", "torchrun (RANK, WORLD_SIZE)"))])
def test_a_place_is_what_the_launcher_says(environment, place):
    assert place_from_environment(environment) == place


@pytest.mark.parametrize(("nodes", "first"), [
    ("gpu003", "gpu003"), ("gpu[003-006,9],login1", "gpu003"), ("gpu[12,15]", "gpu12"), ("a-1,b-2", "a-1"),
    ("localhost", "localhost")])
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_joins_nobody(environment):
    world = join(environment)
    assert (world.ranks.count, world.place) == (1, Place())
    assert join_team(world.ranks, 4, torch.device("cpu")).ranks.count == 1
    assert World().ranks.leads


def task(index, pipe, environment, of_node):
    os.environ.update(environment | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index % of_node)})
    world = join()
    again = join()  # a program may train twice
    teams = [join_team(world.ranks, shards, torch.device("cpu")) for shards in (2, 1)]
    pipe.send((world.place.launcher, again.ranks.index, world.ranks.ask(10 + index), os.environ["MASTER_ADDR"],
               [(team.number, team.teams, team.ranks.index, team.ranks.count) for team in teams],
               teams[0].ranks.ask(index)))
    everyone = join_team(world.ranks, 4, torch.device("cpu")).ranks
    pipe.send((type(everyone), everyone.node, everyone.index, everyone.ask(index)))
    leave()


@pytest.mark.parametrize(("of_node", "ranks"), [(4, Ranks), (2, NodeRanks)])
def test_tasks_of_srun_meet(of_node, ranks):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    mine, theirs = zip(*(context.Pipe() for _ in range(4)), strict=True)
    environment = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "localhost",
                   "SLURM_JOB_ID": str(os.getpid()), "OMP_NUM_THREADS": "1"}
    tasks = [context.Process(target=task, args=(index, theirs[index], environment, of_node), daemon=True)
             for index in range(4)]
    for each in tasks:
        each.start()
    for index, pipe in enumerate(mine):
        assert pipe.poll(60)
        teams = [(index // 2, 2, index % 2, 2), (index, 4, 0, 1)]
        partners = [0, 1] if index < 2 else [2, 3]
        assert pipe.recv() == ("srun", index, [10, 11, 12, 13], "localhost", teams, partners)
        assert pipe.poll(60)
        assert pipe.recv() == (ranks, of_node, index, [0, 1, 2, 3])
    for each in tasks:
        each.join(30)
        assert each.exitcode == 0


@pytest.mark.parametrize(("codes", "said"), [
    ({0: 1, 1: -9}, "rank 1 was killed by SIGKILL"), ({0: -6, 1: -9}, "rank 1 was killed by SIGKILL"),
    ({0: 130, 1: 130}, 130), ({0: -15, 1: 1}, 1), ({1: -15}, "rank 1 was killed by SIGTERM"), ({0: 1, 1: -6}, 1)])
def test_what_a_launcher_says_of_ranks_that_failed(monkeypatch, codes, said):
    def failing(config, program):
        def launch(*arguments):
            raise ChildFailedError("olmoscope", {rank: ProcessFailure(rank, 1, code, "none") for rank, code in
                                                 codes.items()})
        return launch

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", failing)
    for name in ("OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
                 "OLMOSCOPE_RANKS"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(UserError if isinstance(said, str) else SystemExit) as raised:
        start(2, ["train", "x"], "the same command goes on")
    assert str(raised.value).startswith(str(said))
