"""An SAE in shards is the same to the last bit on any number of ranks, and equals the SAE of one process."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoscope.cost.ranks import step_traffic
from olmoscope.distributed.nodes import NodeRanks
from olmoscope.distributed.ranks import Ranks
from olmoscope.distributed.sums import legal_counts
from olmoscope.kernels.rounding import random_bits, step_seed
from olmoscope.recipe.schema import Candidates
from olmoscope.train.adam import Adam
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.step import Step
from rank_pool import RankPool
from shard_jobs import Case, joined, pull, same, sharded, train

AUXILIARY = SettledAuxiliary(weight=0.2, k=5, dead_window=90, lift=0.1)
CHEAP = Adam((0.9, 0.999), 1e-8, "touched", "bfloat16", scale_biases=True)
SICK = tuple(range(0, 131, 3))
CASES = {
    "tied": Case(4, tied=True),
    "untied": Case(4),
    "layer norm": Case(4, normalize="layer_norm"),
    "three shards": Case(3, tied=True),
    "eight shards": Case(8),
    "tied, bfloat16 moments, touched rows": Case(4, tied=True, adam=CHEAP),
    "untied, bfloat16 moments, touched rows": Case(4, adam=CHEAP),
    "auxiliary loss": Case(4, auxiliary=AUXILIARY, sick=SICK),
    "auxiliary loss, layer norm": Case(4, auxiliary=AUXILIARY, sick=SICK, normalize="layer_norm"),
    "auxiliary loss, dead latents in one shard": Case(4, auxiliary=AUXILIARY, sick=tuple(range(5))),
    "lift alone, tied": Case(4, tied=True, auxiliary=SettledAuxiliary(weight=0.0, k=5, dead_window=50), sick=SICK),
    "ties": Case(4, tied=True, equal=True),
    "k over the latents of a shard": Case(4, d_sae=19, k=11),
    "a shard without an active latent": Case(4, sick=tuple(range(33))),
    "wide": Case(4, d_model=40, d_sae=2051, k=16),
    "fewer rows than ranks": Case(4, rows=(3, 40, 1)),
    "batchtopk": Case(4, activation="batchtopk", auxiliary=AUXILIARY, sick=SICK),
    "batchtopk, tied, layer norm, ties": Case(4, activation="batchtopk", tied=True, normalize="layer_norm", equal=True),
    "batchtopk, few latents": Case(3, activation="batchtopk", d_sae=19, rows=(3, 40, 1)),
    "jumprelu": Case(4, activation="jumprelu", auxiliary=AUXILIARY, sick=SICK),
    "jumprelu, tied, layer norm, bfloat16 moments": Case(4, activation="jumprelu", tied=True, adam=CHEAP,
                                                         normalize="layer_norm"),
    "jumprelu, few latents": Case(3, activation="jumprelu", d_sae=19, rows=(3, 40, 1)),
    "transcoder": Case(4, writes=17, auxiliary=AUXILIARY, sick=SICK),
    "transcoder, jumprelu": Case(3, writes=30, activation="jumprelu", rows=(3, 40, 1)),
    "matryoshka": Case(4, matryoshka=(0.1, 0.2, 0.6), auxiliary=AUXILIARY, sick=SICK),
    "matryoshka, prefixes that end where shards do": Case(4, d_sae=128, matryoshka=(0.25, 0.5), tied=True),
    "matryoshka, batchtopk": Case(4, matryoshka=(0.1, 0.6), activation="batchtopk", auxiliary=AUXILIARY, sick=SICK,
                                  rows=(40, 40, 3, 17)),
    "matryoshka, jumprelu, touched rows": Case(3, matryoshka=(0.3,), activation="jumprelu", adam=CHEAP,
                                               normalize="layer_norm"),
    "matryoshka, few latents": Case(4, d_sae=9, k=3, matryoshka=(0.01, 0.02, 0.5), rows=(3, 40, 1)),
    "matryoshka, transcoder": Case(4, matryoshka=(0.2, 0.7), writes=17),
    "candidates": Case(4, candidates=Candidates(margin=0), d_model=96, d_sae=515, rows=(40,) * 70, tied=True),
    "candidates, batchtopk": Case(4, candidates=Candidates(margin=2), d_model=40, d_sae=200, activation="batchtopk",
                                  auxiliary=AUXILIARY, sick=SICK),
    "candidates, matryoshka, k over the latents of a shard": Case(4, candidates=Candidates(), d_sae=19, k=11,
                                                                  matryoshka=(0.5,)),
    "pulled": Case(4, pulled=True, normalize="layer_norm", auxiliary=AUXILIARY, sick=SICK),
    "pulled, matryoshka, transcoder": Case(4, pulled=True, matryoshka=(0.1, 0.6), writes=17),
    "groupmax": Case(4, activation="groupmax", d_sae=128, k=8, auxiliary=AUXILIARY, sick=SICK[:40]),
    "groupmax, tied, layer norm, touched rows": Case(2, activation="groupmax", d_sae=126, tied=True, adam=CHEAP,
                                                     normalize="layer_norm"),
}


def on(pool: RankPool, count: int, case: Case, nodes: int = 1):
    found = pool.run(count, train, case, nodes=nodes)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return joined(found)


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_ranks_changes_no_bit(rank_pool, name):
    case = CASES[name]
    counts = [count for count in legal_counts(case.shards) if count <= 4]
    (whole, counted), *others = [on(rank_pool, count, case) for count in counts]
    if 4 in counts:
        others.append(on(rank_pool, 4, case, nodes=2))
    assert all(tensor.isfinite().all() for tensor in whole.values())
    for other, also_counted in others:
        assert also_counted == counted
        differing = [key for key, tensor in whole.items() if not same(tensor, other[key])]
        assert not differing


@settings(max_examples=8, deadline=None)
@given(shards=st.sampled_from([2, 3, 4, 6]), d_sae=st.integers(8, 300), k_share=st.floats(0.01, 0.6),
       rows=st.lists(st.integers(1, 70), min_size=2, max_size=4), tied=st.booleans(), seed=st.integers(0, 2**20),
       normalize=st.sampled_from(["none", "layer_norm"]), activation=st.sampled_from(["topk", "batchtopk"]),
       matryoshka=st.sampled_from([(), (0.05, 0.4)]))
def test_nor_with_any_sizes(rank_pool, shards, d_sae, k_share, rows, tied, seed, normalize, activation, matryoshka):
    case = Case(shards, d_sae=d_sae, k=max(1, round(k_share * d_sae)), rows=tuple(rows), tied=tied, seed=seed,
                normalize=normalize, activation=activation, matryoshka=matryoshka)
    (whole, counted), *others = [on(rank_pool, count, case) for count in legal_counts(shards) if count <= 4]
    if shards == 4:
        others.append(on(rank_pool, 4, case, nodes=2))
    for other, also_counted in others:
        assert also_counted == counted and all(same(tensor, other[key]) for key, tensor in whole.items())


@pytest.mark.parametrize("name", ["tied", "untied", "layer norm", "auxiliary loss", "auxiliary loss, layer norm",
                                  "lift alone, tied", "k over the latents of a shard", "three shards", "batchtopk",
                                  "batchtopk, few latents", "jumprelu", "jumprelu, few latents", "groupmax",
                                  "transcoder", "matryoshka", "matryoshka, batchtopk",
                                  "matryoshka, few latents", "matryoshka, transcoder", "pulled",
                                  "pulled, matryoshka, transcoder"])
def test_in_float64_it_is_the_sae_of_one_process(rank_pool, name):
    """test_step.py and test_auxiliary.py hold that one to autograd and a dense trainer."""
    case = replace(CASES[name], dtype=torch.float64, rows=(40,) * 29 + (17,))
    ranks = 3 if case.shards == 3 else 2
    got, counted = on(rank_pool, ranks, case)
    step = Step(sae := case.sae(), case.adam, case.auxiliary, activation=case.activation,
                matryoshka=case.matryoshka)
    wanted = []
    for number, x_BD in enumerate(case.batches()):
        x_BD, target_BD = case.ends(x_BD)
        step(x_BD, 1e-2, target_BD, pull if case.pulled else None)
        if number % 3 == 2:
            wanted.append((*step.take_sums(), step.dead_share(60)))
    for name, parameter in sae.state_dict().items():
        torch.testing.assert_close(got[name], parameter, rtol=1e-10, atol=1e-10, msg=name)
    for name, tensor in step.rule.tensors().items():
        torch.testing.assert_close(got[f"{case.activation}.{name}"], tensor, rtol=1e-10, atol=1e-10, msg=name)
    assert torch.equal(got["last_fired"], step.last_fired_F)
    for line, like in zip(counted, wanted, strict=True):
        assert line == pytest.approx(like, rel=1e-9)
    if case.auxiliary:
        assert torch.equal(got["auxiliary.dead"], step.auxiliary.dead_F)
        assert case.auxiliary.weight == 0 or any(line[3] for line in counted), "rows with an auxiliary loss"


@pytest.mark.parametrize("shares", [(), (0.1, 0.3, 0.6)])
@pytest.mark.parametrize(("count", "shards", "rows"), [(2, 4, 40), (4, 4, 39), (3, 3, 2)])
def test_a_rank_sends_what_the_formula_says(rank_pool, count, shards, rows, shares):
    case = Case(shards, matryoshka=shares, rows=(rows,))
    for index, sent in enumerate(rank_pool.run(count, bytes_of_a_step, case)):
        traffic = step_traffic(rows, case.d_model, case.d_sae, case.k, shards, Ranks(index, count), shares)
        assert sent == (traffic.total, 0) and not traffic.crossing


@pytest.mark.parametrize("shares", [(), (0.1, 0.3, 0.6)])
@pytest.mark.parametrize(("shards", "rows", "k"), [(4, 40, 6), (4, 39, 40), (8, 3, 6)])
def test_two_levels_send_less_between_nodes(rank_pool, shards, rows, k, shares):
    case = Case(shards, matryoshka=shares, rows=(rows,), k=k)
    crossed = []
    for flat in (True, False):
        found = rank_pool.run(4, bytes_of_a_step, case, nodes=2, flat=flat)
        for index, sent in enumerate(found):
            ranks = Ranks(index, 4, node=2) if flat else NodeRanks(Ranks(index % 2, 2), Ranks(index // 2, 2))
            traffic = step_traffic(rows, case.d_model, case.d_sae, case.k, shards, ranks, shares)
            assert sent == (traffic.total, traffic.crossing)
        crossed.append(sum(crossing for _, crossing in found))
    assert crossed[1] < 0.7 * crossed[0]


def bytes_of_a_step(ranks, case):
    sharded(case, ranks)(case.batches()[0], 1e-2)
    return ranks.traffic.total(), ranks.crossing.total()


def test_a_nan_is_seen_in_the_loss(rank_pool):
    found = rank_pool.run(2, train_with_nan, CASES["tied"])
    assert all(torch.tensor(loss).isnan() for loss in found)


def train_with_nan(ranks, case):
    step = sharded(case, ranks)
    x_BD = case.batches()[0]
    x_BD[5] = torch.nan
    step(x_BD, 1e-2)
    return step.take_sums().loss


def test_each_shard_rounds_its_moments_by_draws_of_its_own():
    """Two equal shards with equal pairs would otherwise round alike."""
    elements = torch.arange(1000)
    one, other = (random_bits(elements, step_seed(7, shard)) for shard in (0, 1))
    assert (one == other).sum() < 5
    assert step_seed(7) == step_seed(7, 0)
