"""The benchmark of a rank's memory, at small size: each rank holds its share of an SAE's state."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import rank_memory
from rank_memory import BAR, Size


def held(ranks, size):
    return rank_memory.held(size, ranks.index, ranks.count, ranks._group)


@pytest.mark.parametrize("count", [2, 4])
def test_a_rank_holds_its_share(rank_pool, count):
    size = Size(d_model=128, latents=60_000, k=16, batch=64, shards=4)
    for bytes_ in rank_pool.run(count, held, size):
        assert bytes_ == pytest.approx(size.state(count), rel=BAR)
