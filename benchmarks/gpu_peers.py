"""GPU day: the training steps of other trainers at full size, compared with ours from part `step`.

Each runs alone in a process of the environment that `--peers` names (peers.py says what to install there).
"""

import statistics
import subprocess
from typing import Any

from common import Shape
from gpu_part import Part
from train_step import Peer

MODULES = {"saelens": "sae_lens", "sparsify": "sparsify"}
ROUNDS, STEPS = 3, 3


def main() -> None:
    part = Part("peers", __doc__)
    if part.peers is None:
        raise SystemExit("no peers: --peers PYTHON is missing")
    found: dict[str, dict[str, Any]] = {}
    for shape in part.shapes():
        for name in shape.peers:
            key = f"{shape.name:12} {name:10}"
            figures = measure(part, shape, name)
            found.setdefault(shape.name, {})[name] = figures
            if "failed" in figures:
                part.keep(f"{key} {figures['failed']}", shapes=found)
                continue
            ours = part.earlier("step").get("shapes", {}).get(shape.name, {}).get("step", {}).get("ms")
            figures["ours_is_faster_by"] = ratio = figures["ms"] / ours if ours else None
            text = f"{key} {figures['ms']:9.2f} ms {figures['rows_per_s']:11,.0f} rows/s"
            text += "; our step was not measured" if ratio is None else f"; ours is faster by {ratio:.1f}"
            if ratio is not None and name in shape.bars:
                text += f" (bar {shape.bars[name]:g} {'met' if ratio >= shape.bars[name] else 'NOT MET'})"
            part.keep(text, shapes=found)
    failed = [f"{name}: {one['failed']}" for peers in found.values() for name, one in peers.items() if "failed" in one]
    if failed:
        raise SystemExit("; ".join(failed))


def measure(part: Part, shape: Shape, name: str) -> dict[str, Any]:
    """Time a peer's steps, if it is there."""
    test = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({MODULES[name]!r}) is None)"
    if subprocess.run([part.peers, "-c", test]).returncode:
        return {"failed": f"lacks {MODULES[name]}"}
    peer = Peer(part.peers, name, shape)
    try:
        seconds = [second for _ in range(ROUNDS + 1) for second in peer(STEPS)][STEPS:]
    except SystemExit as error:  # the last words of a peer that has died
        return {"failed": f"died: {str(error).splitlines()[-1][:200]}"}
    finally:
        peer.close()
    median = statistics.median(seconds)
    return {"ms": median * 1e3, "rows_per_s": shape.batch / median}


if __name__ == "__main__":
    main()
