"""The auxiliary loss: its value and gradients against autograd in float64, and that it revives latents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_backends import BACKENDS, DEVICE, FEW, SLOW, backend
from olmoscope.sae.normalize import normalize_rows, restore_rows
from olmoscope.sae.topk import TopK
from olmoscope.train.adam import Adam
from olmoscope.train.auxiliary import REFRESH_STEPS
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.initialize import initialize
from olmoscope.train.step import Step

ADAM = Adam((0.9, 0.999), 1e-8)


@pytest.fixture(params=BACKENDS, scope="module")
def kernels(request):
    yield from backend(request.param)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device=DEVICE)


def double(sae: TopK) -> TopK:
    return sae.to(dtype=torch.float64)


def dense_losses(x_BD, sae, parameters, dead_M, k_aux):
    """Main and auxiliary loss written densely for autograd."""
    W_enc_FD, W_dec_FD, b_latent_F, b_pre_D = parameters if len(parameters) == 4 else [parameters[0], *parameters]
    n_BD, statistics = normalize_rows(x_BD, sae.normalize)
    std_B1 = torch.ones_like(x_BD[:, :1]) if statistics is None else statistics.std_B1
    power_B = x_BD.square().sum(1)
    pre_BF = (n_BD - b_pre_D) @ W_enc_FD.T + b_latent_F

    def code(pre, k):
        top = pre.topk(k, dim=1)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values).relu()

    error_BD = x_BD - restore_rows(code(pre_BF, sae.k) @ W_dec_FD + b_pre_D, statistics)
    added_BD = std_B1 * (code(pre_BF[:, dead_M], k_aux) @ W_dec_FD[dead_M])
    main = (error_BD.square().sum(1) / power_B).mean()
    return main, ((error_BD.detach() - added_BD).square().sum(1) / power_B).mean()


@settings(max_examples=6 if FEW else 40, deadline=None)
@given(d_model=st.integers(3, 33), d_sae=st.integers(2, 70), rows=st.integers(1, 40), seed=st.integers(0, 2**31),
       normalize=st.sampled_from(["none", "layer_norm"]), dead=st.floats(0.05, 1), k_aux=st.integers(1, 80),
       weight=st.sampled_from([1 / 32, 3.0]), shift=st.sampled_from([0.0, -50.0]), tied=st.booleans())
def test_gradients_equal_autograd(kernels, d_model, d_sae, rows, seed, normalize, dead, k_aux, weight, shift, tied):
    sae = double(initialize(d_model, d_sae, max(1, d_sae // 8), normalize, randn(seed, d_model), seed, tied=tied))
    sae.b_latent += randn(seed + 1, d_sae) * 0.1 + shift
    x_BD = randn(seed + 2, rows, d_model)
    order_F = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    dead_M = order_F[: max(1, round(dead * d_sae))]
    parameters = [p.clone().requires_grad_() for p in sae.state_dict().values()]
    main, auxiliary = dense_losses(x_BD, sae, parameters, dead_M, min(k_aux, len(dead_M)))
    expected = list(torch.autograd.grad(main + weight * auxiliary, parameters))
    expected[-3] -= (expected[-3] * sae.W_dec).sum(1, keepdim=True) * sae.W_dec

    step = Step(sae, Adam((0.0, 0.999), 1e-8), SettledAuxiliary(weight=weight, k=k_aux, dead_window=100), kernels)
    step.tokens = 100
    step.last_fired_F += 1
    step.last_fired_F[dead_M] = 0
    step(x_BD, lr=1.0)
    sums = step.take_sums()
    assert sums.auxiliary_rows == rows
    assert sums.auxiliary / rows == pytest.approx(float(auxiliary.detach()), rel=1e-9)
    assert sums.loss / rows == pytest.approx(float(main.detach()), rel=1e-9)
    for (name, moments), want in zip(step.moments.items(), expected, strict=True):
        scale = 1 + float(want.abs().max())
        torch.testing.assert_close(moments.first, want, rtol=1e-9, atol=1e-11 * scale, msg=name)


def test_without_dead_latents_it_is_the_plain_step(kernels):
    plain, other = (Step(double(initialize(12, 40, 4, "none", zeros(12), 0)), ADAM, auxiliary, kernels)
                    for auxiliary in (None, SettledAuxiliary(dead_window=10_000, k=6)))
    for seed in range(3):
        for step in (plain, other):
            step(randn(seed, 20, 12), lr=1e-2)
    assert torch.equal(plain.sae.W_dec, other.sae.W_dec)
    assert other.take_sums().auxiliary_rows == 0


def test_rows_with_nothing_left_or_no_spread_teach_nothing(kernels):
    """A constant row of a layer-norm SAE, and one that is reconstructed up to rounding: finite, and no gradient."""
    sae = initialize(6, 30, 2, "layer_norm", zeros(6), 0)
    step = Step(sae, Adam((0.0, 0.999), 1e-8), SettledAuxiliary(weight=1.0, dead_window=1, k=3), kernels)
    step.tokens, alive = 10, 30
    step.last_fired_F[:alive // 2] = 10
    step(torch.tensor([[0.5], [2.0], [4.0], [-1.0]], device=DEVICE).expand(4, 6), lr=1e-3)
    assert all(torch.isfinite(tensor).all() for tensor in step.tensors().values())
    assert not step.moments["W"].first[alive // 2 :].any()


def test_only_the_main_code_counts_as_firing(kernels):
    sae = double(initialize(8, 16, 2, "none", zeros(8), 0))
    rows = 5 if SLOW else 20
    step = Step(sae, ADAM, SettledAuxiliary(dead_window=rows, k=4), kernels)
    step.sae.b_latent[3] = -1000
    step.sae.W_dec[3] = 8**-0.5
    for seed in range(2 * REFRESH_STEPS):
        step(randn(seed, rows, 8), lr=0)
    assert step.auxiliary.dead_F[3] and step.last_fired_F[3] == 0
    assert step.take_sums().l0 <= 2 * rows * 2 * REFRESH_STEPS


@pytest.mark.skipif(SLOW, reason="hundreds of steps")
def test_it_revives_latents(kernels):
    """Rows made of 60 directions, and a dictionary most of which looks the wrong way at first."""
    directions = torch.nn.functional.normalize(torch.randn(60, 32, generator=torch.Generator().manual_seed(0)))
    dead = []
    for auxiliary in (None, SettledAuxiliary(dead_window=1000, k=8)):
        step = Step(initialize(32, 256, 3, "none", zeros(32), 0), ADAM, auxiliary, kernels)
        step.sae.b_latent[:200] = -1
        draw = torch.Generator().manual_seed(1)
        for _ in range(400):
            places = torch.rand(64, 60, generator=draw).topk(3).indices
            x_BD = directions[places].mul(1 + torch.rand(64, 3, 1, generator=draw)).sum(1)
            step(x_BD.to(DEVICE), lr=3e-3)
        dead.append(step.dead_share(5000))
    assert dead[0] > 0.5
    assert dead[1] < 0.7 * dead[0]


def test_the_lift_raises_a_dead_latent_until_it_fires(kernels):
    """At rate 0 only the lift moves a bias: by lift times the mean activation in a window, until the latent fires."""
    sae = double(initialize(8, 16, 2, "none", zeros(8), 0))
    step = Step(sae, ADAM, SettledAuxiliary(dead_window=40, k=4, lift=0.5), kernels)
    sae.b_latent[3] = -3.0
    values_BK = sae.encode(randn(0, 20, 8).double()).values
    biases = []
    for _ in range(20 * REFRESH_STEPS):
        step(randn(0, 20, 8), lr=0)
        biases.append(float(sae.b_latent[3]))
        if step.last_fired_F[3] > 0:
            break
    rises = torch.tensor(biases).diff()
    assert rises[: REFRESH_STEPS - 1].abs().max() == 0  # not yet looked up
    assert rises[REFRESH_STEPS].item() == pytest.approx(0.5 * float(values_BK[values_BK > 0].mean()) * 20 / 40)
    assert step.last_fired_F[3] > 0
    still = Step(double(initialize(8, 16, 2, "none", zeros(8), 0)), ADAM,
                 SettledAuxiliary(dead_window=40, k=4, lift=0.0), kernels)
    for _ in range(2 * REFRESH_STEPS):
        still(randn(0, 20, 8), lr=0)
    assert still.sae.b_latent.abs().max() == 0


def test_without_weight_only_the_lift_is_left(kernels):
    rows = 5 if SLOW else 20
    step = Step(double(initialize(8, 64, 2, "none", zeros(8), 0)), ADAM,
                SettledAuxiliary(weight=0.0, dead_window=2 * rows, k=4), kernels)
    step.sae.b_latent[:32] = -9
    for seed in range(2 * REFRESH_STEPS):
        step(randn(seed, rows, 8), lr=1e-3)
    assert step.auxiliary.dead_F[:32].all() and step.take_sums().auxiliary_rows == 0
    assert (step.sae.b_latent[:32] > -9).all()
    assert not step.moments["W"].first[:32].any()
