"""The benchmark of rates, at tiny size: the search ends at the best rate, results are made once, all kinds train."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import rates

CELL = rates.Cell(True, "synthetic:16", 64, 4, 640, 64)


@pytest.fixture
def rows(monkeypatch):
    rng = torch.Generator().manual_seed(1)
    x_ND = (torch.randn(960, 16, generator=rng) @ torch.randn(16, 16, generator=rng)).bfloat16()
    monkeypatch.setattr(rates, "rows_of", lambda name, stores: (x_ND[:640], x_ND[640:]))


@pytest.mark.parametrize("best", [-7, 0, 4])
def test_the_search_ends_where_both_neighbours_are_worse(best):
    tried = []

    def nmse(lr):
        tried.append(round(2 * math.log2(lr / 3)))
        return abs(tried[-1] - best)

    rates.search(nmse, 3)
    assert {best - 1, best, best + 1} <= set(tried) and all(abs(n) <= abs(best) + 1 for n in tried)


def test_results_are_made_once(rows, tmp_path):
    path = tmp_path / "found.jsonl"
    rates.measure_cell(CELL, {}, path, [1e-2, None])
    once = path.read_text()
    rates.measure_cell(CELL, {}, path, [1e-2, None])
    found = [json.loads(line) for line in once.splitlines()]
    assert path.read_text() == once and [one["lr"] for one in found] == [1e-2, rates.rule_of(CELL)]
    assert all(0 < one["nmse"] < 1 and one["steps"] == 10 for one in found)
    rates.measure_cell(rates.replace(CELL, train={"adam": "exact"}), {}, path, [1e-2])
    *_, other = [json.loads(line) for line in path.read_text().splitlines()]
    assert other["train"] == {"adam": "exact"} and other["nmse"] != found[0]["nmse"]


@pytest.mark.parametrize("sae", [{"weights": "tied"}, {"activation": "batchtopk"}, {"activation": "jumprelu"},
                                 {"activation": "batchtopk", "matryoshka": [0.25]}])
def test_other_kinds_are_trained(rows, sae):
    plain, other = rates.train(CELL, {}, 1e-2), rates.train(rates.replace(CELL, sae=sae), {}, 1e-2)
    assert 0 < other["nmse"] < 1 and other["nmse"] != plain["nmse"]
