"""The time of a training step on several GPUs: derived from the measurement of one GPU, never measured.

From `results/gpu_day-2026-11-26-h200.json` (one H200, `131k, 4096`): the rate of the product, and a memory rate: the
bytes of everything else over its time. It is higher than the card's own rate, since the gathers find some of their rows
in the cache. Other shapes of the same measurement show how far the model is off. An H100 has the same product rate and
its memory rate in proportion (`H100_MEMORY`). Network rates and latencies are assumed.

F latents, D d_model, K active per row, B rows, P GPUs, m matrices (1 tied, 2 untied). Bytes of a step on a GPU:
`8 F B / P` pre-activations written and read, `6 F D / P` the encoder read and its bfloat16 copy written,
`16 K D B / P` the sparse part, `24 m F D / P` weights and moments read and written.

The rows of the next batch travel while this one is encoded (train/shared_batches.py): between nodes, or among all ranks
that exchange rows on one level. What takes longer than the encoder, and the way within a node, adds to the step; the
step's other exchanges overlap with nothing.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from olmoscope.cost.ranks import batch_traffic, step_traffic
from olmoscope.distributed.nodes import NodeRanks
from olmoscope.distributed.ranks import Ranks

SOURCE = Path(__file__).parent / "results" / "gpu_day-2026-11-26-h200.json"
D_MODEL = 4096
H100_MEMORY = 3.35 / 4.8
"""Memory rate of an H100 SXM over that of an H200, by their data sheets."""
NVLINK, NETWORK = 0.8 * 450e9, 0.9 * 50e9
"""Bytes per second per GPU, within a node and between nodes; assumed."""
NODE = 8
COLLECTIVES, LATENCY, NETWORK_LATENCY = 6, 20e-6, 40e-6
"""Number of exchanges in a step, and the latency of each in seconds, within a node and between nodes; assumed."""
FITS = 75e9
"""Bytes of GPU memory that the state of an SAE may take."""


@dataclass(frozen=True)
class SAE:
    """The SAE that is trained."""

    name: str
    d_sae: int
    k: int
    matrices: int
    batch: int


SAES = [SAE("131k, tied", 131072, 64, 1, 4096), SAE("131k, tied", 131072, 64, 1, 65536),
        SAE("1M, untied", 1048576, 64, 2, 16384), SAE("2M, untied", 2097152, 128, 2, 65536)]
KNOWN = {"131k, 4096": (SAE("", 131072, 64, 1, 4096), "step"), "131k, 32768": (SAE("", 131072, 64, 1, 32768), "step"),
         "163k, 4096": (SAE("", 163840, 128, 1, 4096), "step"),
         "131k, 4096 untied": (SAE("", 131072, 64, 2, 4096), "step, untied")}
"""The measured steps."""


@dataclass(frozen=True)
class Card:
    """Rates of a GPU: FLOP and bytes per second."""

    product: float
    memory: float

    def product_of(self, sae: SAE, gpus: int) -> float:
        """Seconds of the encoder's product."""
        return 2 * sae.d_sae * D_MODEL * sae.batch / gpus / self.product

    def compute(self, sae: SAE, gpus: int) -> float:
        """Seconds of a step, without the exchange."""
        return self.product_of(sae, gpus) + moved(sae) / gpus / self.memory


def moved(sae: SAE) -> int:
    """Bytes that a step moves on one GPU."""
    weights = sae.d_sae * D_MODEL
    return (8 * sae.d_sae * sae.batch + 6 * weights + 16 * sae.k * D_MODEL * sae.batch + 24 * sae.matrices * weights)


def measured() -> dict[str, tuple[SAE, float, float]]:
    """The measured steps, by name: the SAE, seconds, and the rate of the product in FLOP/s."""
    shapes = json.loads(SOURCE.read_text())["parts"]["step"]["results"]["shapes"]
    found = {}
    for name, (sae, step) in KNOWN.items():
        shape = shapes[name.removesuffix(" untied")]
        found[name] = (sae, shape[step]["ms"] / 1e3, shape["torch product"]["tflops_of_product"] * 1e12)
    return found


