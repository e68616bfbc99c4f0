"""`decode`, `error` and `code_gradient` together give the fused `residual`, and each is right by itself.

Shapes: B rows, D d_model, F latents, K places.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernel_backends import BACKENDS, DEVICE, SLOW, backend
from kernel_draws import EXAMPLES, codes, randn
from olmoscope.kernels.interface import Residual

SIZES = {"rows": st.integers(1, 30), "d_model": st.integers(1, 70), "latents": st.integers(1, 90),
         "share": st.floats(0, 1), "shut": st.sampled_from([0.0, 0.3, 2.0]), "seed": st.integers(0, 2**31)}


@pytest.fixture(params=BACKENDS, scope="module")
def kernels(request):
    yield from backend(request.param)


def drawn(rows, d_model, latents, share, shut, seed, layer_norm=False, dtype=torch.float64):
    """x, codes, W, b and statistics, all of `dtype` except the indices."""
    values_BK, indices_BK = codes(seed, rows, latents, max(1, round(share * latents)), shut)
    floats = [randn(seed + 2, rows, d_model), values_BK, randn(seed, latents, d_model), randn(seed + 1, d_model)]
    statistics = [randn(seed + 3, rows, 1), randn(seed + 4, rows, 1).abs() + 0.1] if layer_norm else []
    x_BD, values_BK, W_FD, b_D, *statistics = (tensor.to(dtype) for tensor in (*floats, *statistics))
    return x_BD, values_BK, indices_BK, W_FD, b_D, *(statistics or (None, None))


def composed(kernels, x_BD, values_BK, indices_BK, W_FD, b_D, mean_B1, std_B1):
    xhat_BD = kernels.decode(values_BK, indices_BK, W_FD) + b_D
    loss_B, e_BD = kernels.error(x_BD, xhat_BD, len(x_BD), mean_B1, std_B1)
    return Residual(loss_B, e_BD, kernels.code_gradient(e_BD, values_BK, indices_BK, W_FD))


@EXAMPLES
@given(**SIZES, layer_norm=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_composed_they_are_the_fused_residual(kernels, layer_norm, dtype, **sizes):
    """Plain torch does the same sums in the same order, so its bits are the same; the others' sums differ in order."""
    arguments = drawn(layer_norm=layer_norm, dtype=dtype, **sizes)
    fused, parts = kernels.residual(*arguments), composed(kernels, *arguments)
    x_BD, values_BK, _, W_FD, _, _, std_B1 = arguments
    ulp = torch.finfo(dtype).eps
    # Rounding of a sum is in proportion to its terms: of x̂, of ‖e‖ ‖W‖, of ‖e‖², which cancellation does not shrink.
    reach_B = (values_BK.sum(1) * W_FD.abs().max() + 4) * (1 if std_B1 is None else std_B1[:, 0] + 1) + x_BD.norm(dim=1)
    power_B = x_BD.square().sum(1)
    std_B = torch.ones_like(power_B) if std_B1 is None else std_B1[:, 0]
    e_B = 2 * std_B / (len(x_BD) * power_B) * reach_B
    limits = {"loss_B": reach_B**2 * x_BD.shape[1] / power_B, "e_BD": e_B[:, None],
              "dz_BK": (e_B * x_BD.shape[1] * W_FD.abs().max())[:, None]}
    for name, limit in limits.items():
        one, other = getattr(fused, name), getattr(parts, name)
        assert one.dtype == other.dtype
        if kernels.__name__.endswith("reference"):
            assert torch.equal(one, other), name
        assert ((one - other).abs() <= 16 * ulp * limit).all(), name


@EXAMPLES
@given(**SIZES, layer_norm=st.booleans(), more=st.integers(0, 50))
def test_error_against_autograd(kernels, layer_norm, more, **sizes):
    """Here the rows are part of a larger batch."""
    x_BD, *_, mean_B1, std_B1 = drawn(layer_norm=layer_norm, **sizes)
    normal_BD = randn(sizes["seed"] + 9, *x_BD.shape).requires_grad_()
    xhat_BD = normal_BD * std_B1 + mean_B1 if layer_norm else normal_BD
    wanted_B = (xhat_BD - x_BD).square().sum(1) / x_BD.square().sum(1)
    (wanted_B.sum() / (len(x_BD) + more)).backward()
    given_BD = normal_BD.detach().clone()
    loss_B, e_BD = kernels.error(x_BD, given_BD, len(x_BD) + more, mean_B1, std_B1)
    assert loss_B.dtype == torch.float64 and torch.equal(given_BD, normal_BD.detach())
    torch.testing.assert_close(loss_B, wanted_B.detach())
    torch.testing.assert_close(e_BD, normal_BD.grad)


@pytest.mark.parametrize("d_model", [1, 64, 100, 5000])
def test_float32_error_against_float64(kernels, d_model):
    """This holds also for rows wider than a tile of the GPU's kernel."""
    x_BD, xhat_BD = randn(0, 3 if SLOW else 20, d_model), randn(1, 3 if SLOW else 20, d_model)
    loss_B, e_BD = kernels.error(x_BD.float(), xhat_BD.float(), 100, None, None)
    wanted_B = (xhat_BD - x_BD).square().sum(1) / x_BD.square().sum(1)
    torch.testing.assert_close(loss_B, wanted_B, rtol=2e-5, atol=1e-6)
    power_B1 = x_BD.square().sum(1, keepdim=True)
    torch.testing.assert_close(e_BD.double(), (xhat_BD - x_BD) * 2 / (100 * power_B1), rtol=2e-5, atol=1e-7)


