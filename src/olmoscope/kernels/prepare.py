"""Compile the CPU kernels for training once on a machine, in a separate process, before training needs them.

numba compiles a kernel on its first call, and keeps it (compile.py says where). But the process that compiles a kernel
and the processes that load it later do not run the same code: separately compiled helpers are linked in place of those
optimised within the kernel, and sums differ in their last bits. A run that was killed in the first process and resumed
in a second would not end like one that was never killed. So no training process compiles.

On a GPU, kernels depend on the sizes, so nothing is done there.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from olmoscope.files import write_text
from olmoscope.kernels.dispatch import kernels_for
from olmoscope.kernels.interface import AdamStep, Moments
from olmoscope.progress import step_line

ROWS, D_MODEL, LATENTS, K = 8, 16, 128, 4
CANDIDATES = "--candidates"


def prepare_kernels(device: torch.device, *, candidates: bool = False) -> None:
    """Compile what a training step calls, unless that was done before. Without a folder for compiled kernels, do
    nothing: each process compiles them.

    Args:
        candidates: also compile the kernels of the search by candidates.
    """
    if device.type != "cpu" or kernels_for(device).__name__ != "olmoscope.kernels.cpu":
        return
    mark = _mark(candidates)
    if mark is None or mark.exists():
        return
    with step_line("compiling kernels, once on this machine"):
        subprocess.run([sys.executable, "-m", __name__, *([CANDIDATES] if candidates else [])], check=True)
    write_text(mark, "")


def _mark(candidates: bool) -> Path | None:
    """The file that records that these kernels were compiled from their current sources for this processor."""
    import numba

    from olmoscope.kernels.cpu_update import update_rows

    folder = update_rows.stats.cache_path  # type: ignore[attr-defined]
    if folder is None:
        return None
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    processor = [numba.__version__, os.environ.get("NUMBA_CPU_NAME", ""), os.environ.get("NUMBA_CPU_FEATURES", "")]
    digest = hashlib.sha256(b"".join([*sources, *(text.encode() for text in processor)])).hexdigest()[:16]
    return Path(folder) / f"olmoscope-{digest}{'-candidates' if candidates else ''}.compiled"


def _call_all(candidates: bool) -> None:
    """Call each kernel of a training step on very small tensors, float32 as in training."""
    from olmoscope.kernels import cpu

    x_BD, W_FD = torch.ones(ROWS, D_MODEL), torch.ones(LATENTS, D_MODEL) / D_MODEL**0.5
    b_D, b_F = torch.zeros(D_MODEL), torch.zeros(LATENTS)
    values_BK, indices_BK = cpu.encode_topk(x_BD, W_FD, b_F, K)
    found = cpu.residual(x_BD, values_BK, indices_BK, W_FD, b_D, None, None)
    _, e_BD = cpu.error(x_BD, cpu.decode(values_BK, indices_BK, W_FD), ROWS, None, None)
    cpu.code_gradient(e_BD, values_BK, indices_BK, W_FD)
    pairs = cpu.sort_pairs(values_BK, found.dz_BK, indices_BK, LATENTS)
    moments = Moments(torch.zeros_like(W_FD), torch.zeros_like(W_FD))
    cpu.update_tied(W_FD, moments, pairs, found.e_BD, x_BD, AdamStep(0.0, 0.9, 0.999, 1e-8, 1))
    if candidates:
        cpu.encode_candidates(x_BD, W_FD, b_F, cpu.quantize(W_FD), K, K)


if __name__ == "__main__":
    _call_all(CANDIDATES in sys.argv)
