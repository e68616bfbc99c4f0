"""Every operation of every backend against plain dense float64, and every gradient against autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernel_backends import BACKENDS, DEVICE, SLOW, backend
from kernel_draws import EXAMPLES, codes, randn
from olmoscope.kernels.interface import AdamStep, Moments, SortedPairs

WIDTHS = st.one_of(st.integers(1, 70), st.integers(1000, 1100), st.integers(2000, 2500))
"""Around and between the sizes of the CPU's and the GPU's blocks."""


@pytest.fixture(params=BACKENDS, scope="module")
def kernels(request):
    yield from backend(request.param)


def integers(seed: int, *shape: int, most: int = 2) -> Tensor:
    """Small whole numbers: products are exact, ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).double().to(DEVICE)


ROLES = st.sampled_from(["tied", "encoder", "decoder"])


def unit_rows(W_FD: Tensor) -> Tensor:
    return W_FD / W_FD.norm(dim=1, keepdim=True)


def check_topk(u_BD, W_FD, b_F, k, got):
    values_BK, indices_BK = got
    pre_BF = u_BD @ W_FD.T + b_F
    torch.testing.assert_close(values_BK, pre_BF.topk(k, dim=1).values.relu(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(pre_BF.gather(1, indices_BK).relu(), values_BK, rtol=1e-9, atol=1e-11)
    assert all(len(row.unique()) == k for row in indices_BK)
    assert (values_BK.diff(dim=1) <= 0).all()


@EXAMPLES
@given(rows=st.integers(1, 20), d_model=st.integers(1, 40), latents=WIDTHS, share=st.floats(0, 1),
       kind=st.sampled_from(["normal", "ties", "all negative", "duplicates", "equal"]), seed=st.integers(0, 2**31))
def test_encode_topk(kernels, rows, d_model, latents, share, kind, seed):
    k = max(1, round(share**3 * latents))
    if SLOW:
        k = min(k, 64)
    u_BD, W_FD, b_F = randn(seed, rows, d_model), randn(seed + 1, latents, d_model), randn(seed + 2, latents) * 0.1
    if kind in ("ties", "equal"):
        u_BD, W_FD, b_F = integers(seed, rows, d_model), integers(seed + 1, latents, d_model), torch.zeros_like(b_F)
    if kind == "equal":
        u_BD.zero_()
    if kind == "all negative":
        b_F -= 1000
    if kind == "duplicates":
        W_FD, b_F = W_FD[:1].repeat(latents, 1), b_F[:1].repeat(latents)
    check_topk(u_BD, W_FD, b_F, k, kernels.encode_topk(u_BD, W_FD, b_F, k))


@pytest.mark.parametrize("latents", [3, 64, 1023, 1024, 1025])
def test_k_one_and_k_all(kernels, latents):
    u_BD, W_FD, b_F = randn(0, 5, 12), randn(1, latents, 12), randn(2, latents)
    for k in (1, min(latents, 64) if SLOW else latents):
        check_topk(u_BD, W_FD, b_F, k, kernels.encode_topk(u_BD, W_FD, b_F, k))


def test_topk_over_several_chunks_of_rows(kernels, monkeypatch):
    u_BD, W_FD, b_F = randn(0, 50, 12), randn(1, 300, 12), randn(2, 300)
    monkeypatch.setattr(kernels, "PRE_ACTIVATIONS_AT_ONCE", 7 * 300)
    monkeypatch.setattr(kernels, "ROWS_AT_LEAST", 1, raising=False)
    check_topk(u_BD, W_FD, b_F, 9, kernels.encode_topk(u_BD, W_FD, b_F, 9))


def test_all_values_but_zero_are_active(kernels):
    """With a NaN among them, it must reach the loss and the weights, where it shows."""
    values_BK = torch.tensor([[2.0, float("nan"), -1.0, 0.0]], dtype=torch.float64, device=DEVICE)
    indices_BK, W_FD, e_BD = torch.tensor([[3, 0, 2, 1]], device=DEVICE), randn(1, 4, 12), randn(2, 1, 12)
    dz_BK = kernels.code_gradient(e_BD, values_BK, indices_BK, W_FD)
    torch.testing.assert_close(dz_BK[0, :3], W_FD[indices_BK[0, :3]] @ e_BD[0])
    pairs = kernels.sort_pairs(values_BK, dz_BK, indices_BK, 4)
    assert pairs.offsets.tolist() == [0, 1, 1, 2, 3]
    torch.testing.assert_close(pairs.values[:3], values_BK[0, [1, 2, 0]], equal_nan=True)
    torch.testing.assert_close(pairs.gradients[:3], dz_BK[0, [1, 2, 0]])
    for e_BD[0, 0] in (1.0, float("nan")):
        assert kernels.code_gradient(e_BD, values_BK, indices_BK, W_FD)[0, 3] == 0, "inactive, whatever the error is"


@EXAMPLES
@given(rows=st.integers(1, 30), d_model=st.integers(1, 70), latents=st.integers(1, 90), share=st.floats(0, 1),
       layer_norm=st.booleans(), shut=st.sampled_from([0.0, 0.3, 2.0]), seed=st.integers(0, 2**31))
def test_decode_and_residual(kernels, rows, d_model, latents, share, layer_norm, shut, seed):
    k = max(1, round(share * latents))
    values_BK, indices_BK = codes(seed, rows, latents, k, shut)
    W_FD, b_D, x_BD = randn(seed, latents, d_model), randn(seed + 1, d_model), randn(seed + 2, rows, d_model)
    mean_B1, std_B1 = (randn(seed + 3, rows, 1), randn(seed + 4, rows, 1).abs() + 0.1) if layer_norm else (None, None)
    z_BK = values_BK.clone().requires_grad_()
    z_BF = torch.zeros(rows, latents, dtype=torch.float64, device=DEVICE).scatter(1, indices_BK, z_BK)
    decoded_BD = z_BF @ W_FD
    torch.testing.assert_close(kernels.decode(values_BK, indices_BK, W_FD), decoded_BD.detach())
    normal_BD = decoded_BD + b_D
    normal_BD.retain_grad()
    xhat_BD = normal_BD * std_B1 + mean_B1 if layer_norm else normal_BD
    loss_B = (xhat_BD - x_BD).square().sum(1) / x_BD.square().sum(1)
    loss_B.mean().backward()
    got = kernels.residual(x_BD, values_BK, indices_BK, W_FD, b_D, mean_B1, std_B1)
    assert got.loss_B.dtype == torch.float64
    torch.testing.assert_close(got.loss_B, loss_B.detach())
    torch.testing.assert_close(got.e_BD, normal_BD.grad)
    torch.testing.assert_close(got.dz_BK, z_BK.grad * (values_BK > 0))


def test_an_inactive_place_learns_nothing_wherever_it_stands(kernels):
    """Zeros are not only after the active latents: the codes of a Matryoshka prefix have zeros in between."""
    values_BK, indices_BK = codes(0, 20, 30, 6)
    values_BK[:, [0, 2]] = 0
    values_BK[:, 1], values_BK[:, 4] = 1e-30, 0.5  # from JumpReLU: practically 0, but its gradient is needed
    W_FD, x_BD = randn(1, 30, 9), randn(2, 20, 9)
    got = kernels.residual(x_BD, values_BK, indices_BK, W_FD, torch.zeros_like(x_BD[0]), None, None)
    wanted_BK = (W_FD[indices_BK] @ got.e_BD.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(got.dz_BK, torch.where(values_BK > 0, wanted_BK, 0))
    assert (got.dz_BK[:, [0, 2]] == 0).all() and (got.dz_BK[:, [1, 4]] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_zeros_has_no_loss_and_asks_for_nothing(kernels, dtype):
    values_BK, indices_BK = codes(0, 3, 20, 4)
    x_BD, W_FD, b_D = (tensor.to(dtype) for tensor in (randn(2, 3, 8), randn(1, 20, 8), randn(3, 8)))
    x_BD[1] = 0
    mean_B1, std_B1 = x_BD.mean(1, keepdim=True), x_BD.std(1, keepdim=True)
    for statistics in ((None, None), (mean_B1, std_B1)):
        got = kernels.residual(x_BD, values_BK.to(dtype), indices_BK, W_FD, b_D, *statistics)
        for part in vars(got).values():
            assert part.isfinite().all() and not part[1].any() and part[0].any() and part[2].any()
    x_BD[0, 0] = torch.nan  # so that it shows
    assert kernels.residual(x_BD, values_BK.to(dtype), indices_BK, W_FD, b_D, None, None).loss_B[0].isnan()


@EXAMPLES
@given(rows=st.integers(1, 40), latents=st.integers(1, 90), share=st.floats(0, 1),
       shut=st.sampled_from([0.0, 0.3, 2.0]), seed=st.integers(0, 2**31))
def test_sort_pairs(kernels, rows, latents, share, shut, seed):
    k = max(1, round(share * latents))
    values_BK, indices_BK = codes(seed, rows, latents, k, shut)
    dz_BK = randn(seed, rows, k)
    pairs = kernels.sort_pairs(values_BK, dz_BK, indices_BK, latents)
    want = sorted((int(indices_BK[b, c]), b, float(values_BK[b, c]), float(dz_BK[b, c]))
                  for b in range(rows) for c in range(k) if values_BK[b, c] > 0)
    end = int(pairs.offsets[-1])
    got = zip(torch.repeat_interleave(torch.arange(latents, device=DEVICE), pairs.offsets.diff()).tolist(),
              pairs.rows[:end].tolist(), pairs.values[:end].tolist(), pairs.gradients[:end].tolist(), strict=True)
    assert list(got) == want


@EXAMPLES
@given(rows=st.integers(1, 20), latents=st.integers(1, 60), places=st.integers(1, 5), more=st.integers(1, 9),
       seed=st.integers(0, 2**31))
def test_sort_pairs_of_two_losses(kernels, rows, latents, places, more, seed):
    """Codes of different lengths, the second one's rows below the first one's."""
    parts = [(*codes(seed + n, rows, latents, min(k, latents), 0.3), first)
             for n, (k, first) in enumerate([(places, 0), (more, rows)])]
    values_P, indices_P = (torch.cat([part[n].flatten() for part in parts]) for n in (0, 1))
    rows_P = torch.cat([torch.arange(first, first + rows, dtype=torch.int32, device=DEVICE)
                        .repeat_interleave(values_BK.shape[1]) for values_BK, _, first in parts])
    pairs = kernels.sort_pairs(values_P, -values_P, indices_P, latents, rows_P)
    end = int(pairs.offsets[-1])
    got = zip(torch.repeat_interleave(torch.arange(latents, device=DEVICE), pairs.offsets.diff()).tolist(),
              pairs.rows[:end].tolist(), pairs.values[:end].tolist(), strict=True)
    want = sorted((int(i), int(r), float(v)) for i, r, v in zip(indices_P, rows_P, values_P, strict=True) if v > 0)
    assert list(got) == want
    assert torch.equal(pairs.gradients[:end], -pairs.values[:end])


def batch(seed: int, rows: int, latents: int, k: int, d_model: int, hot: bool) -> tuple:
    """W, e, u, and codes with their gradients; `hot`: latent 0 is in every row."""
    values_BK, indices_BK = codes(seed, rows, latents, k)
    if hot:
        indices_BK = torch.where(indices_BK == 0, indices_BK[:, :1], indices_BK)
        indices_BK[:, 0] = 0
        values_BK[:, 0] += 1
    dz_BK = randn(seed + 3, rows, k) * (values_BK > 0)
    return (unit_rows(randn(seed, latents, d_model)), randn(seed + 1, rows, d_model), randn(seed + 2, rows, d_model),
            values_BK, indices_BK, dz_BK)


def fresh_moments(W_FD: Tensor, seed: int, touched: bool = False) -> Moments:
    updated_F = torch.full((len(W_FD),), 2, dtype=torch.int32, device=DEVICE) if touched else None
    return Moments(randn(seed, *W_FD.shape) * 0.1, randn(seed + 1, *W_FD.shape).square() * 0.01, updated_F)


@EXAMPLES
@given(rows=st.integers(1, 40), d_model=st.integers(2, 70), latents=st.integers(1, 90), share=st.floats(0, 1),
       hot=st.booleans(), touched=st.booleans(), role=ROLES, seed=st.integers(0, 2**31))
def test_update_of_rows(kernels, rows, d_model, latents, share, hot, touched, role, seed):
    k = max(1, round(share * latents))
    check_update(kernels, batch(seed, rows, latents, k, d_model, hot), touched, role, seed)


@pytest.mark.parametrize(("touched", "role"), [(False, "tied"), (True, "tied"), (False, "encoder"), (True, "decoder")])
def test_hot_latents_are_summed_in_parts(kernels, touched, role):
    """More rows than any backend takes at once, and one latent active in all of them."""
    check_update(kernels, batch(0, 2500, 6, 3, 9, True), touched, role, 0)


def update(kernels, role, W_FD, moments, pairs, e_BD, u_BD, adam):
    """Run the update of one role and return its result."""
    rows = {"tied": (e_BD, u_BD), "encoder": (u_BD,), "decoder": (e_BD,)}[role]
    return getattr(kernels, f"update_{role}")(W_FD, moments, pairs, *rows, adam)


def check_update(kernels, batch, touched, role, seed):
    W_FD, e_BD, u_BD, values_BK, indices_BK, dz_BK = batch
    adam = AdamStep(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, count=7)
    pairs = kernels.sort_pairs(values_BK, dz_BK, indices_BK, len(W_FD))
    got_W, got_moments = W_FD.clone(), fresh_moments(W_FD, seed, touched)
    biases = update(kernels, role, got_W, got_moments, pairs, e_BD, u_BD, adam)

    z_BF = torch.zeros(len(e_BD), len(W_FD), dtype=torch.float64, device=DEVICE)
    dz_BF = z_BF.scatter_add(1, indices_BK, dz_BK)
    z_BF = z_BF.scatter_add(1, indices_BK, values_BK)
    if role == "decoder":
        assert biases is None
    else:
        torch.testing.assert_close(biases[0], dz_BF.sum(0))
        torch.testing.assert_close(biases[1], dz_BF.sum(0) @ W_FD)
    dW_FD = z_BF.T @ e_BD * (role != "encoder") + dz_BF.T @ u_BD * (role != "decoder")
    if role != "encoder":
        dW_FD -= (dW_FD * W_FD).sum(1, keepdim=True) * W_FD
    moments = fresh_moments(W_FD, seed)
    steps = 5 if touched else 1
    first_FD = moments.first * 0.9**steps + 0.1 * dW_FD
    second_FD = moments.second * 0.99**steps + 0.01 * dW_FD**2
    step_FD = 0.01 * (first_FD / (1 - 0.9**7)) / ((second_FD / (1 - 0.99**7)).sqrt() + 1e-8)
    want_W = W_FD - step_FD if role == "encoder" else unit_rows(W_FD - step_FD)
    if touched:
        active_F1 = (z_BF > 0).any(0).unsqueeze(1)
        first_FD, second_FD = (torch.where(active_F1, new, old) for new, old in
                               ((first_FD, moments.first), (second_FD, moments.second)))
        want_W = torch.where(active_F1, want_W, W_FD)
        assert got_moments.updated.tolist() == torch.where(active_F1.squeeze(1), 7, 2).tolist()
    scale = 1 + float(dW_FD.abs().max())
    torch.testing.assert_close(got_moments.first, first_FD, rtol=1e-9, atol=1e-12 * scale)
    torch.testing.assert_close(got_moments.second, second_FD, rtol=1e-9, atol=1e-12 * scale**2)
    torch.testing.assert_close(got_W, want_W, rtol=1e-7, atol=1e-9)


def update_bf16(kernels, repeats: int, count: int = 1, role: str = "tied") -> Moments:
    """Moments in bfloat16 after updates with the same gradient, in float32."""
    W_FD, e_BD, u_BD, values_BK, indices_BK, dz_BK = (tensor.float() if tensor.is_floating_point() else tensor
                                                      for tensor in batch(5, 30, 40, 4, 24, False))
    moments = Moments(*(torch.zeros(40, 24, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)))
    pairs = kernels.sort_pairs(values_BK, dz_BK, indices_BK, 40)
    for step in range(repeats):
        update(kernels, role, W_FD, moments, pairs, e_BD, u_BD, AdamStep(0.0, 0.9, 0.999, 1e-8, count + step))
    return moments


@pytest.mark.parametrize("role", ["tied", "encoder", "decoder"])
def test_bf16_moments_are_the_same_everywhere(kernels, role):
    from olmoscope.kernels import reference

    found, wanted = (vars(update_bf16(backend, 3, role=role)).values() for backend in (kernels, reference))
    for got, want in zip(found, wanted, strict=True):
        if want is not None:  # the sums differ in their last bit, which rarely changes a rounding
            assert (got.view(torch.int16) != want.view(torch.int16)).double().mean() < 0.01


@pytest.mark.skipif(SLOW, reason="hundreds of steps; the test above says that the bits are the reference's")
def test_bf16_moments_are_right_on_average(kernels):
    """With a constant gradient the second moment grows to 1 − 0.999ⁿ of its square: rounded to nearest, it would stop
    growing at about an eighth of it."""
    steps = 400
    moments = update_bf16(kernels, steps)
    square = (moments.first.double() / (1 - 0.9**steps)).square()
    share = moments.second.double()[square > 0.01].sum() / square[square > 0.01].sum()
    assert float(share) == pytest.approx(1 - 0.999**steps, rel=0.03)


def test_pairs_beyond_the_last_offset_are_never_read(kernels):
    W_FD, e_BD, u_BD, values_BK, indices_BK, dz_BK = batch(1, 10, 20, 4, 8, False)
    pairs = kernels.sort_pairs(values_BK, dz_BK, indices_BK, 20)
    end = int(pairs.offsets[-1])
    assert end < len(pairs.rows)
    spoiled = SortedPairs(pairs.offsets, *(tensor.clone() for tensor in (pairs.rows, pairs.values, pairs.gradients)))
    spoiled.values[end:] = spoiled.gradients[end:] = float("nan")
    results = []
    for each in (pairs, spoiled):
        W = W_FD.clone()
        results.append((*kernels.update_tied(W, fresh_moments(W, 0), each, e_BD, u_BD,
                                                   AdamStep(0.1, 0.9, 0.999, 1e-8, 1)), W))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
