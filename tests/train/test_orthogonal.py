"""Similar decoder rows move apart: a step of descent on the penalty, which lowers cosines in training."""

from dataclasses import replace

import pytest
import torch

from helpers import recipe
from olmoscope.errors import UserError
from olmoscope.recipe.load import load_recipe
from olmoscope.train import orthogonal as module
from olmoscope.train.adam import Adam
from olmoscope.train.initialize import initialize
from olmoscope.train.orthogonal import EVERY, move_apart
from olmoscope.train.step import Step

ADAM = Adam((0.9, 0.999), 1e-8)


def unit_rows(count, width, seed=0):
    W_FD = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return W_FD / W_FD.norm(dim=1, keepdim=True)


def test_it_is_a_step_of_descent_on_the_squared_cosine():
    W_FD = unit_rows(20, 6)
    moved_FD, rate, strength = W_FD.clone(), 0.01, 0.5
    move_apart(moved_FD, strength, ADAM.at(EVERY, rate), batch=20)
    free_FD = W_FD.clone().requires_grad_()
    cosine_FF = free_FD @ W_FD.T / free_FD.norm(dim=1, keepdim=True)  # the other row stays
    half = (cosine_FF - torch.eye(20)).square().amax(dim=1).sum() / 2
    (gradient_FD,) = torch.autograd.grad(half, free_FD)
    expected_FD = W_FD - strength * rate * 6**0.5 * gradient_FD
    torch.testing.assert_close(moved_FD, expected_FD / expected_FD.norm(dim=1, keepdim=True))


def test_only_every_few_steps_and_in_other_chunks_each_time(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST_CHUNK", 5)
    W_FD = unit_rows(23, 8)

    def moved(count, shard=0, batch=3):
        rows_FD = W_FD.clone()
        move_apart(rows_FD, 0.5, replace(ADAM.at(count, 0.1), shard=shard), batch)
        return rows_FD

    for count in range(1, EVERY):
        assert torch.equal(moved(count), W_FD)
    first = moved(EVERY)
    assert torch.equal(first, moved(EVERY)) and not torch.equal(first, W_FD)
    for other in (moved(2 * EVERY), moved(EVERY, shard=1), moved(EVERY, batch=12)):
        assert not torch.equal(other, first)
        torch.testing.assert_close(other.norm(dim=1), torch.ones(23, dtype=torch.float64))


def test_a_row_alone_in_its_chunk_stays():
    W_FD = unit_rows(1, 4)
    move_apart(W_FD, 1.0, ADAM.at(EVERY, 0.1), batch=8)
    torch.testing.assert_close(W_FD, unit_rows(1, 4))


def test_trained_rows_are_less_alike():
    """Rows that are sums of few of 40 directions, for an SAE with more latents than directions."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(40, 24, generator=generator)

    def trained(strength):
        step = Step(initialize(24, 96, 4, "none", torch.zeros(24), 0, tied=False), ADAM, orthogonal=strength)
        draw = torch.Generator().manual_seed(2)
        for _ in range(300):
            codes = torch.rand(64, 40, generator=draw) * (torch.rand(64, 40, generator=draw) < 0.1)
            step(codes @ directions, lr=3e-3)
        W_FD = step.sae.W_dec
        torch.testing.assert_close(W_FD.norm(dim=1), torch.ones(96))
        return float((W_FD @ W_FD.T).fill_diagonal_(0).amax(dim=1).mean()), step.take_sums().loss / step.tokens

    (alike, loss), (apart, loss_apart) = trained(0.0), trained(4.0)
    assert apart < 0.9 * alike
    assert loss_apart < 1.1 * loss


def test_it_needs_a_decoder_of_its_own(tmp_path):
    with pytest.raises(UserError, match=r"saes.0: train.orthogonal is for decoders that are not tied .*; set weights: "
                                        "untied or train: {orthogonal: 0}"):
        load_recipe(recipe(tmp_path), overrides=["train.orthogonal=0.8"])
    with pytest.raises(UserError, match=r"train.orthogonal: .*greater than or equal to 0"):
        load_recipe("tiny", overrides=["train.orthogonal=-1"])
    changed, base, said = (load_recipe("tiny", overrides=["model.dtype=float32", *more]) for more in (
        ["train.orthogonal=0.8"], [], ["train.orthogonal=0.0"]))
    hashes = [found.run_hash(found.saes[0]) for found in (changed, base, said)]
    assert hashes[0] != hashes[1] == hashes[2]
