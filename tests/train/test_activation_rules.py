"""Every activation rule, plain and nested: values and gradients equal dense float64 autograd, and training works."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_backends import BACKENDS, DEVICE, FEW, SLOW, backend
from olmoscope.recipe.schema import Candidates
from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.io.checkpoint import read_checkpoint
from olmoscope.sae.normalize import normalize_rows, restore_rows
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.train.activation_rules import BANDWIDTH, CAP, DRIFT, RULES, SPARSITY
from olmoscope.train.adam import Adam
from olmoscope.train.checkpoint import load_checkpoint, save_checkpoint
from olmoscope.train.initialize import initialize
from olmoscope.train.nested import prefix_ends
from olmoscope.train.step import Step

ADAM = Adam((0.9, 0.999), 1e-8)


@pytest.fixture(params=BACKENDS, scope="module")
def kernels(request):
    yield from backend(request.param)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def fresh(d_model, d_sae, k, normalize, seed=0, tied=True) -> TopK:
    sae = initialize(d_model, d_sae, k, normalize, randn(seed, d_model), seed, tied=tied)
    sae = sae.to(dtype=torch.float64)
    if not tied:
        sae.W_enc.add_(randn(seed + 4, d_sae, d_model) * 0.2)
    sae.b_latent += randn(seed + 1, d_sae) * 0.1
    return sae


class Jump(torch.autograd.Function):
    """z and the count of active latents, with the estimated gradients of both for t = log θ."""

    @staticmethod
    def forward(ctx, p_BF, t_F, looked_at_BF):
        ctx.save_for_backward(p_BF, t_F, looked_at_BF)
        active_BF = (p_BF > t_F.exp()) & looked_at_BF
        return p_BF * active_BF, active_BF.double()

    @staticmethod
    def backward(ctx, dz_BF, dh_BF):
        p_BF, t_F, looked_at_BF = ctx.saved_tensors
        threshold_F = t_F.exp()
        width_F = BANDWIDTH * threshold_F
        near_BF = ((p_BF - threshold_F).abs() < width_F / 2) & looked_at_BF
        dtheta_F = (-(threshold_F / width_F) * near_BF * dz_BF - near_BF / width_F * dh_BF).sum(0)
        return dz_BF * ((p_BF > threshold_F) & looked_at_BF), dtheta_F * threshold_F, None


def first_of(values_BF: Tensor, places: int) -> Tensor:
    return torch.zeros_like(values_BF).scatter(1, values_BF.topk(places, dim=1).indices, 1).bool()


def dense_codes(activation, p_BF, k, t_F) -> tuple[Tensor, Tensor]:
    """z, and a sparsity loss."""
    rows, d_sae = p_BF.shape
    places = min(d_sae, CAP * k)
    none = p_BF.new_zeros(())
    if activation == "topk":
        return p_BF.relu() * first_of(p_BF, k), none
    if activation == "groupmax":
        groups = p_BF.unflatten(1, (k, -1))
        return (p_BF * (groups == groups.amax(2, keepdim=True)).flatten(1)).relu(), none
    if activation == "batchtopk":
        looked_at_BF = p_BF.relu() * first_of(p_BF, places)
        largest = looked_at_BF.flatten().topk(rows * k).indices
        return looked_at_BF * torch.zeros_like(p_BF).flatten().scatter(0, largest, 1).view(rows, -1), none
    looked_at_BF = first_of((p_BF - t_F.exp() * (1 - BANDWIDTH / 2)).detach(), places)
    z_BF, active_BF = Jump.apply(p_BF, t_F, looked_at_BF)
    return z_BF, SPARSITY * (active_BF.sum() / (rows * k) - 1) ** 2 + DRIFT * t_F.mean()


def dense_loss(x_BD, sae, parameters, activation, shares, t_F, v_BD) -> Tensor:
    *matrices, b_latent_F, b_pre_D = parameters
    n_BD, statistics = normalize_rows(x_BD, sae.normalize)
    z_BF, loss = dense_codes(activation, (n_BD - b_pre_D) @ matrices[0].T + b_latent_F, sae.k, t_F)
    stops = prefix_ends(shares, sae.d_sae)
    for stop in stops:
        xhat_BD = restore_rows(z_BF[:, :stop] @ matrices[-1][:stop] + b_pre_D, statistics)
        loss = loss + ((xhat_BD - x_BD).square().sum(1) / x_BD.square().sum(1)).mean() / len(stops)
    return loss + (xhat_BD * v_BD).sum()  # another loss of the whole reconstruction, whose gradient there is v


@settings(max_examples=6 if FEW else 60, deadline=None)
@given(activation=st.sampled_from(sorted(RULES)), shares=st.sampled_from([(), (0.3,), (0.1, 0.5)]),
       d_model=st.integers(3, 33), size=st.integers(2, 14), rows=st.integers(1, 40), k=st.integers(1, 5),
       seed=st.integers(0, 2**31), normalize=st.sampled_from(["none", "layer_norm"]), tied=st.booleans(),
       pulled=st.booleans())
def test_gradients_equal_autograd(kernels, activation, shares, d_model, size, rows, k, seed, normalize, tied, pulled):
    sae = fresh(d_model, k * size, k, normalize, seed, tied)
    x_BD = randn(seed + 2, rows, d_model)
    step = Step(sae, Adam((0.0, 0.999), 1e-8), activation=activation, matryoshka=shares, kernels=kernels)
    step.rule.start(sae.center(x_BD)[0])
    t_F = None
    if activation == "jumprelu":  # thresholds that differ
        step.rule.log_threshold_F += randn(seed + 3, sae.d_sae) * 0.5
        t_F = step.rule.log_threshold_F.clone().requires_grad_()
    step.count = 1
    parameters = [p.clone().requires_grad_() for p in sae.state_dict().values()]
    wanted = parameters if t_F is None else [*parameters, t_F]
    v_BD = pulled * randn(seed + 4, rows, d_model)
    expected = list(torch.autograd.grad(dense_loss(x_BD, sae, parameters, activation, shares, t_F, v_BD), wanted))
    decoder = expected[0 if tied else 1]
    decoder -= (decoder * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    step(x_BD, lr=1.0, pull=(lambda xhat_BD, y_BD, e_BD: v_BD) if pulled else None)
    moments = step.moments | ({} if t_F is None else {"log_threshold": step.rule.moments})
    # With β₁ = 0 the first moment is the gradient.
    for (name, got), want in zip(moments.items(), expected, strict=True):
        torch.testing.assert_close(got.first, want, rtol=1e-9, atol=1e-11 * (1 + float(want.abs().max())), msg=name)


@settings(max_examples=10 if FEW else 30, deadline=None)
@given(size=st.integers(1, 20), rows=st.integers(1, 40), k=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_group_max_is_the_largest_of_each_group(size, rows, k, seed):
    sae = GroupMax.from_state_dict(fresh(9, k * size, k, "none", seed).state_dict(), k=k, normalize="none")
    x_BD = randn(seed + 2, rows, 9)
    codes = sae.encode(x_BD)
    z_BF, _ = dense_codes("groupmax", sae.center(x_BD)[0] @ sae.W_enc.T + sae.b_latent, k, None)
    torch.testing.assert_close(codes.to_dense(), z_BF)
    assert (codes.values.diff(dim=1) <= 0).all()
    assert all(len(row.unique()) == k for row in codes.indices // size)


def structured_rows(seed: int, rows: int = 256) -> Tensor:
    """Rows of 20 dimensions made of a few of 60 directions, one of them more often than the others."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(60, 20, generator=generator))
    generator.manual_seed(seed)
    chosen = torch.rand(rows, 60, generator=generator) < torch.linspace(0.01, 0.2, 60)
    return ((chosen * (1 + torch.rand(rows, 60, generator=generator))) @ directions + 0.5).to(DEVICE)


