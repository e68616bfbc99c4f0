"""The cost of a training step whose SAE is shared by several processes: its parts, bytes, and the machine's own effect.

    python benchmarks/scaling_ranks.py [--rounds N] [--batch B --latents F --d-model D --k K] [--json FILE]
    python benchmarks/scaling_ranks.py --project h100x8,h100x64

It runs on CPUs, over gloo, with one thread per rank, each rank pinned to its own core; with as many ranks as there are
cores, in powers of two up to 4. Cases take turns, round after round; it reports medians of all steps. Wall time means
little if cores slow each other down. So each case has the processor time of every rank, and there is a control:
products of half the latents (a quarter, ...) on all cores at once, compared with one alone. The bytes sent are counted
by the ranks, calculated (`cost/ranks.py`), and read from the loopback device. The device also counts what other
programs send; a separate network namespace avoids that:

    unshare -rn sh -c 'ip link set lo up && python benchmarks/scaling_ranks.py'

`--project` prints a projection for GPUs, which `rank_projection.py` derives from the measurement of one GPU.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any

import olmoscope  # noqa: F401  (sets the threads, so it comes before torch)

# isort: split
import torch
import torch.distributed as dist

from olmoscope.cost.ranks import step_traffic
from olmoscope.distributed.ranks import Ranks
from olmoscope.provenance import provenance

sys.path.insert(0, str(Path(__file__).parent))
from common import hardware
from rank_projection import project
from rank_steps import COLLECTIVES, Measured, RankSteps

MOST = 4
STEPS = 3
"""Steps of a case in a round."""
BARS = {"collectives": 0.05, "processor time": 1.15, "bytes": 0.03, "V 8": 1.15, "control": 1.1}


@dataclass(frozen=True)
class Case:
    """One SAE on some ranks; V = 1 is the step of a single process (train/step.py)."""

    ranks: int
    shards: int
    d_sae: int
    scaling: str

    @property
    def name(self) -> str:
        return f"{self.scaling:6} {self.ranks} ranks  V {self.shards}  F {self.d_sae}"


@dataclass(frozen=True)
class Size:
    """The size of the SAE in every case; with weak scaling there are more latents."""

    d_model: int
    latents: int
    k: int
    batch: int


def cases(size: Size, most: int) -> list[Case]:
    """One process with 1, `most` and 8 shards; then more ranks."""
    counts = [count for count in (2, 4) if count <= most]
    strong = [(1, 1), *((1, count) for count in counts), (1, 8), *((count, count) for count in counts),
              *((count, 8) for count in counts)]
    return [*(Case(*one, size.latents, "strong") for one in strong),
            *(Case(count, count, size.latents * count, "weak") for count in counts)]


class Pool:
    """The rank processes."""

    def __init__(self, count: int, size: Size, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(count)]
        cores = sorted(os.sched_getaffinity(0))
        self._processes = [context.Process(target=serve, args=(index, count, cores[index], size, folder / "rendezvous",
                                                               theirs), daemon=True)
                           for index, (_, theirs) in enumerate(pipes)]
        self._pipes = [mine for mine, _ in pipes]
        for process in self._processes:
            process.start()

    def ask(self, count: int, *question: Any) -> list[Any]:
        """The answers of the first `count` ranks, which are all asked at once."""
        for pipe in self._pipes[:count]:
            pipe.send(question)
        return [pipe.recv() for pipe in self._pipes[:count]]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def serve(index: int, count: int, core: int, size: Size, rendezvous: Path, pipe: Connection) -> None:
    """A rank: answers questions with its measurements."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=count)
    groups = {some: dist.new_group(list(range(some))) for some in range(1, count + 1)}
    made: dict[Case, RankSteps] = {}
    while True:
        what, case, number = pipe.recv()
        if what == "product":
            pipe.send(RankSteps.products(size.d_model, case, size.batch, number))
            continue
        if case not in made:
            group = groups[case.ranks] if case.ranks > 1 else None
            made[case] = RankSteps(size.d_model, case.d_sae, size.k, size.batch, case.shards, index, case.ranks, group)
        pipe.send(made[case](number))


