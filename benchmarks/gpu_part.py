"""What the parts of a GPU day share: arguments, results that are on the disk as soon as they are known, sizes, clocks.

A part is a script beside this one, gpu_NAME.py, and runs alone too: `python benchmarks/gpu_step.py --device cuda --out
FOLDER`. It writes FOLDER/NAME.json. What it says last, with an exit status that is not 0, is why it failed.
tools/gpu_day.py runs the parts and joins what they wrote.
"""

import argparse
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common import Shape, peak_resident
from olmoscope.files import read_json, write_json

SHAPES = [
    Shape("131k, 4096", "cuda", 4096, 131072, 64, 4096, {"sparsify": 4, "saelens": 10},
          {"step": 250e3, "step, touched rows": 300e3, "step, bf16 moments": 300e3}, ("sparsify", "saelens")),
    Shape("131k, 256", "cuda", 4096, 131072, 64, 256),
    Shape("131k, 32768", "cuda", 4096, 131072, 64, 32768, {"our product": 1 / 0.55}),
    Shape("163k, 4096", "cuda", 4096, 163840, 128, 4096, rates={"step": 170e3}),
]
"""In order of worth."""
BLOCK = 16
"""Calls timed together; a search by candidates checks itself once in so many."""
SECONDS = 3
"""About how long a contestant is timed."""
FLOORS = {"H100": (790e12, 3.0e12), "H200": (790e12, 4.8e12)}
"""FLOP/s in bfloat16 and bytes/s: an H100's as measured by others, an H200's memory as its maker says."""


class Part:
    """A part's arguments and its results so far."""

    def __init__(self, name: str, description: str | None) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        parser.add_argument("--small", action="store_true", help="small sizes, to try it")
        parser.add_argument("--peers", metavar="PYTHON", help="Python of the environment with the other trainers")
        arguments = parser.parse_args()
        self.name, self.out, self.small, self.peers = name, arguments.out, arguments.small, arguments.peers
        self.device = torch.device(arguments.device)
        self.cuda = self.device.type == "cuda"
        self.results: dict[str, Any] = {}
        self._lines: list[str] = []

    def keep(self, line: str, **results: Any) -> None:
        """Write results down: figures by name for programs, a line for people."""
        self._lines.append(line)
        print(line, flush=True)
        self._write([], results)

    def so_far(self, line: str, **results: Any) -> None:
        """The same, with a line that the next one replaces."""
        self._write([line], results)

    def _write(self, more: list[str], results: dict[str, Any]) -> None:
        self.results |= results
        write_json(self.out / f"{self.name}.json", {"lines": self._lines + more, "results": self.results})

    def earlier(self, name: str) -> dict[str, Any]:
        """The results of another part of this day; empty if it has none."""
        day = self.out / "gpu_day.json"
        parts = read_json(day)["parts"] if day.exists() else {}
        return dict(parts.get(name, {}).get("results") or {})

    def shapes(self) -> list[Shape]:
        """The sizes of training steps."""
        if not self.small:
            return SHAPES
        return [replace(shape, device=self.device.type, d_model=64, d_sae=shape.d_sae // 256, k=shape.k // 8,
                        batch=max(16, shape.batch // 64), bars={}, rates={}) for shape in SHAPES]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def time_blocks(self, call: Callable[[int], Any]) -> list[float]:
        """Seconds a call, in each of some blocks of calls; within a block the device is never waited for.

        Args:
            call: is given the number of the call.
        """
        calls, count = 2 if self.small else BLOCK, 0
        seconds: list[float] = []
        while len(seconds) < 4 or (sum(seconds) * calls < SECONDS and len(seconds) < 10 and not self.small):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call(count)
                count += 1
            self.synchronize()
            seconds.append((time.perf_counter() - start) / calls)
        return seconds[1:]  # the first block compiles and warms up

    def floors(self) -> tuple[float | None, float | None]:
        """FLOP/s and bytes/s that this device can do at most; None where nobody has measured it."""
        name = torch.cuda.get_device_name() if self.cuda else ""
        return next((floors for gpu, floors in FLOORS.items() if gpu in name), (None, None))


class Peak:
    """The most bytes that a device's memory came to hold over what it held when this was made."""

    def __init__(self, part: Part) -> None:
        self._cuda = part.cuda
        gc.collect()
        if self._cuda:
            part.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew from here
            self._before = peak_resident()

    def bytes(self) -> int:
        return (torch.cuda.max_memory_allocated() if self._cuda else peak_resident()) - self._before


def median_and_quartiles(seconds: list[float]) -> dict[str, Any]:
    """Median and quartiles of some times, in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4)
    return {"ms": statistics.median(seconds) * 1e3, "quartiles_ms": [low * 1e3, high * 1e3]}


def faults() -> tuple[type[Exception], ...]:
    """What the device, torch or Triton raise where something does not work there: the other measurements go on."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def first_line(error: Exception) -> str:
    """One line about a fault."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:200]