def trained(activation, path, steps=150, matryoshka=()) -> tuple[Step, TopK | JumpReLU]:
    step = Step(initialize(20, 96, 4, "none", structured_rows(0).mean(0), 0), ADAM, activation=activation,
                matryoshka=matryoshka)
    for number in range(steps):
        step(structured_rows(number), lr=1e-2 * min(1.0, (steps - number) / 40))
        if number == steps - 21:
            step.take_sums()
    save_checkpoint(path, step, {})
    return step, read_checkpoint(path).to(DEVICE)


@pytest.mark.skipif(SLOW, reason="hundreds of steps")
@pytest.mark.parametrize("matryoshka", [(), (0.25,)])
@pytest.mark.parametrize("activation", sorted(RULES))
def test_what_is_trained_does_on_other_rows_what_it_did_in_training(activation, matryoshka, tmp_path):
    step, sae = trained(activation, tmp_path / "checkpoint", matryoshka=matryoshka)
    assert type(sae) is {"topk": TopK, "groupmax": GroupMax}.get(activation, JumpReLU)
    sums = step.take_sums()
    loss, l0 = sums.loss / (20 * 256), sums.l0 / (20 * 256)
    x_BD = structured_rows(10**6, 4096)
    xhat_BD, codes = sae.reconstruct(x_BD)
    assert float(((xhat_BD - x_BD).square().sum(1) / x_BD.square().sum(1)).mean()) == pytest.approx(loss, rel=0.1)
    assert float(codes.l0().double().mean()) == pytest.approx(l0, rel=0.05)
    assert loss < 0.25
    if activation != "groupmax":
        assert l0 == pytest.approx(4, rel=0.1 if activation == "jumprelu" else 0.03)