def loopback_bytes() -> int:
    """Bytes that the loopback device has sent since the machine started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def control(pool: Pool, count: int, size: Size, rounds: int) -> dict[str, float]:
    """The time of a product of `1 / count` of the latents if all ranks compute one at once, over its time on one rank
    alone; in wall time and in processor time."""
    alone: list[Measured] = []
    together: list[Measured] = []
    for number in range(rounds + 1):
        one = pool.ask(1, "product", size.latents // count, STEPS)[0]
        all_ = [each for answer in pool.ask(count, "product", size.latents // count, STEPS) for each in answer]
        if number:
            alone, together = alone + one, together + all_
    return {clock: median([getattr(one, clock) for one in together]) / median([getattr(one, clock) for one in alone])
            for clock in ("wall", "processor")}


def measure(pool: Pool, wanted: list[Case], size: Size, rounds: int) -> dict[Case, dict[str, Any]]:
    """Measure all cases in turn."""
    seen: dict[Case, list[list[Measured]]] = {case: [[] for _ in range(case.ranks)] for case in wanted}
    looped = dict.fromkeys(wanted, 0)
    for number in range(rounds + 1):  # the first round warms up
        for case in wanted:
            before = loopback_bytes()
            answers = pool.ask(case.ranks, "steps", case, STEPS)
            if number:
                looped[case] += loopback_bytes() - before
                for mine, answer in zip(seen[case], answers, strict=True):
                    mine += answer
    return {case: summary(case, seen[case], looped[case] / (rounds * STEPS), size) for case in wanted}


def summary(case: Case, ranks: list[list[Measured]], looped: float, size: Size) -> dict[str, Any]:
    """The figures of one case, for each step: milliseconds and bytes."""
    names = sorted({name for steps in ranks for one in steps for name in one.parts})
    parts = {name: mean(median([one.parts.get(name, 0.0) for one in steps]) for steps in ranks) * 1e3
             for name in names}
    processor = [median([one.processor for one in steps]) * 1e3 for steps in ranks]
    formula = [step_traffic(size.batch, size.d_model, case.d_sae, size.k, case.shards, Ranks(index, case.ranks)).total
               if case.ranks > 1 else 0 for index in range(case.ranks)]
    counted = [steps[0].sent for steps in ranks]
    return {"wall_ms": max(median([one.wall for one in steps]) for steps in ranks) * 1e3, "processor_ms": processor,
            "parts_ms": parts, "collectives_share": sum(parts.get(name, 0.0) for name in COLLECTIVES) * case.ranks
            / sum(processor), "bytes": counted, "bytes_formula": formula, "loopback_bytes": looped}


def show(found: dict[Case, dict[str, Any]], controls: dict[int, dict[str, float]]) -> None:
    """Print the table and every bar."""
    for count, ratios in controls.items():
        use = "" if ratios["wall"] <= BARS["control"] else f"; over {BARS['control']}: only processor time counts"
        print(f"control: {count} products at once / one alone: wall {ratios['wall']:.2f}, processor "
              f"{ratios['processor']:.2f}{use}")
    for case, one in found.items():
        print(f"\n{case.name}   wall {one['wall_ms']:.0f} ms; processor of each rank "
              + ", ".join(f"{each:.0f}" for each in one["processor_ms"]) + " ms")
        print("   " + "  ".join(f"{name} {value:.1f}" for name, value in one["parts_ms"].items()))
        if case.ranks > 1:
            print(f"   bytes a rank {one['bytes'][0]:,}; formula {one['bytes_formula'][0]:,}; all ranks "
                  f"{sum(one['bytes']):,}; loopback {one['loopback_bytes']:,.0f}")
    print()
    for line in judged(found, controls):
        print(line)


def judged(found: dict[Case, dict[str, Any]], controls: dict[int, dict[str, float]]) -> list[str]:
    """Each bar, and the measured value."""
    def verdict(what: str, seen: float, bar: float) -> str:
        return f"{what}: {seen:.3f}, bar {bar:.2f}: {'met' if seen <= bar else 'NOT MET'}"

    one_process = next(one for case, one in found.items() if case.ranks == case.shards == 1)
    lines = []
    for case, one in found.items():
        if case.ranks == 1 and case.shards == 8:
            lines.append(verdict("V 8 in one process / V 1, processor time",
                                 one["processor_ms"][0] / one_process["processor_ms"][0], BARS["V 8"]))
        if case.ranks == 1:
            continue
        lines.append(verdict(f"{case.name}: collectives / processor time of a rank", one["collectives_share"],
                             BARS["collectives"]))
        if case.scaling == "strong":
            ratio = sum(one["processor_ms"]) / one_process["processor_ms"][0]
            lines.append(verdict(f"{case.name}: processor time of all ranks / one process (V 1), over the control of "
                                 f"processor time (before: {ratio:.2f})",
                                 ratio / controls[case.ranks]["processor"], BARS["processor time"]))
        sent = sum(one["bytes"])
        lines.append(verdict(f"{case.name}: bytes counted, off the formula",
                             abs(sent / sum(one["bytes_formula"]) - 1), BARS["bytes"]))
        lines.append(verdict(f"{case.name}: bytes on the loopback device, off the formula",
                             abs(one["loopback_bytes"] / sum(one["bytes_formula"]) - 1), BARS["bytes"]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    for name, value in (("d-model", 384), ("latents", 12288), ("k", 32), ("batch", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there")
    parser.add_argument("--project", metavar="GPUS", help="print a projection instead: h100x8,h100x64")
    arguments = parser.parse_args()
    if arguments.project:
        print(project(arguments.project.split(",")))
        return
    size = Size(arguments.d_model, arguments.latents, arguments.k, arguments.batch)
    cores = len(os.sched_getaffinity(0))
    most = max(count for count in (1, 2, MOST) if count <= cores)
    os.environ["OMP_NUM_THREADS"] = "1"
    load = os.getloadavg()
    print(f"load before: {load[0]:.2f}, {cores} cores; {asdict(size)}")
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(most, size, Path(folder))
        controls = {count: control(pool, count, size, arguments.rounds) for count in (2, 4) if count <= most}
        found = measure(pool, cases(size, most), size, arguments.rounds)
        pool.close()
    show(found, controls)
    if arguments.json:
        arguments.json.write_text(json.dumps(
            {"benchmark": "scaling_ranks", "date": time.strftime("%Y-%m-%d"), "hardware": hardware("cpu"),
             "provenance": provenance(), "rounds": arguments.rounds, "size": asdict(size), "load_before": load,
             "control": controls, "judged": judged(found, controls),
             "cases": [asdict(case) | one for case, one in found.items()]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
