"""`model.dtype: auto` follows the hardware, is recorded, and stays the same for a store on any machine."""

import json
from pathlib import Path

import pytest
import torch

import olmoscope.activations.collect.run
from helpers import recipe, write_documents
from olmoscope.activations.store.format import read_manifest
from olmoscope.errors import UserError
from olmoscope.model.dtype import fast_dtype, settle_model
from olmoscope.model.load import load_model
from olmoscope.pipeline import collect_stores, evaluate_saes, settle_recipe, train_saes
from olmoscope.recipe.schema import Model
from olmoscope.site import Site
from olmoscope.train.run import run_folder

CPU = torch.device("cpu")


def processor(monkeypatch, **features):
    """A processor with these instructions."""
    named = {name.replace("_", "-"): present for name, present in features.items()}
    monkeypatch.setattr("olmoscope.model.dtype.has", lambda feature: named.get(feature, False))


@pytest.mark.parametrize(("features", "dtype"), [
    ({"avx2": True, "avx512f": False}, "float32"), ({"avx512f": True, "avx512bf16": False}, "float32"),
    ({"avx512f": True, "avx512bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"),
    ({"neon": True}, "float32"), ({"neon": True, "bf16": True}, "bfloat16")])
def test_bfloat16_where_the_processor_multiplies_it(features, dtype, monkeypatch, capsys):
    processor(monkeypatch, **features)
    assert fast_dtype(CPU) == dtype
    assert settle_model(Model(name="tiny"), CPU).dtype == dtype
    assert f"tiny computes in {dtype}" in capsys.readouterr().err.replace("\n", " ")


def test_this_processor_is_asked(monkeypatch):
    monkeypatch.delenv("NUMBA_CPU_FEATURES", raising=False)
    flags = next((set(line.split()) for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith(("flags", "Features"))), set())
    native = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    assert fast_dtype(CPU) == ("bfloat16" if native else "float32")


def test_a_dtype_that_is_given_is_kept(monkeypatch, capsys):
    processor(monkeypatch, avx512bf16=True)
    assert settle_model(Model(name="tiny", dtype="float32"), CPU).dtype == "float32"
    assert capsys.readouterr().err == ""


def test_auto_loads_a_model_in_the_fast_dtype(monkeypatch):
    processor(monkeypatch)
    assert next(load_model(Model(name="tiny"), [Site(0)], CPU).module.parameters()).dtype == torch.float32


def test_it_is_written_down_and_another_machine_keeps_it(tmp_path, monkeypatch, capsys):
    write_documents(tmp_path / "corpus", count=90)
    out = tmp_path / "out"
    job = recipe(tmp_path / "corpus", model__dtype="auto", tokens__count=1500)
    processor(monkeypatch)
    collect_stores(job, out)
    assert capsys.readouterr().err.count("computes in float32") == 1
    assert read_manifest(out / "store" / "train").model_dtype == "float32"
    processor(monkeypatch, avx512bf16=True)
    assert settle_recipe(job, out).model.dtype == "float32"
    sae = next(sae for sae, _ in train_saes(job, out, [job.saes[0].id]))
    list(evaluate_saes(job, out, [sae.id]))
    assert json.loads((run_folder(out, sae) / "evaluation.json").read_text())["model_dtype"] == "float32"
    with pytest.raises(UserError, match="another recipe"):
        collect_stores(recipe(tmp_path / "corpus", model__dtype="bfloat16", tokens__count=1500), out)


def test_two_machines_that_begin_one_store_at_once(tmp_path, monkeypatch):
    """The second worker settled its dtype before the first started: it stops, with an error that says what to set."""
    write_documents(tmp_path / "corpus", count=90)
    store = tmp_path / "out" / "store" / "train"
    collect_stores(recipe(tmp_path / "corpus"), tmp_path / "out")
    other = recipe(tmp_path / "corpus", model__dtype="bfloat16")
    monkeypatch.setattr("olmoscope.activations.collect.run.refuse_another_store", lambda *arguments: None)
    (store / "layer_01" / "segment-000000.safetensors").unlink()
    (store / "checksums" / "segment-000000.json").unlink()
    with pytest.raises(UserError, match=r"begun with model\.dtype=float32, but now it is bfloat16: set model\.dtype="):
        olmoscope.activations.collect.run.collect(other, "train", store)
