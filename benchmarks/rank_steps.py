"""Training steps of one rank, timed in parts, for scaling_ranks.py."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from olmoscope.distributed.ranks import Ranks
from olmoscope.kernels.dispatch import kernels_for
from olmoscope.kernels.interface import Kernels
from olmoscope.kernels.prepare import prepare_kernels
from olmoscope.train import sharded_rules
from olmoscope.train.adam import Adam
from olmoscope.train.initialize import initialize, initialize_shard
from olmoscope.train.sharded_step import ShardedStep
from olmoscope.train.shards import Shard, own_shards, shard_bounds
from olmoscope.train.step import Step

sys.path.insert(0, str(Path(__file__).parent))
from peers import batches

ADAM = Adam((0.9, 0.999), 1e-8)
KERNELS = {"encode_topk": "encode", "decode": "decode", "error": "error", "code_gradient": "dz", "residual": "residual",
           "sort_pairs": "update", "update_tied": "update"}
"""Which part each kernel belongs to."""
COLLECTIVES = ("gather", "to_owners", "from_owners")


@dataclass(frozen=True)
class Measured:
    """One step: wall-clock seconds, processor seconds of the process and of its parts, and bytes sent."""

    wall: float
    processor: float
    parts: dict[str, float]
    sent: int = 0


class Parts:
    """Processor time of named parts; the time of an inner part does not count in the outer one. gloo's own threads
    count in the part that waits for them."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.process_time()
        self._inner.append(0.0)
        yield
        took = time.process_time() - started
        self.seconds[name] += took - self._inner.pop()
        self._inner[-1] += took

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **more: Any) -> Any:
            with self.part(name):
                return function(*arguments, **more)

        return run


class TimedRanks(Ranks):
    """Ranks whose collectives are parts."""

    def __init__(self, index: int, count: int, group: dist.ProcessGroup | None, parts: Parts) -> None:
        super().__init__(index, count, group)
        self.parts = parts

    def gather(self, own: Tensor) -> Tensor:
        with self.parts.part("gather"):
            return super().gather(own)

    def to_owners(self, rows_BX: Tensor) -> Tensor:
        with self.parts.part("to_owners"):
            return super().to_owners(rows_BX)

    def from_owners(self, own_PbX: Tensor, rows: int) -> Tensor:
        with self.parts.part("from_owners"):
            return super().from_owners(own_PbX, rows)

    def sums_to_owners(self, parts: Mapping[int, Tensor], has: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        with self.parts.part("to_owners"):
            return super().sums_to_owners(parts, has)

    def copies_from_owners(self, own: Mapping[int, Tensor], has: Sequence[Sequence[int]],
                           rows: int) -> dict[int, Tensor]:
        with self.parts.part("from_owners"):
            return super().copies_from_owners(own, has, rows)


class TimedKernels:
    """The CPU kernels; each is a part."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._kernels = parts, kernels_for(torch.device("cpu"))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernels, name)
        return self._parts.timed(KERNELS[name], found) if name in KERNELS else found


class RankSteps:
    """The steps of one tied SAE on one rank. With one shard, it is the step of a single process."""

    def __init__(self, d_model: int, d_sae: int, k: int, batch: int, shards: int, index: int, count: int,
                 group: dist.ProcessGroup | None, ranks: Ranks | None = None) -> None:
        """`ranks` takes the place of timed ones that exchange rows on one level."""
        prepare_kernels(torch.device("cpu"))
        self.parts = Parts()
        self.ranks = ranks or TimedRanks(index, count, group, self.parts)
        self.rows = batches(d_model, batch, "cpu")
        mean_D = self.rows[0].mean(dim=0)
        kernels = cast(Kernels, TimedKernels(self.parts))
        self.step: Step | ShardedStep
        if shards == 1:
            self.step = Step(initialize(d_model, d_sae, k, "none", mean_D, seed=0), ADAM, kernels=kernels)
        else:
            bounds, shared = shard_bounds(d_sae, shards), initialize(d_model, 0, k, "none", mean_D, seed=0)
            saes = {each: initialize_shard(bounds[each + 1] - bounds[each], each, shared, 0, "")
                    for each in own_shards(shards, self.ranks)}
            self.step = ShardedStep([Shard(each, shards, sae, ADAM, d_sae, kernels=kernels)
                                     for each, sae in saes.items()], ADAM, ranks=self.ranks)

    def __call__(self, number: int) -> list[Measured]:
        """Take `number` steps."""
        select = self.parts.timed("select", sharded_rules.keep_largest)
        with mock.patch.object(sharded_rules, "keep_largest", select):
            return [self._one(each) for each in range(number)]

    def _one(self, number: int) -> Measured:
        self.parts.seconds.clear()
        self.ranks.traffic.clear()
        self.ranks.ask(0)  # all begin at once
        self.ranks.traffic.clear()
        self.parts.seconds.clear()
        wall, processor = time.perf_counter(), time.process_time()
        self.step(self.rows[number % len(self.rows)], 1e-4)
        took = time.process_time() - processor
        wall = time.perf_counter() - wall
        parts = dict(self.parts.seconds)
        return Measured(wall, took, parts | {"other": took - sum(parts.values())}, self.ranks.traffic.total())

    @staticmethod
    def products(d_model: int, latents: int, batch: int, number: int) -> list[Measured]:
        """The product and its top k for `latents` latents, computed by one rank alone, `number` times."""
        kernels = kernels_for(torch.device("cpu"))
        x_BD = batches(d_model, batch, "cpu")[0]
        sae = initialize(d_model, latents, 32, "none", x_BD.mean(dim=0), seed=0)
        found = []
        for _ in range(number):
            wall, processor = time.perf_counter(), time.process_time()
            kernels.encode_topk(x_BD, sae.W_enc, sae.b_latent, 32)
            found.append(Measured(time.perf_counter() - wall, time.process_time() - processor, {}))
        return found
