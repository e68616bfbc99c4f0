"""The speed of one training step, compared with the product that it needs and with other trainers.

    python benchmarks/train_step.py [--peers PYTHON] [--json FILE] [--shape NAME ...] [--rounds N] [--one-thread]

First it checks the kernels' results against a dense float64 step. Then it times each shape: all contestants take turns,
round after round, and the median over all steps of each counts. `--peers` names the Python of an environment with the
other trainers (see peers.py); they run in separate processes, which wait while others are timed. Run it on an idle
machine. If there is none, `--one-thread` (without peers) counts the processor time of one thread: neighbours disturb it
less, but it does not show how well the work is divided among threads.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import olmoscope  # noqa: F401  (sets the threads, so it comes before torch)

# isort: split
import torch

from olmoscope.kernels.dispatch import kernels_for
from olmoscope.provenance import provenance
from olmoscope.recipe.schema import Candidates
from olmoscope.sae.topk import TopK
from olmoscope.train.adam import Adam
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.initialize import initialize
from olmoscope.train.step import Step

sys.path.insert(0, str(Path(__file__).parent))
from common import Shape, hardware
from peak import float32_peak
from peers import Steps, batches, timed

BETAS, EPS = (0.9, 0.999), 1e-8
ADAMS = {"step": Adam(BETAS, EPS), "step, touched rows": Adam(BETAS, EPS, "touched"),
         "step, bf16 moments": Adam(BETAS, EPS, "exact", "bfloat16")}

MARGINS = (16, 32)
"""Margins of candidates to try: the default, and the margin to which training widens it."""

DEAD = 0.1
"""Share of dead latents for the contestant with the auxiliary loss, whose cost grows with it; its k is the SAE's."""


PEERS = ("saelens", "saelens sparse", "dictionary_learning", "sparsify", "sparsify adam")
SHAPES = [
    Shape("small", "cpu", 384, 12288, 32, 2048, {"torch product": 1.5, "our product": 1.5, "saelens": 10,
                                                 "dictionary_learning": 5, "sparsify": 2.2, "sparsify adam": 2.2},
          peers=PEERS),
    Shape("large", "cpu", 4096, 16384, 64, 1024,
          {"torch product": 1.3, "our product": 1.3, "step, candidates": 0.8}, peers=("sparsify",)),
    Shape("small batch", "cpu", 384, 12288, 32, 256, {"torch product": 2.2, "our product": 2.2}),
    *(Shape(f"batch {batch}", "cpu", 384, 12288, 32, batch) for batch in (1024, 4096, 8192)),
    *(Shape(f"latents {d_sae}", "cpu", 384, d_sae, 32, 2048) for d_sae in (6144, 24576, 49152)),
]


