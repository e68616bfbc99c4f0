"""GPU day: the time of one step, kernel by kernel, and how close each kernel comes to the device's limits.

One exact step at the first size (131,072 latents, k 64, batch 4096), by torch.profiler. The necessary work of a kernel
is counted: floating-point operations for the product, and bytes for everything else, with each input read once and each
output written once. The rest (sorting, small sums) is listed only with its time.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

from common import Shape
from gpu_part import Part
from olmoscope.kernels.cuda_topk import GROUP
from peers import batches
from train_step import contestants

SHOWN = 12
WARM_UP = 3


@dataclass(frozen=True)
class Work:
    """The work of a kernel, by its name, in one step of a shape."""

    pattern: str
    flops: Callable[[Shape], float] = lambda shape: 0
    bytes: Callable[[Shape], float] = lambda shape: 0


def scores(shape: Shape) -> int:
    """Elements of the product."""
    return shape.batch * shape.d_sae


def matrix(shape: Shape) -> int:
    """Elements of the dictionary."""
    return shape.d_sae * shape.d_model


def pairs(shape: Shape) -> int:
    """Elements of all dictionary rows in a batch's codes, counted once for each code."""
    return shape.batch * shape.k * shape.d_model


WORK = [
    Work(r"gemm|nvjet|cutlass|xmma|aten::addmm", flops=lambda shape: 2 * scores(shape) * shape.d_model),
    Work(r"^group_maxima", bytes=lambda shape: 4 * scores(shape) * (1 + 1 / GROUP)),
    Work(r"^select_groups", bytes=lambda shape: 4 * scores(shape) / GROUP),
    Work(r"^select_elements", bytes=lambda shape: 4 * shape.batch * shape.k * (GROUP + 4)),
    Work(r"^residual", bytes=lambda shape: 4 * pairs(shape) + 12 * shape.batch * shape.d_model),
    # W and two moments, read and written; the rows e and u of every pair.
    Work(r"^update_rows", bytes=lambda shape: 24 * matrix(shape) + 8 * pairs(shape)),
    Work(r"bfloat16_copy|bfloat16.*copy", bytes=lambda shape: 6 * (matrix(shape) + shape.batch * shape.d_model)),
    Work(r"CUDAFunctor_add|aten::add_", bytes=lambda shape: 8 * scores(shape)),
]
"""If several patterns match a kernel, the first one counts. The last one adds the bias to the product."""


def main() -> None:
    part = Part("profile", __doc__)
    shape = part.shapes()[0]
    rows = batches(shape.d_model, shape.batch, shape.device)
    step = contestants(shape, rows)["step"]()
    for number in range(WARM_UP):
        step(number)
    part.synchronize()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if part.cuda else [])]) as profiled:
        step(WARM_UP)
        part.synchronize()
    report(part, shape, kernels_of(part, profiled))


def kernels_of(part: Part, profiled: Any) -> list[dict[str, Any]]:
    """Name, calls and seconds of every kernel (on a CPU, of every operation of torch), the slowest first."""
    found = []
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if part.cuda else event.self_cpu_time_total
        if microseconds and event.device_type.name == ("CUDA" if part.cuda else "CPU"):
            found.append({"name": event.key[:160], "calls": event.count, "seconds": microseconds / 1e6})
    return sorted(found, key=lambda kernel: -kernel["seconds"])


def report(part: Part, shape: Shape, kernels: list[dict[str, Any]]) -> None:
    """Print and keep the slowest kernels, with the rates of those whose work is known."""
    total = sum(kernel["seconds"] for kernel in kernels)
    most_flops, most_bytes = part.floors()
    for kernel in kernels[:SHOWN]:
        work = next((work for work in WORK if re.search(work.pattern, kernel["name"])), None)
        kernel |= {"share": kernel["seconds"] / total, "flops_per_s": None, "bytes_per_s": None, "share_of_floor": None}
        text = (f"{kernel['share']:6.1%} {kernel['seconds'] * 1e3:8.3f} ms {kernel['calls']:4d} x "
                f"{kernel['name'][:60]:60}")
        for what, unit, most in (("flops", "TFLOP/s", most_flops), ("bytes", "TB/s", most_bytes)):
            if work is not None and (amount := getattr(work, what)(shape)):
                rate = kernel[f"{what}_per_s"] = amount / kernel["seconds"]
                kernel["share_of_floor"] = most and rate / most
                text += f" {rate / 1e12:7.2f} {unit}" + (f", {rate / most:.0%} of the floor" if most else "")
        part.keep(text, kernels=kernels[:SHOWN], seconds=total, shape=vars(shape) | {"peers": list(shape.peers)},
                  floors={"flops_per_s": most_flops, "bytes_per_s": most_bytes}, slowest=kernels[0])


if __name__ == "__main__":
    main()
