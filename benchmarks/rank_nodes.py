"""The bytes that cross nodes in a training step, with rows exchanged on one level and on two (distributed/nodes.py).

    python benchmarks/rank_nodes.py [--nodes 2] [--node 2] [--batch B --latents F --d-model D --k K]

Ranks are processes of this machine, over gloo; nodes are only said to be several. Bytes are counted by the ranks, and
calculated (`cost/ranks.py`). Exits with 1 if they differ, or if the two ways give other weights.
"""

import argparse
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

import olmoscope  # noqa: F401  (sets the threads, so it comes before torch)

# isort: split
import torch
import torch.distributed as dist

from olmoscope.cost.ranks import step_traffic
from olmoscope.distributed.nodes import NodeRanks
from olmoscope.distributed.ranks import Ranks

sys.path.insert(0, str(Path(__file__).parent))
from rank_steps import RankSteps


def rank(index: int, arguments: argparse.Namespace, rendezvous: Path, found: Any) -> None:
    """One rank: puts its bytes, of all and between nodes, for each way, and whether the weights are equal."""
    torch.set_num_threads(1)
    nodes, node = arguments.nodes, arguments.node
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=nodes * node)
    of_node = [dist.new_group(list(range(first, first + node))) for first in range(0, nodes * node, node)]
    of_local = [dist.new_group(list(range(local, nodes * node, node))) for local in range(node)]
    ways = (Ranks(index, nodes * node, node=node),
            NodeRanks(Ranks(index % node, node, of_node[index // node]),
                      Ranks(index // node, nodes, of_local[index % node])))
    counted, weights = [], []
    for ranks in ways:
        steps = RankSteps(arguments.d_model, arguments.latents, arguments.k, arguments.batch, nodes * node, index,
                          nodes * node, None, ranks)
        steps.step(steps.rows[0], 1e-4)
        wanted = step_traffic(arguments.batch, arguments.d_model, arguments.latents, arguments.k, nodes * node, ranks)
        counted.append((ranks.traffic.total(), ranks.crossing.total(), wanted.total, wanted.crossing))
        weights.append(torch.cat([shard.sae.W_dec for shard in steps.step.shards]))  # type: ignore[union-attr]
    found.put((index, counted, torch.equal(*weights)))
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("nodes", 2), ("node", 2), ("d-model", 384), ("latents", 12288), ("k", 32), ("batch", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=rank, args=(index, arguments, Path(folder) / "rendezvous", found), daemon=True)
                 for index in range(arguments.nodes * arguments.node)]
        for each in ranks:
            each.start()
        answers = [found.get(timeout=300) for _ in ranks]
        for each in ranks:
            each.join()
    right = all(equal for _, _, equal in answers)
    print(f"{arguments.nodes} nodes of {arguments.node} ranks, one step; all ranks together")
    for number, way in enumerate(("one level", "two levels")):
        all_, crossing, wanted, wanted_crossing = map(sum, zip(*(counted[number] for _, counted, _ in answers),
                                                               strict=True))
        right = right and (all_, crossing) == (wanted, wanted_crossing)
        print(f"  {way:10}  sent {all_:,} bytes (formula {wanted:,}), of these between nodes {crossing:,} "
              f"(formula {wanted_crossing:,})")
    print("weights and bytes equal" if right else "DIFFERENT")
    if not right:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