class Peer:
    """Another trainer in a process of its own."""

    def __init__(self, python: str, name: str, shape: Shape) -> None:
        sizes = (shape.d_model, shape.d_sae, shape.k, shape.batch)
        environment = os.environ | {"SPARSIFY_DISABLE_TRITON": "1" if shape.device == "cpu" else "0"}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("peers.py")), name, shape.device, *map(str, sizes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def __call__(self, number: int) -> list[float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(f"{number}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: the empty answer shows this, and its last output follows
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the peer has died:\n{self.process.communicate()[1][-2000:]}")
        return list(json.loads(answer))

    def close(self) -> None:
        self.process.communicate()


def contestants(shape: Shape, rows: list[torch.Tensor]) -> dict[str, Callable[[], Callable[[int], Any]]]:
    """The products alone and our steps, as functions of the step's number. Each is created on demand, because a GPU may
    not hold all of them."""
    device = torch.device(shape.device)
    kernels = kernels_for(device)
    # The product in `encode_topk`: on a GPU it converts W to bfloat16 once, before the first chunk.
    low = torch.bfloat16 if shape.device == "cuda" else torch.float32

    def fresh(tied: bool = True) -> TopK:
        W_FD = initial(shape.d_model, shape.d_sae, shape.k).W_dec.to(device, copy=True)
        return TopK(W_FD if tied else W_FD.clone(), W_FD, rows[0].mean(dim=0), "none",
                    torch.zeros(shape.d_sae, device=device), shape.k)

    def torch_product() -> Callable[[int], Any]:
        W_FD, low_rows = fresh().W_enc.to(low), [x_BD.to(low) for x_BD in rows]
        chunk = min(shape.batch, kernels.rows_at_once(shape.d_sae)) if shape.device == "cuda" else shape.batch
        out_CF = torch.empty(chunk, shape.d_sae, device=device, dtype=low)

        def run(number: int) -> None:
            for x_CD in low_rows[number % len(rows)].split(chunk):
                torch.mm(x_CD, W_FD.T, out=out_CF[: len(x_CD)])
        return run

    def our_product() -> Callable[[int], Any]:
        W_FD, b_F = fresh().W_enc.to(low), torch.zeros(shape.d_sae, device=device)

        def run(number: int) -> None:
            for chunk in rows[number % len(rows)].split(kernels.rows_at_once(shape.d_sae)):
                kernels.product(chunk, W_FD, b_F)
        return run

    def ours(make: Callable[[], Step]) -> Callable[[], Callable[[int], Any]]:
        def made() -> Callable[[int], Any]:
            step = make()
            return lambda number: step(rows[number % len(rows)], 1e-4)
        return made

    auxiliary = SettledAuxiliary(k=shape.k, dead_window=1)
    steps = {name: ours(lambda adam=adam: Step(fresh(), adam)) for name, adam in ADAMS.items()} | {
        "step, candidates": ours(lambda: Step(fresh(), ADAMS["step"], candidates=Candidates())),
        "step, candidates 32": ours(lambda: Step(fresh(), ADAMS["step"], candidates=Candidates(margin=32))),
        "step, untied": ours(lambda: Step(fresh(tied=False), ADAMS["step"])),
        "step, auxiliary": ours(lambda: with_dead_latents(Step(fresh(), ADAMS["step"], auxiliary)))}
    return {"our product": our_product, "torch product": torch_product} | steps


@functools.lru_cache(maxsize=2)
def initial(d_model: int, d_sae: int, k: int) -> TopK:
    """A new SAE on the CPU. Drawing a large one takes seconds, so all contestants start with copies of it."""
    return initialize(d_model, d_sae, k, "none", torch.zeros(d_model), seed=0)


def with_dead_latents(step: Step) -> Step:
    """Make the first `DEAD` of the latents count as dead for the auxiliary loss, however often they fire."""
    assert step.auxiliary is not None
    step.auxiliary.look = lambda tokens, last_fired_F: None  # type: ignore[method-assign]
    step.auxiliary.dead_F[: int(DEAD * step.sae.d_sae)] = True
    step.auxiliary.list_dead()
    return step


def measure(shape: Shape, rounds: int, python: str | None,
            clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each contestant's steps: some steps of one, then of the next, and so on, `rounds` times."""
    makers = contestants(shape, batches(shape.d_model, shape.batch, shape.device))
    runners: dict[str, Steps] = {name: timed(make(), shape.device, clock) for name, make in makers.items()}
    peers = {name: Peer(python, name, shape) for name in shape.peers} if python else {}
    seconds: dict[str, list[float]] = {name: [] for name in (*runners, *peers)}
    for number in range(rounds + 1):
        for name, run in (runners | peers).items():
            time.sleep(0.05)
            times = run(3)
            if number:  # the first round warms up
                seconds[name] += times
    for peer in peers.values():
        peer.close()
    return seconds


def held(shape: Shape) -> dict[str, float]:
    """Print and return the share of the exact top k that candidates hold, on a batch of the timed rows."""
    device = torch.device(shape.device)
    kernels = kernels_for(device)
    x_BD = batches(shape.d_model, shape.batch, shape.device)[0]
    sae = initialize(shape.d_model, shape.d_sae, shape.k, "none", x_BD.mean(dim=0), seed=0)
    u_BD, _ = sae.center(x_BD)
    _, wanted_BK = kernels.encode_topk(u_BD, sae.W_enc, sae.b_latent, shape.k)
    quantized = kernels.quantize(sae.W_enc)
    shares = {}
    for margin in MARGINS:
        _, found_BK = kernels.encode_candidates(u_BD, sae.W_enc, sae.b_latent, quantized, shape.k, margin)
        same = sum(int(torch.isin(*pair).sum()) for pair in zip(wanted_BK, found_BK, strict=True))
        shares[str(margin)] = same / wanted_BK.numel()
        print(f"  candidates, margin {margin}: {shares[str(margin)]:.4%} of the exact top {shape.k}")
    return shares


def floor(shape: Shape, product: float, step: float) -> dict[str, Any]:
    """Print and return the time of the product at the processors' measured float32 peak."""
    peak = float32_peak(torch.get_num_threads())
    seconds = 2 * shape.batch * shape.d_model * shape.d_sae / peak
    print(f"  float32 peak {peak / 1e9:.0f} GFLOP/s: the product takes at least {seconds * 1e3:.2f} ms; ours "
          f"{product / seconds:.2f} times that, our step {step / seconds:.2f} times")
    return {"float32_peak": peak, "floor_ms": seconds * 1e3}


def table(shape: Shape, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Print a shape's results and return them."""
    median = {name: statistics.median(times) for name, times in seconds.items()}
    step = median["step"]
    print(f"\n{shape.name}: d_model {shape.d_model}, {shape.d_sae} latents, k {shape.k}, batch {shape.batch}")
    result: dict[str, Any] = {"shape": vars(shape) | {"peers": list(shape.peers)}, "contestants": {}}
    if shape.device == "cpu":
        result |= floor(shape, median["our product"], step) | {"held": held(shape)}
    for name, value in median.items():
        ratio = step / value
        bar, verdict = shape.bars.get(name), ""
        if bar is not None:
            met = ratio <= bar if "product" in name else 1 / ratio >= bar
            if name.startswith("step, "):
                met = value / median["our product"] <= bar
            verdict = f"  bar {bar:.3g}: {'met' if met else 'NOT MET'}"
        if name in shape.rates:
            met = shape.batch / value >= shape.rates[name]
            verdict = f"  bar {shape.rates[name]:,.0f} rows/s: {'met' if met else 'NOT MET'}"
        spread = statistics.quantiles(seconds[name], n=4)
        if name.startswith("step"):
            verdict = f"  it / our product {value / median['our product']:5.2f}" + verdict
        print(f"  {name:22} {value * 1e3:9.2f} ms  ({spread[0] * 1e3:.2f} to {spread[2] * 1e3:.2f})"
              f"  {shape.batch / value:10,.0f} rows/s  step / it {ratio:5.2f}  it / step {1 / ratio:5.2f}{verdict}",
              flush=True)
        result["contestants"][name] = {"ms": value * 1e3, "quartiles_ms": [spread[0] * 1e3, spread[2] * 1e3],
                                       "rows_per_s": shape.batch / value, "step_over_it": ratio, "bar": bar}
    return result


def check(device: str) -> None:
    """Compare a few steps in float32 with a dense step in float64 by autograd; raises if they differ.

    Rounding decides which of several nearly equal latents are chosen, and on a GPU the product is in bfloat16. So the
    dense step uses the latents that the kernels chose, and these may fall short of the best ones by no more than
    rounding.
    """
    most_error, most_short = (0.02, 0.03) if device == "cuda" else (1e-3, 1e-4)
    generator = torch.Generator().manual_seed(0)
    for normalize in ("none", "layer_norm"):
        x_BD = torch.randn(300, 64, generator=generator).to(device)
        sae = initialize(64, 3000, 16, normalize, torch.zeros(64, device=device), seed=0)
        parameters = [p.double().requires_grad_() for p in sae.state_dict().values()]
        dense = TopK(parameters[0], parameters[0], parameters[2], normalize, parameters[1], 16)
        u_BD, statistics_ = dense.center(x_BD)
        pre_BF = u_BD @ parameters[0].T + parameters[1]
        _, indices_BK = kernels_for(x_BD.device).encode_topk(sae.center(x_BD)[0], sae.W_enc, sae.b_latent, 16)
        chosen_BK = pre_BF.gather(1, indices_BK)
        short = float(((pre_BF.topk(16, dim=1).values - chosen_BK).amax() / pre_BF.std()).detach())
        print(f"check, {normalize}: the chosen latents fall short of the best by {short:.1e} standard deviations")
        z_BF = torch.zeros_like(pre_BF).scatter(1, indices_BK, chosen_BK).relu()
        xhat_BD = z_BF @ parameters[0] + parameters[2]
        if statistics_ is not None:
            xhat_BD = xhat_BD * statistics_.std_B1 + statistics_.mean_B1
        loss = ((xhat_BD - x_BD).square().sum(1) / x_BD.double().square().sum(1)).mean()
        gradients = list(torch.autograd.grad(loss, parameters))
        W_FD = parameters[0].detach()
        gradients[0] -= (gradients[0] * W_FD).sum(1, keepdim=True) * W_FD
        step = Step(sae, Adam((0.0, 0.999), EPS))  # with β₁ = 0 the first moment is the gradient
        step(x_BD, 1e-3)
        for (name, moments), want in zip(step.moments.items(), gradients, strict=True):
            error = float((moments.first.double() - want).norm() / want.norm())
            print(f"check, {normalize}: relative error of the gradient of {name} {error:.1e}")
            if not (error < most_error and short < most_short):
                raise SystemExit("the kernels are wrong here: no timing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="PYTHON", help="Python of the environment with the other trainers")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there")
    parser.add_argument("--shape", action="append", help="only this one (by name); may be given several times")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one-thread", action="store_true", help="processor time of one thread, for a busy machine")
    arguments = parser.parse_args()
    if arguments.one_thread:
        torch.set_num_threads(1)
    clock = time.thread_time if arguments.one_thread else time.perf_counter
    check("cpu")
    shapes = [shape for shape in SHAPES if arguments.shape is None or shape.name in arguments.shape]
    results = [table(shape, measure(shape, arguments.rounds, arguments.peers, clock)) for shape in shapes]
    if arguments.json:
        arguments.json.write_text(json.dumps(
            {"benchmark": "train_step", "date": time.strftime("%Y-%m-%d"), "hardware": hardware("cpu"),
             "provenance": provenance(), "rounds": arguments.rounds,
             "clock": clock.__name__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
