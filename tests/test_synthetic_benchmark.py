"""The benchmark of ground truth, at tiny size: every kind by both trainers, the same rows, figures that add up."""

import json
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import synthetic

TINY = synthetic.Size(features=64, width=16, roots=2, latents=32, k=2, rows=1100, held_out=300, batch=64)


def test_every_kind_is_trained_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "AT_ONCE", 256)
    path = tmp_path / "found.json"
    jobs = list(product([0], synthetic.KINDS, [None, 1e-3]))
    synthetic.run_all(TINY, "cpu", jobs[:2], path)
    synthetic.run_all(TINY, "cpu", jobs, path)
    results = json.loads(path.read_text())["results"]
    assert [(one["seed"], one["kind"], one["lr"]) for one in results] == jobs
    assert len({one["true_l0"] for one in results}) == 1
    for one in results:
        assert all(0 <= one[name] <= 1 for name in ("f1", "precision", "recall", "mcc", "uniqueness", "dead"))
    assert results[0]["l0"] <= TINY.k and synthetic.table(results).count("\n") == 1 + len(jobs)


@pytest.mark.parametrize("in_memory", [0, 2**31])
def test_draws_are_the_same_each_time(monkeypatch, in_memory):
    monkeypatch.setattr(synthetic, "AT_ONCE", 100)
    monkeypatch.setattr(synthetic, "IN_MEMORY", in_memory)
    draws = synthetic.Draws(lambda count: torch.rand(count, 3), rows=250, width=3, seed=5)
    once, torch_state = torch.cat(list(draws.chunks())), torch.get_rng_state()
    batches = list(draws.batches(64))
    assert [len(batch) for batch in batches] == [64, 64, 64, 58]
    assert torch.equal(torch.cat(batches), once) and torch.equal(torch.get_rng_state(), torch_state)
    assert not torch.equal(once[:100], once[100:200])
