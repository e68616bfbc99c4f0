"""The benchmark of levers: without levers its step equals the product's; a change of space still gives an SAE of plain
rows."""

import json
import sys
from pathlib import Path

import pytest
import torch

from olmoscope.recipe.load import load_recipe
from olmoscope.train.adam import Adam
from olmoscope.train.derived import settled
from olmoscope.train.initialize import initialize
from olmoscope.train.step import Step

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from lever_spaces import whitened
from lever_step import Levers, LeverStep, Space
from lever_updates import aligned, orthogonalised
from levers import LEVERS
from synthetic import RECIPE

SAE = {"layer": 3, "d_sae": 256, "k": 4, "weights": "untied"}
STEPS = 40


@pytest.fixture(scope="module")
def rows():
    rng = torch.Generator().manual_seed(3)
    return torch.randn(STEPS * 32, 16, generator=rng) @ (torch.eye(16) + 0.1 * torch.randn(16, 16, generator=rng)) + 1


def trained(rows, levers=None, space=None):
    """An SAE by the product's step, or under levers."""
    recipe = load_recipe(str(RECIPE), overrides=[f"saes=[{json.dumps(SAE)}]", "train.batch=32"])
    spec, settings = recipe.saes[0], settled(recipe, recipe.saes[0])
    sae = initialize(16, spec.d_sae, spec.k, "none", rows.mean(dim=0), 0, "x", tied=False)
    step = (Step(sae, Adam.of(settings), settings.auxiliary) if levers is None
            else LeverStep(recipe, spec, sae, levers, STEPS, rows, space))
    for x_BD in torch.split(rows, 32):
        step(x_BD, 3e-3)
    return sae


def test_without_levers_it_is_the_step_of_the_product(rows):
    plain, same = trained(rows).state_dict(), trained(rows, Levers()).state_dict()
    assert all(torch.equal(plain[name], same[name]) for name in plain)


@pytest.mark.parametrize("name", LEVERS)
def test_each_lever_changes_the_sae_and_keeps_it_finite(rows, name):
    levers = LEVERS[name]
    if levers.frequency or levers.rare_decay or levers.resample:
        pytest.skip("acts on latents that are rare, frequent or dead, which takes longer to come")
    space = None if levers.space == "rows" else whitened(rows)
    plain, other = trained(rows).state_dict(), trained(rows, levers, space).state_dict()
    assert all(tensor.isfinite().all() for tensor in other.values())
    assert not torch.equal(plain["W_enc"], other["W_enc"])


def test_an_sae_of_another_space_reads_plain_rows(rows, monkeypatch):
    space = whitened(rows)
    there = (rows - space.origin_D) @ space.to_DD
    assert torch.cov(there.double().T) == pytest.approx(torch.eye(16).double(), abs=0.05)
    folded = trained(rows, Levers(space="whitened"), space)
    monkeypatch.setattr(LeverStep, "_leave", lambda step, space: None)
    inside = trained(rows, Levers(space="whitened"), space)
    back_DD = torch.linalg.inv(space.to_DD)
    found, wanted = folded.decode(folded.encode(rows)), inside.decode(inside.encode(there)) @ back_DD + space.origin_D
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(folded.encode(rows).indices, inside.encode(there).indices)


def test_a_lever_cannot_be_combined_with_a_finish(rows):
    recipe = load_recipe(str(RECIPE), overrides=[f"saes=[{json.dumps(SAE)}]"])
    sae = initialize(16, 256, 4, "none", rows.mean(dim=0), 0, "x", tied=False)
    step = LeverStep(recipe, recipe.saes[0], sae, Levers(), STEPS, rows, None)
    with pytest.raises(ValueError, match=r"train\.finish cannot be trained again"):
        step(rows[:32], 1e-3, pull=lambda x, y, e: e)


def test_updates():
    rng = torch.Generator().manual_seed(0)
    G_FD = torch.randn(64, 16, generator=rng)
    singular = torch.linalg.svdvals(orthogonalised(G_FD)) / 64**0.5
    assert ((singular > 0.6) & (singular < 1.3)).all()  # what Muon's five iterations give
    W_dec = torch.nn.functional.normalize(torch.randn(64, 16, generator=rng), dim=1)
    W_enc = torch.randn(64, 16, generator=rng)
    aligned(W_enc, W_dec)
    torch.testing.assert_close((W_enc * W_dec).sum(dim=1), torch.ones(64))
    assert isinstance(whitened(G_FD), Space)
