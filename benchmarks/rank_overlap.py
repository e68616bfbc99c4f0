"""The time of a step on two ranks when the next batch travels while this one is computed (train/shared_batches.py),
and when each batch is gathered when it is needed.

    python benchmarks/rank_overlap.py [--rounds N] [--batch B --latents F --d-model D --k K] [--json FILE]

Both ways read the same store, each rank its half of the rows; they take turns within one run. Memory is a fast network,
so give it a slow one, in a network namespace:

    unshare -rn sh -c 'ip link set lo up && tc qdisc add dev lo root tbf rate 1gbit burst 256kb latency 50ms &&
        python benchmarks/rank_overlap.py'

Reports medians over all steps, of the slower rank: the whole step, and how long it waited for its batch. Exits with 1
if the ways give other weights.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import olmoscope  # noqa: F401  (sets the threads, so it comes before torch)

# isort: split
import torch
import torch.distributed as dist
from torch import Tensor

from olmoscope.activations.store.reader import open_store
from olmoscope.activations.stream.batches import Stream, deal
from olmoscope.activations.stream.filters import keep_of_store
from olmoscope.activations.stream.rounds import StoreRounds
from olmoscope.distributed.ranks import Ranks
from olmoscope.provenance import provenance
from olmoscope.recipe.schema import Filter
from olmoscope.train.shared_batches import shared_batches

sys.path.insert(0, str(Path(__file__).parent))
from common import hardware
from rank_steps import RankSteps
from read_store import SITE, make_store

RANKS, STEPS, SEGMENT_ROWS = 2, 12, 2048
WAYS = ("when needed", "one ahead")


def batches(way: str, stream: Stream, ranks: Ranks) -> Iterator[Tensor]:
    """The rows of `STEPS` batches, gathered in one of the ways."""
    cpu = torch.device("cpu")
    if way == "one ahead":
        with contextlib.closing(shared_batches(stream, cpu, STEPS, ranks)) as shared:
            for batch in shared:
                yield batch.rows[SITE]
    else:
        for own, owners, _ in deal(stream, cpu, STEPS):
            yield ranks.begin_gather_dealt(own[SITE], owners)()


def rank(index: int, arguments: argparse.Namespace, folder: Path, found: Any) -> None:
    """One rank: puts the seconds of each step and of its wait, for each way, and whether the weights are equal."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=index, world_size=RANKS)
    ranks, store = Ranks(index, RANKS), open_store(folder / "store")
    trained = {way: RankSteps(arguments.d_model, arguments.latents, arguments.k, arguments.batch, RANKS, index, RANKS,
                              None, ranks) for way in WAYS}
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            rounds = StoreRounds(store, [SITE], "shuffled", 0, keep_of_store(Filter(), store, []), (index, RANKS))
            with contextlib.closing(Stream(rounds, arguments.batch)) as stream:
                ranks.ask(0)  # all begin at once
                began = time.perf_counter()
                for x_BD in batches(way, stream, ranks):
                    waited = time.perf_counter() - began
                    trained[way].step(x_BD, 1e-4)
                    seconds[way].append((time.perf_counter() - began, waited))
                    began = time.perf_counter()
                seconds[way][-STEPS:] = seconds[way][1 - STEPS :]  # nothing is ahead of the first
    weights = [torch.cat([shard.sae.W_dec for shard in trained[way].step.shards])  # type: ignore[union-attr]
               for way in WAYS]
    found.put((index, seconds, torch.equal(*weights)))
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 3), ("d-model", 1024), ("latents", 16384), ("k", 32), ("batch", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder) / "store", -(-STEPS * arguments.batch // SEGMENT_ROWS), SEGMENT_ROWS, arguments.d_model)
        ranks = [context.Process(target=rank, args=(index, arguments, Path(folder), found), daemon=True)
                 for index in range(RANKS)]
        for each in ranks:
            each.start()
        answers = [found.get(timeout=1200) for _ in ranks]
        for each in ranks:
            each.join()
    result: dict[str, Any] = {"hardware": hardware("cpu"), "provenance": provenance(),
                              "size": {name: getattr(arguments, name) for name in ("d_model", "latents", "k", "batch")}}
    for way in WAYS:
        step, waited = (max(median(each[part] for each in seconds[way]) for _, seconds, _ in answers)
                        for part in range(2))
        result[way] = {"step_s": step, "waited_s": waited}
        print(f"{way:12}  step {step * 1e3:7.1f} ms, of these waiting for the batch {waited * 1e3:7.1f} ms")
    print(f"ratio {result[WAYS[1]]['step_s'] / result[WAYS[0]]['step_s']:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(equal for _, _, equal in answers):
        raise SystemExit("DIFFERENT weights")


if __name__ == "__main__":
    main()
