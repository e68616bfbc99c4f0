"""The memory that each set of kernels reports, against what its functions really allocate."""

import pytest
import torch

from allocations import Allocations, pretend_cuda
from olmoscope.kernels.interface import AdamStep, Moments

SHAPES = [(512, 64, 4096, 8), (64, 256, 20_000, 16), (2048, 128, 1000, 32), (100, 24, 600, 300)]
"""Rows, d_model, d_sae, places: many rows, a wide dictionary, many pairs, more places than fit into registers."""
SMALL = (("reference", "PRE_ACTIVATIONS_AT_ONCE", 2**16), ("reference", "GRADIENT_AT_ONCE", 2**12),
         ("cpu", "PRE_ACTIVATIONS_AT_ONCE", 2**16), ("cuda", "PRE_ACTIVATIONS_AT_ONCE", 2**20),
         ("cuda_candidates", "SUMS_AT_ONCE", 2**20), ("cuda", "SHARES", 33))
ADAM = AdamStep(1e-3, 0.9, 0.999, 1e-8, 1)


def taken(kernels, device, rows, d_model, d_sae, places, margin, dtype=torch.float32):
    """The largest number of bytes that a function takes in addition to arguments and results."""
    most = 0

    def call(name, *arguments):
        nonlocal most
        with Allocations() as seen:
            results = getattr(kernels, name)(*arguments)
        most = max(most, seen.peak - seen.now)
        return results

    u_BD, W_FD = torch.randn(rows, d_model, device=device), torch.randn(d_sae, d_model, device=device)
    b_F = torch.zeros(d_sae, device=device)
    values_BK, indices_BK = call("encode_topk", u_BD, W_FD, b_F, places)
    if margin is not None:
        quantized = call("quantize", W_FD)
        call("quantize", W_FD, quantized)
        call("encode_candidates", u_BD, W_FD, b_F, quantized, places, margin)
    found = call("residual", u_BD, values_BK, indices_BK, W_FD, torch.zeros(d_model, device=device), None, None)
    call("error", u_BD, found.e_BD, rows, None, None)
    call("code_gradient", found.e_BD, values_BK, indices_BK, W_FD)
    pairs = call("sort_pairs", values_BK, found.dz_BK, indices_BK, d_sae)
    moments = Moments(torch.zeros_like(W_FD, dtype=dtype), torch.zeros_like(W_FD, dtype=dtype))
    call("update_tied", W_FD, moments, pairs, found.e_BD, u_BD, ADAM)
    return most


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("margin", [None, 20])
@pytest.mark.parametrize("name", ["reference", "cpu", "cuda"])
def test_as_much_as_is_said(name, margin, shape, monkeypatch):
    """They never allocate more than that, and not much less; chunks are small, so that they do not hide the rest."""
    kernels = pytest.importorskip(f"olmoscope.kernels.{name}")
    for module, constant, value in SMALL:
        monkeypatch.setattr(f"olmoscope.kernels.{module}.{constant}", value)
    said = kernels.workspace_bytes(*shape, margin)
    if name == "cuda":
        with pretend_cuda() as device:
            really = taken(kernels, device, *shape, margin)
    else:
        really = max(taken(kernels, "cpu", *shape, margin, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert 0.45 * said <= really <= said  # half of what sorting takes is inside the library, and does not show


def test_the_bfloat16_copy_of_the_encoder_is_counted():
    """At the width of the widest SAE of the first target, where only this and the product of a chunk matter."""
    cuda = pytest.importorskip("olmoscope.kernels.cuda")
    assert cuda.workspace_bytes(4096, 4096, 163_840, 128) / 1e9 == pytest.approx(
        (2 * 163_840 * 4096 + 4 * cuda.PRE_ACTIVATIONS_AT_ONCE) / 1e9, rel=0.05)
