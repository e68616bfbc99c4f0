"""What several benchmarks share: the size of a step, the machine, the peak of memory. It needs torch alone."""

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes, and what is asked of the step there."""

    name: str
    device: str
    d_model: int
    d_sae: int
    k: int
    batch: int
    bars: dict[str, float] = field(default_factory=dict)
    """The step takes at most so many times as long as a product, and is at least so many times as fast as a peer.
    Another step of ours takes at most so many times as long as our product."""
    rates: dict[str, float] = field(default_factory=dict)
    """Least rows per second of our steps."""
    peers: tuple[str, ...] = ()


def hardware(device: str) -> dict[str, Any]:
    """What it ran on."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    found: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def peak_resident() -> int:
    """Bytes of memory that this process held at most."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
