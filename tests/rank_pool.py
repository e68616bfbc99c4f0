"""Real ranks for tests: forked processes with everything imported, joined over gloo, that run functions together.

A forkserver imports torch and the trainer once; then each pool starts in about a second.
"""

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from olmoscope.kernels.prepare import prepare_kernels

MOST = 4
IMPORTED = ["torch.distributed", "olmoscope.train.group", "olmoscope.kernels.cpu", "olmoscope.distributed.launch"]
PATIENCE = 120
"""Seconds after which a test that hangs fails."""


class RankPool:
    """Up to `MOST` ranks; `run` lets the first `count` of them work together."""

    def __init__(self, folder: Path, most: int = MOST) -> None:
        prepare_kernels(torch.device("cpu"))  # ranks that compile kernels themselves would not all run the same code
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        pipes = [context.Pipe() for _ in range(most)]
        self.processes = [context.Process(target=_serve, args=(index, most, folder / "store", theirs, sys.path),
                                          daemon=True) for index, (_, theirs) in enumerate(pipes)]
        self._pipes = [mine for mine, _ in pipes]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, count: int, function: Callable[..., Any], *arguments: Any, nodes: int = 1,
            flat: bool = False) -> list[Any]:
        """Run `function(ranks, *arguments)` on each of `count` ranks; returns what each returned or raised.

        Args:
            nodes: how many machines the ranks pretend to be on.
            flat: whether they exchange rows on one level nevertheless.
        """
        for pipe in self._pipes[:count]:
            pipe.send((count, nodes, flat, function, arguments))
        return [_answer(pipe) for pipe in self._pipes[:count]]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _answer(pipe: Connection) -> Any:
    assert pipe.poll(PATIENCE), "a rank hangs"
    try:
        return pipe.recv()
    except EOFError:
        return None  # it was killed


def _serve(index: int, most: int, store: Path, pipe: Connection, path: list[str]) -> None:
    import torch.distributed as dist

    from olmoscope.distributed.nodes import NodeRanks
    from olmoscope.distributed.ranks import Ranks

    sys.path[:] = path
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=most)
    groups = {count: dist.new_group(list(range(count))) for count in range(1, most + 1)}
    of_local = [dist.new_group(list(range(local, most, 2))) for local in range(2)]
    of_node = [dist.new_group([first, first + 1]) for first in range(0, most - 1, 2)]
    while True:
        count, nodes, flat, function, arguments = pipe.recv()
        if nodes == 1 or flat:
            ranks = Ranks(index, count, groups[count], count // nodes)
        else:  # two ranks on each of two nodes
            ranks = NodeRanks(Ranks(index % 2, 2, of_node[index // 2]), Ranks(index // 2, 2, of_local[index % 2]))
        try:
            pipe.send(function(ranks, *arguments))
        except Exception as error:  # noqa: BLE001 (the test judges it)
            pipe.send(error)
