"""Steering: an edit without effect changes no bit, and any other edit changes rows as computed in float64."""

import itertools

import pytest
import torch

from helpers import small_model, streams
from olmoscope.features.steer import Continuation, Edit, activation_of, pick, steer_rows, steering
from olmoscope.sae.normalize import Normalize
from olmoscope.sae.topk import TopK
from olmoscope.seeds import generator
from olmoscope.train.initialize import initialize

LAYER = 1
TOKENS = [5, 17, 300, 41, 8, 5, 99]


def small_sae(normalize: Normalize = "none", d_model: int = 32) -> TopK:
    sae = initialize(d_model, 64, 8, normalize, torch.zeros(d_model), seed=1)
    sae.b_latent += 0.1
    return sae


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_nothing_changes_by_zero_or_by_the_natural_value(normalize: Normalize, dtype: torch.dtype) -> None:
    sae = small_sae(normalize)
    x_BD = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    assert torch.equal(steer_rows(sae, x_BD, []), x_BD)
    assert torch.equal(steer_rows(sae, x_BD, [Edit(feature, "add", 0.0) for feature in range(64)]), x_BD)
    for row in range(len(x_BD)):
        one_1D = x_BD[row : row + 1]
        natural = [Edit(feature, "clamp", float(activation_of(sae, one_1D, feature))) for feature in range(64)]
        assert torch.equal(steer_rows(sae, one_1D, natural), one_1D)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_edits_move_along_the_direction_by_what_was_asked(normalize: Normalize) -> None:
    sae = small_sae(normalize)
    x_BD = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * 3
    codes_BF = sae.encode(x_BD).to_dense().double()
    scale_B1 = x_BD.double().std(dim=1, keepdim=True) if normalize == "layer_norm" else 1.0
    direction_FD = sae.W_dec.double()
    moved_BD = scale_B1 * (2.5 * direction_FD[3] + (7.0 - codes_BF[:, 9:10]) * direction_FD[9])
    steered_BD = steer_rows(sae, x_BD, [Edit(3, "add", 2.5), Edit(9, "clamp", 7.0)])
    torch.testing.assert_close(steered_BD.double(), x_BD.double() + moved_BD, rtol=0, atol=1e-5)
    assert (activation_of(sae, x_BD, 9) > 0).any(), "the clamp has something to take away"


def test_a_model_steered_by_nothing_is_the_model() -> None:
    model, sae, ids = small_model("Olmo3"), small_sae(), torch.tensor([TOKENS])
    layer, = streams(model.model.layers, [LAYER])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with steering(layer, sae, [Edit(feature, "add", 0.0) for feature in range(64)]):
            assert torch.equal(model(input_ids=ids).logits, plain)
        with steering(layer, sae, [Edit(2, "add", 5.0)]):
            assert not torch.equal(model(input_ids=ids).logits, plain)
        assert torch.equal(model(input_ids=ids).logits, plain), "the hook is gone"


def continued(edits: list[Edit], seed: int = 0, temperature: float = 1.0, tokens: int = 12) -> list[int]:
    model = small_model("Olmo3")
    place, = streams(model.model.layers, [LAYER])
    made = Continuation(model, place, TOKENS, temperature=temperature, seed=seed, sae=small_sae(),
                        edits=edits)
    return [made.step() for _ in range(tokens)]


def test_continuations_are_seeded_and_steering_by_zero_is_no_steering() -> None:
    plain = continued([])
    assert continued([]) == plain
    assert continued([Edit(2, "add", 0.0)]) == plain
    assert continued([], seed=1) != plain
    assert continued([Edit(2, "add", 30.0)]) != plain


def test_the_cache_changes_nothing() -> None:
    """Each token is the one that a new pass over the whole text so far would give."""
    model, sae, edits = small_model("Olmo3"), small_sae(), [Edit(2, "add", 3.0)]
    ids, draws = list(TOKENS), generator(0, "tokens of a continuation")
    for token in continued(edits):
        with torch.no_grad(), steering(*streams(model.model.layers, [LAYER]), sae, edits):
            logits_V = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        assert token == pick(logits_V, 1.0, draws.random())
        ids.append(token)


def test_draws_follow_the_probabilities() -> None:
    logits_V = torch.log(torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64))
    draws = [(i + 0.5) / 1000 for i in range(1000)]
    counts = [len(list(same)) for _, same in itertools.groupby(pick(logits_V, 1.0, draw) for draw in draws)]
    assert counts == [100, 600, 300]
    assert pick(logits_V, 1.0, 1 - 1e-17) == 3
    assert pick(logits_V, 0, 0.99) == 2
