"""Candidates from an 8-bit product are exact if they hold the top k; the margin decides how often they do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_backends import BACKENDS, DEVICE, FEW, SLOW, backend
from olmoscope.kernels import cpu_candidates, cpu_int8_avx2
from olmoscope.kernels.compile import call
from olmoscope.processor import has

EXAMPLES = settings(max_examples=8 if FEW else 40, deadline=None)


AVX2 = "cpu with AVX2 alone"


@pytest.fixture(params=[*BACKENDS, *([AVX2] if "cpu" in BACKENDS else [])], scope="module")
def kernels(request):
    if request.param != AVX2:
        yield from backend(request.param)
        return
    if not has("avx2"):
        pytest.skip("no AVX2 here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_candidates, "INT8", cpu_int8_avx2)
        yield from backend("cpu")


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def encoded(kernels, u_BD, W_FD, b_F, k, margin):
    return kernels.encode_candidates(u_BD, W_FD, b_F, kernels.quantize(W_FD), k, margin)


def check_form(u_BD, W_FD, b_F, k, got):
    """Distinct latents with their exact scores, in order."""
    values_BK, indices_BK = got
    pre_BF = u_BD @ W_FD.T + b_F
    torch.testing.assert_close(values_BK, pre_BF.gather(1, indices_BK).relu(), rtol=1e-4, atol=1e-4)
    assert all(len(row.unique()) == k for row in indices_BK)
    assert (values_BK.diff(dim=1) <= 0).all()
    return pre_BF.topk(k, dim=1).values.relu()


@EXAMPLES
@given(rows=st.integers(1, 20), d_model=st.integers(1, 40), latents=st.one_of(st.integers(1, 140),
       st.integers(1000, 1100)), share=st.floats(0, 1), seed=st.integers(0, 2**31),
       kind=st.sampled_from(["normal", "zeros", "duplicates", "all negative"]))
def test_all_latents_as_candidates_give_the_exact_top_k(kernels, rows, d_model, latents, share, seed, kind):
    k = max(1, round(share**3 * latents))
    u_BD, W_FD, b_F = randn(seed, rows, d_model), randn(seed + 1, latents, d_model), randn(seed + 2, latents)
    if kind == "zeros":
        u_BD[0], W_FD[0] = 0, 0
    if kind == "duplicates":
        W_FD, b_F = W_FD[:1].repeat(latents, 1), b_F[:1].repeat(latents)
    if kind == "all negative":
        b_F -= 1000
    got = encoded(kernels, u_BD, W_FD, b_F, k, latents)
    torch.testing.assert_close(got[0], check_form(u_BD, W_FD, b_F, k, got), rtol=1e-4, atol=1e-4)


@EXAMPLES
@given(rows=st.integers(1, 300 if not SLOW else 20), d_model=st.integers(8, 70), latents=st.integers(64, 500),
       seed=st.integers(0, 2**31))
def test_a_modest_margin_is_enough_for_ordinary_rows(kernels, rows, d_model, latents, seed):
    u_BD, W_FD, b_F = randn(seed, rows, d_model), randn(seed + 1, latents, d_model), randn(seed + 2, latents) * 0.1
    W_FD /= W_FD.norm(dim=1, keepdim=True)
    got = encoded(kernels, u_BD, W_FD, b_F, 8, 24)
    torch.testing.assert_close(got[0], check_form(u_BD, W_FD, b_F, 8, got), rtol=1e-4, atol=1e-4)


def test_rows_with_one_huge_channel_need_more_than_the_margin(kernels):
    """This is why training measures the share found: one channel takes all 127 steps and leaves none for the others."""
    u_BD, W_FD, b_F = randn(0, 40, 64), randn(1, 600, 64), torch.zeros(600, device=DEVICE)
    u_BD[:, 0] = 3000
    W_FD[:, 0] = 0
    got = encoded(kernels, u_BD, W_FD, b_F, 8, 0)
    want_BK = check_form(u_BD, W_FD, b_F, 8, got)
    assert (got[0] < want_BK - 1e-3).any()


def test_quantize_again_writes_over_what_was(kernels):
    W_FD, other_FD = randn(0, 70, 13), randn(1, 70, 13)
    fresh, used = kernels.quantize(W_FD), kernels.quantize(other_FD)
    assert kernels.quantize(W_FD, used) is used
    for name, value in vars(fresh).items():
        assert value is None or torch.equal(value, getattr(used, name))


def test_nan_is_seen(kernels):
    u_BD, W_FD, b_F = randn(0, 5, 16), randn(1, 100, 16), torch.zeros(100, device=DEVICE)
    u_BD[2, 3] = torch.nan
    values_BK, indices_BK = encoded(kernels, u_BD, W_FD, b_F, 4, 4)
    assert values_BK[2].isnan().any() and not values_BK[[0, 1, 3, 4]].isnan().any()
    assert ((indices_BK >= 0) & (indices_BK < 100)).all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="of the CPU's kernels")
@pytest.mark.parametrize("fast", [True, False])
def test_the_tiles_of_the_integer_product_are_exact(fast, monkeypatch):
    """If a processor lacks the instruction, the plain form gives the same bits."""
    import numba

    from olmoscope.kernels import cpu_int8

    if fast and not cpu_int8.FAST:
        pytest.skip("no AVX-512 VNNI here")
    monkeypatch.setattr(cpu_int8, "FAST", fast)
    piece = numba.njit(cpu_int8.product_piece.py_func)  # compiled here, since the cache is for this machine
    generator = np.random.default_rng(0)
    inputs = generator.integers(0, 256, (12, 20), dtype=np.uint8)
    weights = generator.integers(-127, 128, (128, 20), dtype=np.int8)
    packed = np.ascontiguousarray(weights.reshape(2, 64, 5, 4).transpose(0, 2, 1, 3))
    start = generator.integers(-99, 99, 128, dtype=np.int32)
    scales, bias, input_scales = np.full(128, 0.5, np.float32), np.full(128, 3, np.float32), np.full(12, 2, np.float32)
    out = np.zeros((12, 128), np.float32)
    for block in range(2):
        piece(block, 0, 12, inputs, packed, start, scales, bias, input_scales, out)
    assert (out == inputs.astype(int) @ weights.T.astype(int) + start + 3).all()


@pytest.mark.skipif("cpu" not in BACKENDS or not has("avx2"), reason="of the CPU's kernels with AVX2")
@pytest.mark.parametrize("d_model", [4, 20, 512, 516, 1300])
def test_sums_in_16_bits_are_exact(d_model):
    """For rows and weights of any kind: parallel, constant, with one huge channel, of zeros."""
    generator = np.random.default_rng(d_model)
    W_FD = generator.standard_normal((40, d_model)).astype(np.float32)
    W_FD[1], W_FD[2], W_FD[3, 0], W_FD[4] = 1, -1, 1e4, 0
    u_BD = np.concatenate([W_FD[:20], -W_FD[:5], 1e-6 * W_FD[:5]])
    quantized = cpu_int8_avx2.empty(*W_FD.shape)
    call(cpu_int8_avx2.quantize_weights, W_FD, quantized.weights, quantized.start, quantized.scales_F)
    inputs, scales_B = np.zeros((30, -(-d_model // 4) * 4), np.uint8), np.zeros(30, np.float32)
    call(cpu_int8_avx2.quantize_inputs, u_BD, inputs, scales_B)
    width = len(quantized.scales_F)
    pre_BF, ones, bias = np.empty((30, width), np.float32), np.ones(30, np.float32), np.zeros(width, np.float32)
    call(cpu_int8_avx2.product, inputs, quantized.weights, quantized.start, np.ones(width, np.float32), bias, ones,
         pre_BF)
    whole_FD = quantized.weights.numpy().transpose(0, 2, 1, 3).reshape(width, -1).astype(int)
    assert (pre_BF == (inputs.astype(int) - cpu_int8_avx2.CENTRE) @ whole_FD.T).all()
    steps_F = np.maximum(quantized.scales_F.numpy()[:40], 1e-30)
    assert np.abs(whole_FD[:40, :d_model] - W_FD / steps_F[:, None]).max() <= 0.5001
