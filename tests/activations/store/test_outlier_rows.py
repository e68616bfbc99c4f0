"""Rows of outlier norm: found in a store, and described in a sentence."""

import shutil

import numpy as np
import pytest
import torch

from helpers import recipe, write_documents
from olmoscope.activations.store import outliers
from olmoscope.activations.store.inspect import describe
from olmoscope.activations.store.outliers import Outliers, outliers_among, outliers_of
from olmoscope.activations.store.reader import open_store
from olmoscope.cli.store_tables import show_info
from olmoscope.pipeline import collect_stores, store_folder
from olmoscope.site import Site


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outliers")
    write_documents(folder / "corpus", count=90)
    job = recipe(folder / "corpus")
    collect_stores(job, folder / "out")
    return job, folder / "out"


def test_among_rows_of_which_some_are_sinks():
    draw = torch.Generator().manual_seed(0)
    x_ND = torch.randn(4000, 64, generator=draw)
    x_ND[::400] = 300 * torch.nn.functional.normalize(torch.ones(64) + 0.1 * torch.randn(10, 64, generator=draw), dim=1)
    position_N = np.arange(4000) % 800  # every second one of the ten sinks is at the start of its sequence
    found = outliers_among(x_ND.norm(dim=1).numpy(), position_N, lambda numbers: x_ND[torch.from_numpy(numbers)])
    unit_ND = torch.nn.functional.normalize(x_ND[::400].double(), dim=1)
    cosine_N = unit_ND @ torch.nn.functional.normalize(unit_ND.mean(0), dim=0)
    assert (found.rows, found.count, found.first) == (4000, 10, 5)
    assert found.norm == pytest.approx(300, rel=1e-5) and found.alike == pytest.approx(float(cosine_N.mean()), abs=1e-6)
    assert found.median == pytest.approx(float(x_ND.norm(dim=1).median()), rel=1e-3) and found.one_direction
    assert not outliers_among(np.ones(5, np.float32), np.arange(5), lambda numbers: x_ND).count


def test_in_a_sentence():
    assert Outliers(300_000, 0, 122.4, first=0).said_for_training() == (
        "none of 300,000 rows has a norm over 10 times the median (122)")
    assert Outliers(300_000, 962, 183.0, 928, 23_790.0, 0.998).said_for_training() == (
        "962 of 300,000 rows (0.32%) have a norm over 10 times the median (183), 130 times on average, 96% of them at "
        "the first position of a sequence, along one direction (mean cosine 1.00); training gives them a latent of "
        "their own (train.sinks: auto)")
    assert Outliers(1000, 20, 1.0, 0, 11.0, 0.4).said_for_training().endswith(
        "0% of them at the first position of a sequence, along no single direction (mean cosine 0.40); training gives "
        "those of them that share a direction latents of their own (train.sinks: auto)")
    assert Outliers(1000, 0, 4633.2).said() == "none of 1,000 rows has a norm over 10 times the median (4,633)"
    assert Outliers(1000, 20, 1.0).said() == "20 of 1,000 rows (2.00%) have a norm over 10 times the median (1)"


def test_of_a_store(job, monkeypatch, capsys):
    monkeypatch.setattr(outliers, "OUTLIER", 1.05)
    store = open_store(store_folder(job[1], "train"))
    site = Site(7)
    x_ND = torch.cat([store.read(site, segment, slice(0, rows)).double()
                      for segment, rows in enumerate(store.segment_rows)])
    position_N = torch.cat([store.read_rows(segment)["position"] for segment in range(len(store.segment_rows))])
    norm_N = x_ND.norm(dim=1)
    over_N = norm_N > 1.05 * norm_N.quantile(0.5)
    unit_ND = x_ND[over_N] / norm_N[over_N, None]
    monkeypatch.setattr(outliers, "DIRECTIONS_OF", len(unit_ND))
    found = outliers_of(store, site)
    assert 10 < found.count == int(over_N.sum()) and found.first == int((position_N[over_N] == 0).sum())
    assert found.alike == pytest.approx(float(unit_ND.mean(0).norm()), abs=1e-5)
    assert found.norm == pytest.approx(float(norm_N[over_N].mean()), rel=1e-4)
    show_info(describe(store.path))
    assert f"outliers at layers.7 {found.said()[:20]}" in " ".join(capsys.readouterr().out.split())


def test_info_of_a_store_with_damaged_rows(job, tmp_path, capsys):
    shutil.copytree(store_folder(job[1], "held_out"), tmp_path / "held_out")
    path = next((tmp_path / "held_out" / "rows").glob("segment-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-9] + b"!" * 9)
    show_info(describe(tmp_path / "held_out"))
    said = " ".join(capsys.readouterr().out.split())
    assert "outliers unknown: " in said and "state finished" in said
