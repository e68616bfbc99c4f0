"""What a rank holds of an SAE that several train together: resident memory, beside the state that it should hold.

    python benchmarks/rank_memory.py [--latents F --d-model D --batch B --k K --shards V] [--json FILE]

A tied SAE in V shards on one, two and four ranks over gloo; the state is W and Adam's two moments, 12 F D / P bytes of
float32 on each of P ranks. Each rank takes two steps, by Adam on all rows, so that every page of it was written, and
gives back to the system what is free. What it then has more than before the SAE was made is `held`; `peak` is the most
that it had at any moment, the drawing of the first rows included.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import olmoscope  # noqa: F401  (sets the threads, so it comes before torch)

# isort: split
import torch
import torch.distributed as dist

from olmoscope.provenance import provenance

sys.path.insert(0, str(Path(__file__).parent))
from common import hardware
from rank_steps import RankSteps

COUNTS = (1, 2, 4)
BAR = 0.1
"""Held bytes may be so far off the state, as a share of it."""


@dataclass(frozen=True)
class Size:
    """What is trained."""

    d_model: int
    latents: int
    k: int
    batch: int
    shards: int

    def state(self, ranks: int) -> float:
        """Bytes of the state on each of some ranks."""
        return 12 * self.latents * self.d_model / ranks


def resident(peak: bool = False) -> int:
    """Bytes of this process's own memory that are resident; or the most that all of it was."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM" if peak else "RssAnon"].split()[0]) * 1024


def held(size: Size, index: int, count: int, group: dist.ProcessGroup | None) -> int:
    """Bytes that a rank has more with its shards than without."""
    def steps(latents: int, number: int) -> RankSteps:
        made = RankSteps(size.d_model, latents, size.k, size.batch, size.shards, index, count, group)
        made(number)
        return made

    steps(64 * size.shards, 1)  # what libraries keep, whatever the SAE's size is
    before = resident()
    made = steps(size.latents, 2)
    after = resident()
    del made
    return after - before


def serve(index: int, count: int, size: Size, rendezvous: Path, pipe: Connection) -> None:
    """A rank, in a process of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=count)
    found = held(size, index, count, dist.group.WORLD if count > 1 else None)
    pipe.send((found, resident(peak=True)))


def measure(size: Size, count: int) -> list[tuple[int, int]]:
    """Held bytes and the peak of each of some ranks."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(count)]
        processes = [context.Process(target=serve, args=(index, count, size, Path(folder) / "rendezvous", theirs))
                     for index, (_, theirs) in enumerate(pipes)]
        for process in processes:
            process.start()
        found = [mine.recv() for mine, _ in pipes]
        for process in processes:
            process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("latents", 262_144), ("d-model", 256), ("batch", 512), ("k", 32), ("shards", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there")
    arguments = parser.parse_args()
    size = Size(arguments.d_model, arguments.latents, arguments.k, arguments.batch, arguments.shards)
    os.environ["OMP_NUM_THREADS"] = "1"
    found = {count: measure(size, count) for count in COUNTS if size.shards % count == 0}
    met = True
    for count, ranks in found.items():
        state, most = size.state(count), max(bytes_ for bytes_, _ in ranks)
        off = max(abs(bytes_ / state - 1) for bytes_, _ in ranks)
        met &= off <= BAR
        each = ", ".join(f"{bytes_ / 1e6:.0f}" for bytes_, _ in ranks)
        print(f"{count} ranks: state {state / 1e6:.0f} MB; held {each} MB, {most / state - 1:+.1%}; peak "
              f"{max(peak for _, peak in ranks) / 1e6:.0f} MB; off by at most {BAR:.0%}: "
              f"{'met' if off <= BAR else 'NOT MET'}")
    if arguments.json:
        arguments.json.write_text(json.dumps(
            {"benchmark": "rank_memory", "date": time.strftime("%Y-%m-%d"), "hardware": hardware("cpu"),
             "provenance": provenance(), "size": vars(size), "met": met,
             "ranks": {count: [{"held": bytes_, "peak": peak} for bytes_, peak in ranks]
                       for count, ranks in found.items()}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
