"""How many threads the libraries use, and how they wait: set before torch is loaded, for it reads this only once.

    how many    as many as this process may use: its affinity, and the quota of its container (cgroup)
    waiting     a thread that waits for the others at the end of a loop spins for some microseconds, then sleeps. By
                default it spins for milliseconds. Where another process wants the core, that takes the time of the very
                thread that is waited for (benchmarks/README.md, "Busy neighbours"); never to spin at all costs up to a
                fifth on an idle machine.

Whatever the environment says already is kept. Children inherit what is set here.
"""

import math
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of the control group, version 2: microseconds of processor time (or `max`) in each period."""
COUNTS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")
"""Of torch, which our numba kernels follow (kernels/compile.py), and of tokenizers."""
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}
"""Any OpenMP; how often GNU's looks before it sleeps all the same; Intel's, in milliseconds."""


def usable_processors(quota: Path = QUOTA) -> int:
    """How many processors this process may use, at least one."""
    if sys.platform == "linux":
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    try:
        allowed, period = quota.read_text(encoding="utf-8").split()
    except (OSError, ValueError):  # no control group, or one of another version
        return count
    return count if allowed == "max" else max(1, min(count, math.ceil(int(allowed) / int(period))))


def set_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what the environment does not say yet; nothing where torch is loaded already."""
    if "torch" in sys.modules:
        return
    count = environment.get("OMP_NUM_THREADS") or str(usable_processors())
    for name in COUNTS:
        environment.setdefault(name, count)
    for name, value in WAITING.items():
        environment.setdefault(name, value)
