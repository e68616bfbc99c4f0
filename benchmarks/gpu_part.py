"""What the parts of a GPU day share: arguments, results (written as soon as they are known), sizes, clocks.

A part is a script in this folder, gpu_NAME.py, which also runs alone: `python benchmarks/gpu_step.py --device cuda
--out FOLDER`. It writes FOLDER/NAME.json. If it fails, its exit status is not 0 and its last line says why.
tools/gpu_day.py runs the parts and joins their results.
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
"""In order of importance."""
BLOCK = 16
"""Calls timed together; a search by candidates checks itself once in this many."""
SECONDS = 3
"""Approximate seconds for which a contestant is timed."""
FLOORS = {"H100": (790e12, 3.0e12), "H200": (790e12, 4.8e12)}
"""FLOP/s in bfloat16 and bytes/s: an H100's as others measured them, an H200's memory according to its manufacturer."""


class Part:
    """A part's arguments and its results so far."""

    def __init__(self, name: str, description: str | None) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        parser.add_argument("--small", action="store_true", help="small sizes, for a trial")
        parser.add_argument("--peers", metavar="PYTHON", help="Python of the environment with the other trainers")
        arguments = parser.parse_args()
        self.name, self.out, self.small, self.peers = name, arguments.out, arguments.small, arguments.peers
        self.device = torch.device(arguments.device)
        self.cuda = self.device.type == "cuda"
        self.results: dict[str, Any] = {}
        self._lines: list[str] = []

    def keep(self, line: str, **results: Any) -> None:
        """Save results: figures by name for programs, and a line for people."""
        self._lines.append(line)
        print(line, flush=True)
        self._write([], results)

    def so_far(self, line: str, **results: Any) -> None:
        """The same, with a line that the next line replaces."""
        self._write([line], results)

    def _write(self, more: list[str], results: dict[str, Any]) -> None:
        self.results |= results
        write_json(self.out / f"{self.name}.json", {"lines": self._lines + more, "results": self.results})

    def earlier(self, name: str) -> dict[str, Any]:
        """The results of another part of this day; empty if there are none."""
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
        """Seconds per call in each of several blocks of calls, without waiting for the device within a block.

        Args:
            call: called with the number of the call.
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
        """The highest FLOP/s and bytes/s of this device; None if unknown."""
        name = torch.cuda.get_device_name() if self.cuda else ""
        return next((floors for gpu, floors in FLOORS.items() if gpu in name), (None, None))


class Peak:
    """The peak of a device's memory, in bytes above its use when this object was created."""

    def __init__(self, part: Part) -> None:
        self._cuda = part.cuda
        gc.collect()
        if self._cuda:
            part.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak of resident memory
            self._before = peak_resident()

    def bytes(self) -> int:
        return (torch.cuda.max_memory_allocated() if self._cuda else peak_resident()) - self._before


def median_and_quartiles(seconds: list[float]) -> dict[str, Any]:
    """Median and quartiles of times, in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4)
    return {"ms": statistics.median(seconds) * 1e3, "quartiles_ms": [low * 1e3, high * 1e3]}


def faults() -> tuple[type[Exception], ...]:
    """Errors of the device, torch or Triton after which the other measurements can continue."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def first_line(error: Exception) -> str:
    """A fault in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:200]
