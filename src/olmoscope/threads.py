"""How many threads the libraries use, and how they wait. This is set before torch is loaded, which reads it only once.

    how many    as many as the processors that this process may use, by its affinity and its container's quota (cgroup)
    waiting     a thread that waits for the others at the end of a loop spins for some microseconds, then sleeps. By
                default it spins for milliseconds. If another process wants the core, that takes time from the very
                thread it waits for (benchmarks/README.md, "Busy neighbours"); no spinning at all costs up to a fifth
                on an idle machine.

Variables that are already set are kept. Child processes inherit what is set here.
"""

import math
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""The quota of the control group, version 2: microseconds of processor time (or `max`) in each period."""
COUNTS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")
"""The thread counts of torch, which our numba kernels follow (kernels/compile.py), and of tokenizers."""
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}
"""For any OpenMP; for GNU's, how often it polls before it sleeps; for Intel's, milliseconds before it sleeps."""


def usable_processors(quota: Path = QUOTA) -> int:
    """How many processors this process may use, at least one."""
    if sys.platform == "linux":
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    try:
        allowed, period = quota.read_text(encoding="utf-8").split()
    except (OSError, ValueError):  # no control group, or another version
        return count
    return count if allowed == "max" else max(1, min(count, math.ceil(int(allowed) / int(period))))


def set_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that the environment does not have yet; do nothing if torch is loaded already."""
    if "torch" in sys.modules:
        return
    count = environment.get("OMP_NUM_THREADS") or str(usable_processors())
    for name in COUNTS:
        environment.setdefault(name, count)
    for name, value in WAITING.items():
        environment.setdefault(name, value)
