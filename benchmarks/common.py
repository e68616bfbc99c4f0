"""What several benchmarks share: the size of a step, the machine, the peak of memory. It needs only torch."""

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes, and the requirements for the step at these sizes."""

    name: str
    device: str
    d_model: int
    d_sae: int
    k: int
    batch: int
    bars: dict[str, float] = field(default_factory=dict)
    """Bars: for a product, the most times as long that the step may take; for a peer, the least times as fast that it
    must be; for another step of ours, the most times as long as our product that it may take."""
    rates: dict[str, float] = field(default_factory=dict)
    """Minimum rows per second of our steps."""
    peers: tuple[str, ...] = ()


def hardware(device: str) -> dict[str, Any]:
    """The machine's hardware and software."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    found: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def peak_resident() -> int:
    """The most bytes of memory that this process has held."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