def h200() -> Card:
    """The card that was measured."""
    sae, seconds, product = measured()["131k, 4096"]
    left = seconds - 2 * sae.d_sae * D_MODEL * sae.batch / product
    return Card(product, moved(sae) / left)


@dataclass(frozen=True)
class Exchange:
    """Seconds of the exchanges of a step."""

    step: float
    """The exchanges within it."""
    batch: float
    """The part of the next batch's exchange that overlaps with this one's compute."""
    rest: float
    """The rest of the next batch's exchange."""


def exchange(sae: SAE, gpus: int, levels: int) -> Exchange:
    """The exchanges of a step, with `gpus` shards.

    Args:
        levels: 2: within a node first, as ranks on several nodes do; 1: among all ranks at once.
    """
    if gpus == 1:
        return Exchange(0.0, 0.0, 0.0)
    node = min(gpus, NODE)
    ranks = Ranks(0, gpus, node=node) if levels == 1 else NodeRanks(Ranks(0, node), Ranks(0, gpus // node))
    sent = step_traffic(sae.batch, D_MODEL, sae.d_sae, sae.k, gpus, ranks)
    batch = batch_traffic(sae.batch, 2 * D_MODEL, ranks)
    latency = LATENCY + (NETWORK_LATENCY if gpus > NODE else 0)
    near, far = (batch.total - batch.crossing) / NVLINK, batch.crossing / NETWORK
    return Exchange((sent.total - sent.crossing) / NVLINK + sent.crossing / NETWORK + COLLECTIVES * latency,
                    far + LATENCY if levels == 2 else near + far + LATENCY, near + LATENCY if levels == 2 else 0.0)


def project(names: list[str]) -> str:
    """The table for machines named `h100x8` or `h200x64`."""
    card = h200()
    lines = [f"DERIVED, not measured, from one H200 ({SOURCE.name}): product {card.product / 1e12:.0f} TFLOP/s, "
             f"all else {card.memory / 1e12:.2f} TB/s", "the model against that measurement:"]
    lines += [f"  {name:18} {card.compute(sae, 1) * 1e3:7.1f} ms for {seconds * 1e3:.1f} measured"
              for name, (sae, seconds, _) in measured().items()]
    for name in names:
        found = re.fullmatch(r"(h100|h200)x(\d+)", name)
        if found is None or int(found[2]) & (int(found[2]) - 1) or int(found[2]) < 1:
            raise SystemExit(f"--project {name}: h100xN or h200xN, N a power of two")
        gpus = int(found[2])
        rates = Card(card.product, card.memory * (H100_MEMORY if found[1] == "h100" else 1))
        lines.append(f"\n{name}, one SAE on all, one shard each")
        for sae in SAES:
            compute = rates.compute(sae, gpus)
            state = 12 * sae.d_sae * D_MODEL * sae.matrices
            one = "" if state <= FITS else f"  (one GPU: {state / 1e9:.0f} GB, does not fit)"
            for levels in (1, 2) if gpus > NODE else (1,):
                sent = exchange(sae, gpus, levels)
                seconds = compute + sent.step + sent.rest + max(0.0, sent.batch - rates.product_of(sae, gpus))
                at_need = compute + sent.step + sent.batch + sent.rest
                share = rates.compute(sae, 1) / gpus / seconds
                rows = sae.batch / seconds
                how = {1: "flat", 2: "two levels"}[levels] if gpus > NODE else ""
                lines.append(f"  {sae.name:10} K {sae.k:3} B {sae.batch:5}  {compute * 1e3:7.2f} + "
                             f"{(seconds - compute) * 1e3:6.2f} ms (batch gathered when needed: "
                             f"+ {(at_need - compute) * 1e3:6.2f})  {rows:11,.0f} rows/s  {share:4.0%}  "
                             f"feed {rows * 2 * D_MODEL / 1e9:5.1f} GB/s  "
                             f"{state / gpus / 1e9:5.1f} GB a GPU  {how}{one}")
    return "\n".join(lines)
