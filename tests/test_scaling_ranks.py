"""The benchmark of ranks, at tiny size: it counts the formula's bytes, parts add up, the projection fits its source."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import rank_projection
import scaling_ranks
from olmoscope.cost.ranks import step_traffic
from olmoscope.distributed.ranks import Ranks
from rank_steps import RankSteps


def steps(ranks, d_sae, shards, batch):
    return RankSteps(24, d_sae, 6, batch, shards, ranks.index, ranks.count, ranks._group)(2)


@pytest.mark.parametrize(("count", "shards", "d_sae", "batch"), [(2, 2, 131, 17), (2, 8, 40, 16), (3, 3, 100, 2)])
def test_a_rank_sends_what_the_formula_says(rank_pool, count, shards, d_sae, batch):
    size = scaling_ranks.Size(24, d_sae, 6, batch)
    found = rank_pool.run(count, steps, d_sae, shards, batch)
    for index, measured in enumerate(found):
        wanted = step_traffic(batch, 24, d_sae, 6, shards, Ranks(index, count)).total
        for one in measured:
            assert one.sent == wanted
            assert sum(one.parts.values()) == pytest.approx(one.processor)
            assert {"encode", "select", "decode", "error", "dz", "update", "gather", "to_owners"} <= set(one.parts)
    case = scaling_ranks.Case(count, shards, d_sae, "strong")
    summary = scaling_ranks.summary(case, found, 1.5 * sum(one[0].sent for one in found), size)
    one = scaling_ranks.Case(1, 1, d_sae, "strong")
    plain = {"processor_ms": [sum(summary["processor_ms"]) / 2]}
    lines = scaling_ranks.judged({one: plain, case: summary}, {count: {"wall": 1.0, "processor": 1.0}})
    assert [line for line in lines if "processor time of all" in line and "2.000, bar 1.15: NOT MET" in line]
    assert [line for line in lines if "counted" in line and "0.000, bar 0.03: met" in line]
    assert [line for line in lines if "loopback" in line and "0.500, bar 0.03: NOT MET" in line]


def test_the_projection_fits_what_was_measured():
    card = rank_projection.h200()
    for sae, seconds, _ in rank_projection.measured().values():
        assert card.compute(sae, 1) == pytest.approx(seconds, rel=0.06)
    text = rank_projection.project(["h100x8", "h200x64"])
    assert "DERIVED" in text and text.count("two levels") == len(rank_projection.SAES)
    with pytest.raises(SystemExit, match="h100xN"):
        rank_projection.project(["b200x8"])