@EXAMPLES
@given(**SIZES, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_decode_against_a_dense_product(kernels, dtype, **sizes):
    """Values may have any sign; codes without places or without rows are valid."""
    _, values_BK, indices_BK, W_FD, *_ = drawn(**sizes)
    values_BK = torch.where(values_BK > 0, randn(sizes["seed"] + 7, *values_BK.shape), 0)
    z_BF = values_BK.new_zeros(len(values_BK), len(W_FD)).scatter(1, indices_BK, values_BK)
    got_BD = kernels.decode(values_BK.to(dtype), indices_BK, W_FD.to(dtype))
    torch.testing.assert_close(got_BD.double(), z_BF @ W_FD, **({"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32
                                                                 else {"rtol": 1e-9, "atol": 1e-11}))
    assert not kernels.decode(values_BK[:, :0], indices_BK[:, :0], W_FD).any()
    assert kernels.decode(values_BK[:0], indices_BK[:0], W_FD).shape == (0, W_FD.shape[1])


def test_decode_does_not_read_latents_behind_the_last_active_one(kernels):
    values_BK, indices_BK = randn(1, 3, 4) * 0, torch.full((3, 4), 5, device=DEVICE)
    values_BK[:, 0], indices_BK[:, 0], W_FD = 2.0, torch.arange(3, device=DEVICE), randn(0, 6, 7)
    wanted_BD = 2 * W_FD[:3]
    if not kernels.__name__.endswith("reference"):
        W_FD[5] = torch.nan
    torch.testing.assert_close(kernels.decode(values_BK, indices_BK, W_FD), wanted_BD)


@EXAMPLES
@given(**SIZES)
def test_code_gradient_of_active_places(kernels, **sizes):
    e_BD, values_BK, indices_BK, W_FD, *_ = drawn(**sizes)
    dz_BK = kernels.code_gradient(e_BD, values_BK, indices_BK, W_FD)
    wanted_BK = (e_BD @ W_FD.T).gather(1, indices_BK)
    torch.testing.assert_close(dz_BK, torch.where(values_BK > 0, wanted_BK, 0))


def test_more_places_than_a_tile_holds(kernels):
    e_BD, W_FD = randn(0, 2, 5), randn(1, 1100, 5)
    values_BK, indices_BK = codes(2, 2, 1100, 1050)
    dz_BK = kernels.code_gradient(e_BD, values_BK, indices_BK, W_FD)
    torch.testing.assert_close(dz_BK, torch.where(values_BK > 0, (e_BD @ W_FD.T).gather(1, indices_BK), 0))


def test_an_inactive_place_is_shut_wherever_it_stands_and_its_latent_is_not_read(kernels):
    """Zeros may be between active places; a NaN in a latent that is not active must not spread."""
    values_BK, indices_BK = codes(0, 20, 30, 6, 0.0)
    values_BK[:, [0, 2]] = 0
    values_BK[:, 1] = 1e-30  # from JumpReLU's rule: practically 0, but its gradient is needed
    indices_BK = torch.where(indices_BK == 7, 8, indices_BK)
    indices_BK[:, 0] = 7
    W_FD, e_BD = randn(1, 30, 9), randn(2, 20, 9)
    wanted_BK = torch.where(values_BK > 0, (e_BD @ W_FD.T).gather(1, indices_BK), 0)
    if not kernels.__name__.endswith("reference"):
        W_FD[7] = torch.nan
    torch.testing.assert_close(kernels.code_gradient(e_BD, values_BK, indices_BK, W_FD), wanted_BK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_zeros_has_no_loss_and_a_nan_shows(kernels, dtype):
    x_BD, xhat_BD = randn(2, 3, 8).to(dtype), randn(3, 3, 8).to(dtype)
    x_BD[1] = 0
    for statistics in ((None, None), (x_BD.mean(1, keepdim=True), x_BD.std(1, keepdim=True))):
        loss_B, e_BD = kernels.error(x_BD, xhat_BD, 3, *statistics)
        assert loss_B.isfinite().all() and e_BD.isfinite().all()
        assert not loss_B[1] and not e_BD[1].any() and loss_B[0] and e_BD[2].any()
    xhat_BD[0, 0] = torch.nan
    loss_B, e_BD = kernels.error(x_BD, xhat_BD, 3, None, None)
    assert loss_B[0].isnan() and e_BD[0, 0].isnan() and loss_B[2].isfinite()


def test_shards_of_a_dictionary_add_up_to_the_whole(kernels):
    """As a trainer on several devices uses them: partial reconstructions by shard, one error, code gradients by shard.
    """
    x_BD, values_BK, indices_BK, W_FD, b_D, mean_B1, std_B1 = drawn(25, 40, 60, 0.2, 0.3, 5, layer_norm=True)
    whole = kernels.residual(x_BD, values_BK, indices_BK, W_FD, b_D, mean_B1, std_B1)
    bounds = (0, 13, 40, 60)
    shards = []
    for start, stop in pairwise(bounds):
        mine_BK = (indices_BK >= start) & (indices_BK < stop)
        shards.append((torch.where(mine_BK, values_BK, 0), torch.where(mine_BK, indices_BK - start, 0),
                       W_FD[start:stop]))
    xhat_BD = sum(kernels.decode(*shard) for shard in shards) + b_D
    halves = [kernels.error(x_BD[part], xhat_BD[part], 25, mean_B1[part], std_B1[part])
              for part in (slice(0, 11), slice(11, 25))]
    loss_B, e_BD = (torch.cat(parts) for parts in zip(*halves, strict=True))
    torch.testing.assert_close(loss_B, whole.loss_B)
    torch.testing.assert_close(e_BD, whole.e_BD)
    dz_BK = sum(kernels.code_gradient(e_BD, *shard) for shard in shards)
    torch.testing.assert_close(dz_BK, whole.dz_BK)