def test_a_batch_has_k_latents_a_row_and_a_row_at_most_the_cap():
    """Rows of large and of small activations: TopK gives each of them k, BatchTopK the large ones more."""
    x_BD = randn(0, 100, 16) * torch.linspace(0.05, 3, 100, device=DEVICE)[:, None]
    sae = fresh(16, 256, 3, "none")
    step = Step(sae, ADAM, activation="batchtopk")
    values_BK, _ = step.rule.encode(u_BD := sae.center(x_BD)[0])
    p_BF = (u_BD @ sae.W_enc.T + sae.b_latent).relu()
    assert values_BK.count_nonzero() == 300
    assert values_BK.shape[1] == 12 == values_BK.count_nonzero(dim=1).max()
    assert values_BK.count_nonzero(dim=1).min() < 3
    assert step.rule.capped(values_BK) == (values_BK.count_nonzero(dim=1) == 12).sum() > 0
    least = values_BK[values_BK > 0].min()
    assert ((p_BF >= least).sum(1).clamp_max(12) == values_BK.count_nonzero(dim=1)).all()
    assert float(step.rule.threshold) == pytest.approx(float(least))
    for _ in range(3):
        step.rule.encode(u_BD * 2)
    assert float(least) < float(step.rule.threshold) < float(2 * least)


@pytest.mark.skipif(SLOW, reason="candidates have tests of their own")
@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_candidates_from_an_8_bit_product_give_the_same_codes(activation):
    sae = initialize(64, 512, 4, "none", torch.zeros(64, device=DEVICE), 0)
    exact, search = (Step(sae, ADAM, activation=activation, candidates=candidates)
                     for candidates in (None, Candidates(margin=64)))
    u_BD = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    codes = []
    for step in (exact, search):
        step.rule.start(u_BD)
        codes.append(SparseCodes(*step.rule.encode(u_BD), 512).to_dense())
    differ = (codes[0] > 1e-20) != (codes[1] > 1e-20)
    assert differ.sum() <= 2 and (codes[0] > 1e-20).sum() > 700
    torch.testing.assert_close(codes[0].masked_fill(differ, 0), codes[1].masked_fill(differ, 0))
    assert search.candidates.take_found() > 0.999


@pytest.mark.skipif(SLOW, reason="a matter of the checkpoint")
@pytest.mark.parametrize("activation", sorted(RULES))
def test_a_checkpoint_goes_on_bit_for_bit(activation, tmp_path):
    def step():
        return Step(initialize(20, 96, 4, "none", torch.zeros(20, device=DEVICE), 0), ADAM, activation=activation,
                    matryoshka=() if activation == "groupmax" else (0.25, 0.5))

    whole, first, second = step(), step(), step()
    for number in range(10):
        whole(structured_rows(number), lr=1e-2)
    for number in range(6):
        first(structured_rows(number), lr=1e-2)
    save_checkpoint(tmp_path / "checkpoint", first, {})
    load_checkpoint(tmp_path / "checkpoint", second)
    for number in range(6, 10):
        second(structured_rows(number), lr=1e-2)
    states = whole.tensors(), second.tensors()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
