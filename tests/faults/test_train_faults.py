"""Training that is killed, or whose store gets damaged, gives the same result in the end, or one clear line."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import checkpoint_contents, recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.errors import UserError
from olmoscope.recipe.schema import CoderConfig, Filter, Live
from olmoscope.site import Site
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.group import train_from_store
from olmoscope.train.run import run_folder
from olmoscope.train.step import Step

KILLS = 25
THREADS = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "workqueue"}
"""Settings under which a process can be forked."""
SAES = [{"layer": 1, "d_sae": 512, "k": 8}, {"layer": 1, "d_sae": 256, "k": 4, "normalize": "layer_norm"}]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two SAEs of one layer, and their store."""
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=120)
    job = recipe(folder / "corpus", tokens__count=9000, activations__layers=[0, 1], saes=SAES, train__batch=32)
    collect(job, "train", folder / "store")
    return job, folder / "store"


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    """The same with few steps, plain and filtered; each recipe with its results."""
    job, store = job
    jobs = []
    for first_positions in (0, 1):
        out = tmp_path_factory.mktemp("undisturbed")
        train = job.train.model_copy(update={"batch": 200, "filter": Filter(first_positions=first_positions)})
        one = job.model_copy(update={"train": train})
        list(train_from_store(one, one.saes, open_store(store), out))
        jobs.append((one, [result(out, sae) for sae in one.saes]))
    return jobs


def result(out, sae):
    """Everything that must be equal: weights and moments, metrics, the figures in done.json."""
    run = run_folder(out, sae)
    done = json.loads((run / "done.json").read_text())
    del done["seconds"], done["provenance"]
    return [checkpoint_contents(path) for path in checkpoints(run)], (run / "metrics.jsonl").read_text(), done


TRANSCODER_AND_CROSSCODER = [
    CoderConfig(reads=[Site(0)], writes=[Site(1)], skip=True, d_sae=256, k=4, weights="untied"),
    CoderConfig(reads=[Site(0), Site(1)], d_sae=256, k=4, activation="batchtopk")]


@pytest.mark.parametrize(("mode", "saes"), [
    ("store", None), ("live", None), ("store", TRANSCODER_AND_CROSSCODER)])
def test_killed_25_times_and_the_same_in_the_end(job, mode, saes, tmp_path):
    job, store = job
    if saes is not None:
        job = job.model_copy(update={"saes": saes})
    if mode == "live":
        job = job.model_copy(update={"saes": [job.saes[0], job.saes[1].model_copy(update={"reads": [Site(0)]})],
                                     "train": job.train.model_copy(update={"live": Live(rows=1500)})})
    (tmp_path / "job.yaml").write_text(job.to_yaml())
    script = Path(__file__).with_name("killed_training.py")
    subprocess.run([sys.executable, script, tmp_path / "job.yaml", mode, store, tmp_path, str(KILLS)], check=True,
                   env=os.environ | THREADS, timeout=300)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["kills"]) == KILLS
    assert len(set(report["kills"])) >= 4, f"the kills should fall all over the run: {report}"
    for sae in job.saes:
        assert result(tmp_path / "killed", sae) == result(tmp_path / "whole", sae)
    assert not list((tmp_path / "killed").rglob(".*.tmp"))


def stop_after(steps, job, store, out, monkeypatch):
    """Train until Ctrl-C comes after some steps."""
    step = Step.__call__

    def interrupted(self, *arguments):
        step(self, *arguments)
        if self.count == steps and self.sae.d_sae == 512:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(train_from_store(job, job.saes, open_store(store), out))
    for sae in job.saes:
        assert [path.stem for path in checkpoints(run_folder(out, sae))] == [f"step-{steps:08d}"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["layer_01/segment-000003.safetensors", "rows/segment-000003.safetensors"])
@pytest.mark.parametrize(("damage", "message"), [
    (cut, r"{} is damaged \((it is cut off|its checksum differs)\); run `olmoscope store repair"),
    (flip, r"{} is damaged \((the checksum of rows \d+ to \d+|its checksum) differs\); run `olmoscope store repair"),
    (Path.unlink, r"{} is damaged \(it is missing\); run `olmoscope store repair")])
def test_damage_of_the_store_is_named_and_costs_nothing(job, undisturbed, damage, message, name, tmp_path, monkeypatch):
    # rows/ is read only where a filter or the reading order asks for it
    store, out = tmp_path / "store", tmp_path / "out"
    shutil.copytree(job[1], store)
    job, expected = undisturbed[name.startswith("rows")]
    stop_after(7, job, store, out, monkeypatch)
    kept = (store / name).read_bytes()
    opened = open_store(store)
    damage(store / name)
    with pytest.raises(UserError, match=message.format(name)) as caught:
        list(train_from_store(job, job.saes, opened, out))
    assert "\n" not in str(caught.value)
    assert not list(out.rglob("done.json"))
    (store / name).write_bytes(kept)
    assert [fresh for _, fresh in train_from_store(job, job.saes, open_store(store), out)] == [True, True]
    assert [result(out, sae) for sae in job.saes] == expected


def test_a_store_of_another_revision_is_refused(job, undisturbed, tmp_path, monkeypatch):
    store, out = tmp_path / "store", tmp_path / "out"
    shutil.copytree(job[1], store)
    job, _ = undisturbed[0]
    stop_after(7, job, store, out, monkeypatch)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["model"]["revision"] = "another"
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"was trained on activations with model revision sha256:\w+, but now they have "
                                        "another; choose another --out"):
        list(train_from_store(job, job.saes, open_store(store), out))
